"""Per-prompt routing between models that were already asked: `python -m gate.baselines.routing`.

Two rows for a table, made from answers that `polylogit evaluate` wrote: `oracle routing`, a right answer if any model
gave one, and `learned routing`, the answer of the model that a classifier on the prompt expects to be right. The
classifier is one logistic regression a model, on hashed byte n-grams, trained on which answers to other prompts were
right: the same response-level labels that a gate gets. Knows nothing of gates or of the models.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from gate.evaluation.prompts import Question
from gate.evaluation.results import Answers, EvaluationError, Results, load_pairs, save_results
from gate.options import Metavar, OptionsError, Output, run_module

WIDTH = 4096  # hashed n-grams
LENGTHS = (1, 2, 3, 4)  # bytes of an n-gram
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # squared weights, chosen on a fifth of the training prompts


@dataclass(frozen=True, slots=True)
class PromptRouter:
    """A linear score for each of M models; the best one answers."""

    weight: Tensor
    """[M, WIDTH]."""
    bias: Tensor
    """[M]."""

    def choose(self, features: Tensor) -> Tensor:
        """[Q, WIDTH] -> int64 [Q], the chosen model of each prompt."""
        return (features @ self.weight.T + self.bias).argmax(1)


def prompt_features(questions: list[Question]) -> Tensor:
    """[Q, WIDTH]: log(1 + count) of each hashed byte n-gram of the messages, rows of length 1."""
    counts = torch.zeros(len(questions), WIDTH)
    for row, question in enumerate(questions):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in question.messages).encode()
        grams = [text[at : at + size] for size in LENGTHS for at in range(len(text) - size + 1)]
        places = torch.tensor([zlib.crc32(gram) % WIDTH for gram in grams])
        counts[row].index_add_(0, places, torch.ones(len(grams)))
    return nn.functional.normalize(counts.log1p(), dim=1)


def fit_router(features: Tensor, right: Tensor, seed: int = 0) -> PromptRouter:
    """From features [Q, WIDTH] and `right` [Q, M], 0 or 1; the penalty is the best on a fifth of the prompts."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]

    def score(penalty: float) -> float:
        chosen = _logistic(features[kept], right[kept], penalty).choose(features[held])
        return float(right[held].gather(1, chosen.unsqueeze(1)).mean())

    return _logistic(features, right, max(PENALTIES, key=score))


def oracle(models: list[Answers]) -> Answers:
    """For each question a right answer if any model gave one, else the first model's."""
    chosen = [next((m for m in models if m.right[i]), models[0]) for i in range(len(models[0].texts))]
    return _picked(chosen)


def routed(models: list[Answers], choice: list[int]) -> Answers:
    """The chosen model's answer to each question."""
    return _picked([models[index] for index in choice])


def _picked(chosen: list[Answers]) -> Answers:
    texts = [answers.texts[i] for i, answers in enumerate(chosen)]
    return Answers(texts, [answers.right[i] for i, answers in enumerate(chosen)], served_by="one of several, by prompt")


def _logistic(features: Tensor, right: Tensor, penalty: float) -> PromptRouter:
    """Independent logistic regressions, all at once, by L-BFGS from zero."""
    weight = torch.zeros(right.size(1), features.size(1), requires_grad=True)
    bias = torch.zeros(right.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(features @ weight.T + bias, right)
        loss = loss + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return PromptRouter(weight.detach(), bias.detach())


def labels(results: Results, models: list[str]) -> Tensor:
    """[Q, M]: which answers were right. Raises EvaluationError for a model that was not asked."""
    if missing := [name for name in models if name not in results.models]:
        raise EvaluationError(
            f"{results.prompts}: no answers of {missing[0]!r} (there are {', '.join(results.models)})"
        )
    return torch.tensor([results.models[name].right for name in models], dtype=torch.float32).T.contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """Of `python -m gate.baselines.routing`."""

    models: Annotated[tuple[str, ...], Metavar("LABEL")]
    """The rows to route between."""
    results: Path
    """Their answers to the prompts of the table."""
    prompts: Path
    """Those prompts."""
    train_results: Path | None = None
    """Their answers to the training prompts (default: none, then oracle routing only)."""
    train_prompts: Path | None = None
    """Those prompts (default: none)."""
    output: Annotated[Path, Output()]
    """Results with a row for each routing."""

    def __post_init__(self) -> None:
        if (self.train_results is None) != (self.train_prompts is None):
            raise OptionsError("--train-results and --train-prompts go together")


def route(options: RoutingOptions) -> None:
    """Run the command. Raises GateError."""
    results, questions = load_pairs(options.results, options.prompts)
    models = list(options.models)
    labels(results, models)
    asked = [results.models[name] for name in models]
    rows = {"oracle routing": oracle(asked)}
    if options.train_results is not None and options.train_prompts is not None:
        answered, training = load_pairs(options.train_results, options.train_prompts)
        router = fit_router(prompt_features(training), labels(answered, models))
        rows["learned routing"] = routed(asked, router.choose(prompt_features(questions)).tolist())
    results.models = rows
    save_results(results, options.output)
    for label, answers in rows.items():
        print(f"{label}: {sum(answers.right) / len(answers.right):.3f}")


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m gate.baselines.routing", __doc__, RoutingOptions, route, arguments)


if __name__ == "__main__":
    main()
