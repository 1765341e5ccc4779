"""The policy of a gate in training, served: `gate.training.refine.Policy` over a deployment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from gate.contract import Contract
from gate.evaluation.graders import Grader
from gate.evaluation.prompts import Question
from gate.model import GateModel
from gate.training.dataset import Records, from_responses
from gate.training.records import Response
from server.config import Config
from server.launch.local import LocalDeployment
from server.policy import Gate
from server.training.recorder import (
    hidden_sizes,
    recording_deployment,
    reward_of,
    save_for_recording,
    seed_of,
    to_response,
    vocabulary_size,
)
from server.training.rollout import Rollout, Rollouts, Task, Texts


class DeployedPolicy:
    """Samples through `deployment`, which runs a recording gate of `contract`; `directory` takes the checkpoints that
    are loaded into it. Prompts are numbers of `questions`."""

    def __init__(
        self,
        config: Config,
        deployment: LocalDeployment,
        directory: Path,
        contract: Contract,
        questions: list[Question],
        grader: Grader,
        *,
        max_tokens: int,
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._directory = directory
        self._contract = contract
        self._questions = questions
        self._grader = grader
        self._texts = Texts(config)
        self._sizes = hidden_sizes(config) if "hidden" in contract.inputs else []
        self._vocabulary_size = vocabulary_size(config)
        self._prompts: dict[int, list[list[int]]] = {}
        self._loaded = 0
        self._rollouts = Rollouts(
            deployment,
            stop_token_ids=self._texts.stop_token_ids,
            max_tokens=max_tokens,
            in_flight=2 * config.limits.sequences,
        )

    def load(self, model: GateModel) -> None:
        """Sample from this gate from now on."""
        self._loaded += 1
        path = self._directory / f"gate-{self._loaded}.pt"
        save_for_recording(self._sizes, (_on_cpu(model), self._contract), path)
        self._deployment.load_gate(path)
        path.unlink()

    def sample(self, prompts: list[int], copies: int, *, temperature: float, seed: int) -> Records:
        """Graded responses, `copies` for each prompt, one prompt after the other."""
        tasks = [
            Task(number, self._rendered(prompt), Gate(), temperature, seed_of(seed, number), keep_law=temperature > 0)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(copies))
        ]

        def grade(rollout: Rollout) -> Response:
            prompt = prompts[rollout.task.number // copies]
            question = self._questions[prompt]
            reward = reward_of(rollout, question, self._texts, self._grader)
            return to_response(rollout, prompt, question.id, 0, reward, self._sizes)

        with ThreadPoolExecutor(self._grader.workers) as pool:
            made = list(pool.map(grade, self._rollouts.run(tasks)))
        return from_responses(self._vocabulary_size, sorted(made, key=lambda response: response.task))

    def _rendered(self, prompt: int) -> list[list[int]]:
        if prompt not in self._prompts:
            self._prompts[prompt] = self._texts.prompts(self._questions[prompt])
        return self._prompts[prompt]


@contextmanager
def deployed_policy(
    config: Config,
    model: GateModel,
    contract: Contract,
    questions: list[Question],
    grader: Grader,
    *,
    max_tokens: int,
) -> Iterator[DeployedPolicy]:
    """The deployment, started to sample with `model`. Raises StartError."""
    sizes = hidden_sizes(config) if "hidden" in contract.inputs else []
    with recording_deployment(config, sizes, (_on_cpu(model), contract)) as (deployment, directory):
        yield DeployedPolicy(config, deployment, directory, contract, questions, grader, max_tokens=max_tokens)


def _on_cpu(model: GateModel) -> GateModel:
    """A copy, where the coordinator runs it."""
    return copy.deepcopy(model).cpu()
