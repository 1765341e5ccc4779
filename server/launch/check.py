"""Everything about a deployment that can be known without loading weights: `polylogit check`, and the first act of
`serve`."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

from gate.contract import CheckpointError, mismatches, read_contract, sha256_file, vocabulary_hash
from server.config import Config, ExpertConfig
from server.errors import StartError, UnreachableError
from server.placement import expert_cpus, expert_gpus
from server.remote.dialer import dialers
from server.remote.handshake import load_key
from server.text.model_files import ModelFiles, read_model_files

_NVML = "libnvidia-ml.so.1"


def check(config: Config, host: str | None = None) -> list[str]:
    """Validate `config`; a line for each thing found right, or that could not be looked at (it has "warning" in it).
    Raises StartError for the first that is wrong.

    `host`: the one that this is, if it is not the one that runs `polylogit serve`.
    """
    files = {expert.name: _model_files(config, expert, host) for expert in config.experts}
    lines = [
        f"expert {name}: {', '.join(found.architectures) or 'model'}, vocabulary {found.vocab_size},"
        f" context {found.max_positions}"
        for name, found in files.items()
    ]
    vocabulary = _one_vocabulary(files)
    lines.append(f"vocabulary: the same in all experts ({vocabulary[:12]})")
    lines.append(_check_devices(config, host))
    lines += _check_gpus(config, host)
    if any(expert.address is not None for expert in config.experts):
        load_key(config)
        lines.append("cluster key: given")
    keys = config.http.api_keys_file
    if host is None and keys is not None and not config.path(keys).is_file():
        raise StartError(f"http.api_keys_file: no file at {keys}")
    lines.append(_check_gate(config, vocabulary, [found.hidden_size for found in files.values()]))
    return lines


def check_port(config: Config) -> None:
    """Raises StartError if the HTTP port is taken."""
    host, port = config.http.host, config.http.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"http: cannot listen on {host}:{port}: {error.strerror}") from None


def check_remote(config: Config) -> list[str]:
    """A line for each expert on another host: it fits, or cannot be reached now. Raises StartError if one does not fit
    or does not let this host in."""
    lines = []
    for index, dialer in dialers(config).items():
        where = f"expert {config.experts[index].name}: {dialer.address}"
        try:
            dialer.dial().close()
            lines.append(f"{where}: reached, and fits")
        except UnreachableError as error:
            if error.final:
                raise StartError(f"expert {config.experts[index].name}: {error}") from None
            lines.append(f"expert {config.experts[index].name}: warning: not reached: {error}")
    return lines


def _model_files(config: Config, expert: ExpertConfig, host: str | None) -> ModelFiles:
    try:
        found = read_model_files(config.path(expert.model), weights=expert.host == host)
    except StartError as error:
        raise StartError(f"expert {expert.name}: {error}") from None
    if expert.max_model_len and found.max_positions and expert.max_model_len > found.max_positions:
        raise StartError(
            f"expert {expert.name}: max_model_len {expert.max_model_len} exceeds the model's {found.max_positions}"
        )
    if expert.chat_template is not None and not config.path(expert.chat_template).is_file():
        raise StartError(f"expert {expert.name}: no chat template at {expert.chat_template}")
    return found


def _one_vocabulary(files: dict[str, ModelFiles]) -> str:
    """The hash of the vocabulary that all experts share."""
    hashes = {name: _vocabulary(name, found) for name, found in files.items()}
    first, expected = next(iter(hashes.items()))
    for name, found in hashes.items():
        if found != expected:
            raise StartError(
                f"vocabulary: experts {first} and {name} have different vocabularies"
                f" ({expected[:12]} and {found[:12]}); token-level fusion needs one"
            )
    sizes = {name: found.vocab_size for name, found in files.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise StartError(f"vocabulary: vocab_size differs in config.json ({listed})")
    return expected


def _vocabulary(expert: str, found: ModelFiles) -> str:
    """The hash of one expert's vocabulary."""
    try:
        return vocabulary_hash(found.tokenizer_path)
    except Exception as error:  # tokenizers raises nothing narrower
        raise StartError(f"expert {expert}: {found.tokenizer_path}: not a tokenizer: {error}") from None


def _check_devices(config: Config, host: str | None) -> str:
    """No two experts on one GPU, no core that is not there."""
    taken: dict[tuple[str | None, int], str] = {}
    cores = os.sched_getaffinity(0)
    for expert, cpus in zip(config.experts, expert_cpus(config), strict=True):
        if expert.host == host and (absent := sorted(set(cpus or ()) - cores)):
            raise StartError(f"expert {expert.name}: cpus: this process has no core {absent[0]}")
        for gpu in expert.gpus or ():
            if (other := taken.setdefault((expert.host, gpu), expert.name)) != expert.name:
                raise StartError(f"expert {expert.name}: gpus: {gpu} is also expert {other}'s")
    return "devices: no conflicts"


def _check_gpus(config: Config, host: str | None) -> list[str]:
    """Every GPU that an expert of this host takes is there, if there is a driver to ask."""
    placed = zip(config.experts, expert_gpus(config), strict=True)
    taken = {gpu: expert.name for expert, gpus in placed if expert.host == host for gpu in gpus}
    if not taken:
        return []
    if (count := gpu_count()) is None:
        names = ", ".join(dict.fromkeys(taken.values()))
        return [f"gpus: warning: cannot see any GPU driver: those of {names} not checked"]
    if absent := sorted(gpu for gpu in taken if gpu >= count):
        raise StartError(f"expert {taken[absent[0]]}: gpus: there is no GPU {absent[0]} (found: {count})")
    return [f"gpus: {len(taken)} of {count}"]


def gpu_count() -> int | None:
    """GPUs that this host, or container, has; None if no driver answers. By the driver's own library, counted as
    experts see them: torch would take seconds, and no package is needed."""
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0
    nvml.nvmlShutdown()
    return None if failed else count.value


def _check_gate(config: Config, vocabulary: str, hidden_sizes: list[int]) -> str:
    if config.gate is None:
        return "gate: none"
    path = config.path(config.gate.file)
    try:
        contract = read_contract(path)
    except CheckpointError as error:
        raise StartError(f"gate: {error}") from None
    _check_digest(path, config.gate.sha256)
    problems = mismatches(
        contract,
        experts=config.expert_names,
        vocabulary_hash=vocabulary,
        top_k=config.top_k,
        hidden_sizes=hidden_sizes,
    )
    if problems:
        raise StartError(f"gate {config.gate.file}: {'; '.join(problems)}")
    pinned = "sha256 pinned" if config.gate.sha256 else "warning: sha256 not pinned, and TorchScript is code"
    return f"gate: fits ({contract.space} space, inputs {' and '.join(contract.inputs)}; {pinned})"


def _check_digest(path: Path, expected: str | None) -> None:
    if expected is not None and (found := sha256_file(path)) != expected:
        raise StartError(f"gate {path.name}: sha256 is {found}, the configuration says {expected}")
