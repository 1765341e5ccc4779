"""A deployment without HTTP, of small processes. No engine runs here."""

from __future__ import annotations

import msgspec
import pytest

from server.errors import EngineError, StartError
from server.launch.local import LocalDeployment
from tests.support.children import config, everything_ended, until

pytestmark = pytest.mark.usefixtures("small_processes")


def test_it_starts_and_leaves_nothing(tmp_path, temporary, earlier):
    with LocalDeployment(config(tmp_path)) as deployment:
        assert [child.name for child in deployment.children] == ["coordinator", "expert a", "expert b"]
        deployment.check()
        assert list(temporary.iterdir())
    assert everything_ended(tmp_path, earlier)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("models", "settings", "words"),
    [
        (("stays", "at-once"), {"example_prompt": "never ready"}, "expert b: out of memory"),
        (("stays", "stays"), {"example_prompt": "coordinator dies"}, "coordinator: the experts' vocabularies differ"),
        (
            ("stays", "stays"),
            {"example_prompt": "never ready", "limits": {"start_seconds": 1.0}},
            "not ready after 1 s",
        ),
    ],
    ids=["expert", "coordinator", "time"],
)
def test_what_cannot_start_ends_with_one_line_and_leaves_nothing(tmp_path, temporary, models, settings, words, earlier):
    with pytest.raises(StartError, match=f"^{words}$"), LocalDeployment(config(tmp_path, models, **settings)):
        pass
    assert until(lambda: everything_ended(tmp_path, earlier))
    assert not list(temporary.iterdir())


def test_an_expert_on_another_host_that_is_not_reached_is_named(tmp_path):
    given = config(tmp_path, example_prompt="unreachable", limits={"start_seconds": 6.0})
    away = msgspec.structs.replace(given.experts[1], address="10.0.0.2:8100")
    given = msgspec.structs.replace(given, experts=[given.experts[0], away])
    words = r"^not ready after 6 s; expert b: 10[.]0[.]0[.]2:8100: Connection refused$"
    with pytest.raises(StartError, match=words), LocalDeployment(given):
        pass


@pytest.mark.parametrize(
    ("models", "prompt", "words"),
    [(("stays", "once"), "", "expert b: CUDA error"), (("stays", "stays"), "restart a", "expert b: stale")],
    ids=["dies", "hangs"],
)
def test_what_goes_wrong_later_is_told_when_it_is_asked_for(tmp_path, models, prompt, words):
    """Nobody replaces it: there is no supervisor."""

    def told() -> bool:
        try:
            deployment.check()
        except EngineError as error:
            return str(error).startswith(words)
        return False

    settings = {"example_prompt": prompt} if prompt else {}
    with LocalDeployment(config(tmp_path, models, **settings)) as deployment:
        assert until(told)
