"""What the coordinator and a worker on another host must agree on, as far as it can be known without loading weights.
Each knows its facts by name; the first that differs is named in one line. What the worker does as each coordinator
wishes are its `Terms`.
"""

from __future__ import annotations

import json
from typing import Literal

import msgspec

from gate.contract import read_contract
from gate.files import sha256_file, sha256_parts
from server import VLLM_VERSION, __version__
from server.config import Config
from server.errors import StartError
from server.text.model_files import read_model_files, weight_files, weights_sha256
from server.wire.expert import FromExpert, ToExpert

_OPTIONAL = ("weights", "gate")
"""Facts that a coordinator may leave out."""
_SHOWN = 12
"""Digits of a digest that are compared, so that a message can hold two of them."""


class Terms(msgspec.Struct, frozen=True):
    """What a worker does as each coordinator wishes."""

    list_length: int
    """Log-probabilities that it lists of each token."""
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
    protocol = json.dumps(msgspec.json.schema_components([ToExpert, FromExpert]))
    found = {
        "polylogit": __version__,
        "protocol": sha256_parts([protocol.encode()])[:_SHOWN],
        "vLLM": VLLM_VERSION,
        "expert": name,
        "model": sha256_parts([(model / "config.json").read_bytes(), (model / "tokenizer.json").read_bytes()])[:_SHOWN],
        "end tokens": ", ".join(map(str, ends)),
        "max_model_len": str(expert.max_model_len),
        "dtype": expert.dtype,
        "list_length": str(config.list_length),
        "limits.sequences": str(config.limits.sequences),
        "gate": _gate(config),
    }
    return found | ({"weights": weights_sha256(files)[:_SHOWN]} if (files := weight_files(model)) else {})


def offer(config: Config, name: str) -> Offer:
    """The coordinator's, to expert `name`. Raises StartError."""
    known, chosen = facts(config, name), terms(config)
    if chosen.projection != "gate":
        del known["gate"]  # the worker will not use it
    return Offer(known, chosen)


def terms(config: Config) -> Terms:
    """What the coordinator wishes."""
    length = list_length(config)
    if config.gate is None:
        return Terms(length, "none")
    if "hidden" not in (contract := read_contract(config.path(config.gate.file))).inputs:
        return Terms(length, "none")
    return Terms(length, "raw", contract.projected_size) if contract.recording else Terms(length, "gate")


def list_length(config: Config) -> int:
    """How many log-probabilities experts list of each token: the gate must find what it reads."""
    read = 1 if config.gate is None else read_contract(config.path(config.gate.file)).top_k
    return max(config.list_length, read)


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
    return "none" if config.gate is None else sha256_file(config.path(config.gate.file))[:_SHOWN]
