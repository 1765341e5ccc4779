"""What the coordinator and a worker on another host must agree on, as far as it can be known without loading weights.
Each knows its facts by name; the first that differs is named in one line. What the worker does as each coordinator
wishes are its `Terms`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from gate.contract import read_contract, sha256_file
from server import VLLM_VERSION, __version__
from server.config import Config
from server.errors import StartError
from server.text.model_files import read_model_files, weight_files
from server.wire.expert import FromExpert, ToExpert

_OPTIONAL = ("weights", "gate")
"""Facts that a coordinator may leave out."""
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


class Terms(msgspec.Struct, frozen=True):
    """What a worker does as each coordinator wishes."""

    exact: bool
    """Keep the last logits of parked sequences."""
    projection: Literal["none", "gate", "raw"]
    """What is sent of hidden states: nothing, their projection by the gate that both hosts have, or themselves."""
    width: int = 0
    """Size that hidden states are padded to where they are sent themselves (`polylogit record`)."""


class Offer(msgspec.Struct, frozen=True):
    """What a coordinator says once it is trusted."""

    facts: dict[str, str]
    """What its files and settings are, by name (see `facts`)."""
    terms: Terms
    """What it wishes."""


class Verdict(msgspec.Struct, frozen=True):
    """What the worker answers."""

    reason: str
    """Why it does not serve this coordinator; "" where it does."""
    final: bool
    """Asking again is of no use until somebody mends a configuration."""


def facts(config: Config, name: str) -> dict[str, str]:
    """What a host knows of expert `name` and of what all experts share. Raises StartError for files that are not there;
    only the weights may be missing, and are no fact then."""
    expert = config.experts[config.expert_names.index(name)]
    model = config.path(expert.model)
    ends = end_tokens(config)  # first: it says which files are missing
    found = {
        "polylogit": __version__,
        "protocol": _digest([json.dumps(msgspec.json.schema_components([ToExpert, FromExpert])).encode()]),
        "vLLM": VLLM_VERSION,
        "expert": name,
        "model": _digest([(model / "config.json").read_bytes(), (model / "tokenizer.json").read_bytes()]),
        "end tokens": ", ".join(map(str, ends)),
        "max_model_len": str(expert.max_model_len),
        "dtype": expert.dtype,
        "top_k": str(config.top_k),
        "limits.sequences": str(config.limits.sequences),
        "gate": _gate(config),
    }
    return found | ({"weights": _weights(files)} if (files := weight_files(model)) else {})


def offer(config: Config, name: str) -> Offer:
    """The coordinator's, to expert `name`. Raises StartError."""
    known, chosen = facts(config, name), terms(config)
    if chosen.projection != "gate":
        del known["gate"]  # the worker will not use it
    return Offer(known, chosen)


def terms(config: Config) -> Terms:
    """What the coordinator wishes."""
    exact = config.missing == "exact"
    if config.gate is None:
        return Terms(exact, "none")
    file = config.path(config.gate.file)
    if "hidden" not in (contract := read_contract(file)).inputs:
        return Terms(exact, "none")
    from gate.recording import is_recording

    return Terms(exact, "raw", contract.projected_size) if is_recording(file) else Terms(exact, "gate")


def end_tokens(config: Config) -> list[int]:
    """The end tokens of all experts: under a grammar they all allow the same. Raises StartError."""
    found: set[int] = set()
    for expert in config.experts:
        try:
            found.update(read_model_files(config.path(expert.model), weights=False).eos_token_ids)
        except StartError as error:
            raise StartError(f"expert {expert.name}: {error} (every host needs its JSON files)") from None
    return sorted(found)


def compare(coordinators: dict[str, str], experts: dict[str, str]) -> Verdict:
    """The worker's verdict on a coordinator's facts: `final` where they differ."""
    for name, ours in experts.items():
        theirs = coordinators.get(name, ours if name in _OPTIONAL else "unknown")
        if theirs != ours:
            return Verdict(f"{name} is {ours} at the expert and {theirs} at the coordinator", final=True)
    return Verdict("", final=False)


def _gate(config: Config) -> str:
    return "none" if config.gate is None else sha256_file(config.path(config.gate.file))[:12]


def _weights(files: list[Path]) -> str:
    """A digest of the names, the sizes and samples all over the contents: whole files would take minutes to read."""
    parts = []
    for file in files:
        size = file.stat().st_size
        parts += [file.name.encode(), str(size).encode()]
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                parts.append(opened.read(_SAMPLE_BYTES))
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:12]
