"""Would the unit tests of a prompts file tell right code from wrong? Read, not run.

`gate.evaluation.sandbox` runs them: top to bottom, then every unittest.TestCase and every test_ function without
arguments.
"""

import ast

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_TELL_NOTHING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.Pass)


def problem(tests: str) -> str | None:
    """Why `tests` would pass any code, or none; None if they would not."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        return f'its "tests" are not Python: {error}'
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef) and node.name not in used and _needs_pytest(node):
            return f"its test {node.name} needs pytest: it takes arguments, or is async, or no unittest.TestCase"
    if not any(_is_test(node) or not _defines(node) for node in tree.body):
        return 'its "tests" only define things: nothing would be tested'
    return None


def _defines(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, _TELL_NOTHING)


def _is_test(node: ast.stmt) -> bool:
    """A class with a base counts: what that is, only running tells."""
    if isinstance(node, ast.ClassDef):
        return bool(node.bases) and _has_tests(node)
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def _needs_pytest(node: _Function | ast.ClassDef) -> bool:
    """A class of its own kind, a coroutine, or arguments that nothing here gives (a decorator may)."""
    if isinstance(node, ast.ClassDef):
        return node.name.startswith("Test") and not node.bases and _has_tests(node)
    decorators = [ast.unparse(each) for each in node.decorator_list]
    given = bool(decorators) and not any("pytest" in each for each in decorators)
    wanting = isinstance(node, ast.AsyncFunctionDef) or (_wants(node.args) and not given)
    return node.name.startswith("test_") and wanting


def _wants(arguments: ast.arguments) -> bool:
    """Whether any argument has no default."""
    placed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return placed > 0 or None in arguments.kw_defaults


def _has_tests(node: ast.ClassDef) -> bool:
    return any(isinstance(each, _Function) and each.name.startswith("test") for each in node.body)
