"""Everything about a deployment that can be known without loading weights: `polylogit check`, and the first act of
`serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pynvml

from gate.contract import CheckpointError, read_contract, require_fit, require_sha256, vocabulary_hash
from server.config import Config, ExpertConfig
from server.errors import StartError, UnreachableError
from server.launch.sockets import bound
from server.placement import expert_cpus, expert_gpus
from server.remote.dialer import dialers
from server.remote.handshake import load_key
from server.text.model_files import ModelFiles, read_model_files


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. What is wrong is a StartError, not a finding."""

    subject: str
    """What it is about: "expert math", "gpus", "gate"."""
    text: str
    """What was found, a few words."""
    warning: bool = False
    """Whether somebody should know before the deployment runs: it is risky, or could not be looked at."""

    def __str__(self) -> str:
        return f"{self.subject}: {'warning: ' if self.warning else ''}{self.text}"


def check(config: Config, host: str | None = None) -> list[Finding]:
    """Validate `config`. Raises StartError for the first thing that is wrong.

    `host`: the one that this is, if it is not the one that runs `polylogit serve`.
    """
    files = {expert.name: _model_files(config, expert, host) for expert in config.experts}
    vocabulary = _one_vocabulary(files)
    return [
        *(_described(name, found) for name, found in files.items()),
        Finding("vocabulary", f"the same in all experts ({vocabulary[:12]})"),
        _check_devices(config, host),
        *_check_gpus(config, host),
        *_check_keys(config, host),
        *_check_gate(config, vocabulary, list(files.values())),
    ]


def check_port(config: Config) -> None:
    """Raises StartError if the HTTP port is taken."""
    with bound("http", config.http.host, config.http.port):
        pass


def check_remote(config: Config) -> list[Finding]:
    """A finding for each expert on another host: it fits, or cannot be reached now. Raises StartError if one does not
    fit or does not let this host in."""
    findings = []
    for index, dialer in dialers(config).items():
        expert = f"expert {config.experts[index].name}"
        try:
            dialer.dial().close()
            findings.append(Finding(expert, f"{dialer.address}: reached, and fits"))
        except UnreachableError as error:
            if error.final:
                raise StartError(f"{expert}: {error}") from None
            findings.append(Finding(expert, f"not reached: {error}", warning=True))
    return findings


def _described(name: str, found: ModelFiles) -> Finding:
    architectures = ", ".join(found.architectures) or "model"
    return Finding(f"expert {name}", f"{architectures}, vocabulary {found.vocab_size}, context {found.max_positions}")


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


def _check_devices(config: Config, host: str | None) -> Finding:
    """No two experts on one GPU, no core that is not there."""
    taken: dict[tuple[str | None, int], str] = {}
    cores = os.sched_getaffinity(0)
    for expert, cpus in zip(config.experts, expert_cpus(config), strict=True):
        if expert.host == host and (absent := sorted(set(cpus or ()) - cores)):
            raise StartError(f"expert {expert.name}: cpus: this process has no core {absent[0]}")
        for gpu in expert.gpus or ():
            if (other := taken.setdefault((expert.host, gpu), expert.name)) != expert.name:
                raise StartError(f"expert {expert.name}: gpus: {gpu} is also expert {other}'s")
    return Finding("devices", "no conflicts")


def _check_gpus(config: Config, host: str | None) -> list[Finding]:
    """Every GPU that an expert of this host takes is there, if there is a driver to ask."""
    placed = zip(config.experts, expert_gpus(config), strict=True)
    taken = {gpu: expert.name for expert, gpus in placed if expert.host == host for gpu in gpus}
    if not taken:
        return []
    if (count := gpu_count()) is None:
        names = ", ".join(dict.fromkeys(taken.values()))
        return [Finding("gpus", f"cannot see any GPU driver: those of {names} not checked", warning=True)]
    if absent := sorted(gpu for gpu in taken if gpu >= count):
        raise StartError(f"expert {taken[absent[0]]}: gpus: there is no GPU {absent[0]} (found: {count})")
    return [Finding("gpus", f"{len(taken)} of {count}")]


def gpu_count() -> int | None:
    """GPUs that this host, or container, has; None if no driver answers. Counted as experts see them, in the order of
    their bus, by the driver's own library: importing torch would take seconds."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _check_keys(config: Config, host: str | None) -> list[Finding]:
    keys = config.http.api_keys_file
    if host is None and keys is not None and not config.path(keys).is_file():
        raise StartError(f"http.api_keys_file: no file at {keys}")
    if all(expert.address is None for expert in config.experts):
        return []
    load_key(config)
    return [Finding("cluster key", "given")]


def _check_gate(config: Config, vocabulary: str, files: list[ModelFiles]) -> list[Finding]:
    if config.gate is None:
        return [Finding("gate", "none")]
    path = config.path(config.gate.file)
    try:
        contract = read_contract(path)
        require_sha256(path, config.gate.sha256)
        require_fit(
            contract,
            path,
            experts=config.expert_names,
            vocabulary_hash=vocabulary,
            vocabulary_size=files[0].vocab_size,
            hidden_sizes=[found.hidden_size for found in files],
        )
    except CheckpointError as error:
        raise StartError(f"gate: {error}") from None
    fits = f"fits ({contract.space} space, inputs {' and '.join(contract.inputs)}"
    if config.gate.sha256 is not None:
        return [Finding("gate", f"{fits}; sha256 pinned)")]
    return [Finding("gate", f"{fits})"), Finding("gate", "sha256 not pinned, and TorchScript is code", warning=True)]
