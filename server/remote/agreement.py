"""What the coordinator and a worker on another host must agree on, as far as it can be known without loading weights.
Each states its facts by name; the first that differs is named in one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec

from gate.contract import sha256_file
from server import VLLM_VERSION, __version__
from server.config import Config
from server.errors import StartError
from server.messages import FromExpert, ToExpert
from server.model_files import read_model_files, weight_files
from server.remote.handshake import Verdict

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def facts(config: Config, name: str) -> dict[str, str]:
    """What this host knows of expert `name` and of what all experts share. Raises StartError for files that are not
    there; only the weights may be missing, and are no fact then."""
    expert = config.experts[config.expert_names.index(name)]
    model = config.path(expert.model)
    found = {
        "polylogit": __version__,
        "protocol": _digest([json.dumps(msgspec.json.schema_components([ToExpert, FromExpert])).encode()]),
        "vLLM": VLLM_VERSION,
        "expert": name,
        "experts": ", ".join(config.expert_names),
        "model": _digest([(model / "config.json").read_bytes(), (model / "tokenizer.json").read_bytes()]),
        "end tokens": ", ".join(map(str, end_tokens(config))),
        "max_model_len": str(expert.max_model_len),
        "dtype": expert.dtype,
        "top_k": str(config.top_k),
        "missing": config.missing,
        "limits.sequences": str(config.limits.sequences),
        "gate": "none" if config.gate is None else sha256_file(config.path(config.gate.file))[:12],
    }
    return found | ({"weights": _weights(files)} if (files := weight_files(model)) else {})


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
    """The worker's verdict on a coordinator: `final` where they differ."""
    for name, mine in experts.items():
        if name in coordinators and (theirs := coordinators[name]) != mine:
            return Verdict(f"{name} is {mine} there and {theirs} here", final=True)
    return Verdict("", final=False)


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
