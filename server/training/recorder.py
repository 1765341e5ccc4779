"""The deployment as a recorder: started with a recording gate, so that what every expert shows comes back with each
response; and what is written down of the experts and of each response.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gate import checkpoint
from gate.contract import CheckpointError, Contract, require_fit, vocabulary_hash
from gate.evaluation.graders import Grader
from gate.evaluation.prompts import Question
from gate.training.recording_gate import uniform_gate, wrap
from gate.training.records import Response
from server.config import Config, GateConfig, load_config
from server.launch.local import LocalDeployment
from server.logs import LogOptions
from server.text.model_files import ModelFiles, fingerprint, read_model_files
from server.training.rollout import Rollout, Texts

Inner = tuple[Any, Contract]
"""A gate as a module, and its contract."""
_TOP_K = 32
"""What is kept of each list, unless told otherwise."""


@contextmanager
def recording_deployment(config: Config, sizes: list[int], gate: Inner) -> Iterator[tuple[LocalDeployment, Path]]:
    """The deployment, started to decode with `gate` instead of its own and to show hidden states of `sizes` (none: it
    does not show them); (it, a directory for checkpoints). Raises StartError."""
    with tempfile.TemporaryDirectory(prefix="polylogit-") as directory:
        file = Path(directory) / "recording.pt"
        save_for_recording(sizes, gate, file)
        limits = msgspec.structs.replace(config.limits, queue=max(config.limits.queue, config.limits.sequences))
        chosen = GateConfig(str(file), on_failure="fail")
        # "wait": rows of a lost expert must not be left out of what a gate learns from.
        served = msgspec.structs.replace(config, gate=chosen, limits=limits, on_expert_loss="wait")
        with LocalDeployment(served) as deployment:
            yield deployment, Path(directory)


def save_for_recording(sizes: list[int], gate: Inner, path: Path) -> None:
    """Write `gate`, inside a recording gate if there are hidden states to show. Raises CheckpointError."""
    module, contract = gate
    if sizes:
        wrap(module, contract, sizes, path)
    else:
        checkpoint.save(module, contract, path)


def chosen_gate(config: Config, path: Path | None, top_k: int | None) -> Inner:
    """The gate to record with: the checkpoint at `path`, else one that weighs all experts alike. Of each list it reads
    `top_k`, if given. Raises CheckpointError if it does not, or is not for these experts."""
    if path is None:
        read = min(top_k or _TOP_K, vocabulary_size(config))
        return uniform_gate(config.expert_names, vocabulary_of(config), read)
    module, contract = _load_gate(config, path)
    if top_k not in (None, contract.top_k):
        raise CheckpointError(f"{path}: reads {contract.top_k} tokens of each expert, --top-k is {top_k}")
    return module, contract


def _load_gate(config: Config, path: Path) -> Inner:
    """The checkpoint at `path`. Raises CheckpointError if it is not for these experts."""
    loaded = checkpoint.load(path)
    require_fit(
        loaded.contract,
        path,
        experts=config.expert_names,
        vocabulary_hash=vocabulary_of(config),
        vocabulary_size=vocabulary_size(config),
        hidden_sizes=hidden_sizes(config),
    )
    return loaded.module, loaded.contract


def read_config(path: Path, log_options: LogOptions) -> Config:
    """The configuration at `path`, for a command with a progress bar: its processes log what goes wrong, unless told
    otherwise. Raises ConfigError."""
    config = load_config(path)
    quiet = msgspec.structs.replace(config.logging, level="warning")
    return msgspec.structs.replace(config, logging=log_options.over(quiet))


def hidden_sizes(config: Config) -> list[int]:
    """H_i of each expert."""
    return [files.hidden_size for files in model_files(config)]


def vocabulary_of(config: Config) -> str:
    """The hash of the experts' vocabulary."""
    return vocabulary_hash(config.path(config.experts[0].model) / "tokenizer.json")


def vocabulary_size(config: Config) -> int:
    """V, as the models have it."""
    return model_files(config)[0].vocab_size


def fingerprints(config: Config) -> list[str]:
    """What tells one expert from another, for each."""
    return [
        fingerprint(files, [expert.dtype, expert.system_prompt, _template(config, expert.chat_template)])
        for files, expert in zip(model_files(config), config.experts, strict=True)
    ]


def _template(config: Config, file: str | None) -> str | None:
    return None if file is None else config.path(file).read_text(encoding="utf-8")


def model_files(config: Config) -> list[ModelFiles]:
    return [read_model_files(config.path(expert.model), weights=False) for expert in config.experts]


def seed_of(seed: int, number: int) -> int:
    """The 64-bit seed of response `number`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def reward_of(rollout: Rollout, question: Question, texts: Texts, grader: Grader) -> float:
    """What the grader gives; 0 for a response that was cut at its most tokens."""
    return grader(question.row, texts.text(rollout.tokens.tolist())) if rollout.finished else 0.0


def to_response(rollout: Rollout, row: int, name: str, source: int, reward: float, sizes: list[int]) -> Response:
    """A rollout with its reward, as it is kept. `sizes`: H_i of each expert, empty to leave hidden states out."""
    return Response(
        task=rollout.task.number,
        prompt=row,
        prompt_id=name,
        source=source,
        temperature=rollout.task.temperature,
        reward=reward,
        tokens=rollout.tokens,
        topk_ids=rollout.ids,
        topk_logprobs=rollout.logprobs,
        hidden=[rollout.projected[:, index, :size] for index, size in enumerate(sizes)],
        token_logprobs=rollout.token_logprobs,
        law=rollout.law,
    )
