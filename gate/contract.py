"""The contract embedded in a gate checkpoint: what a deployment must be for the gate to be valid on it.

Reads the contract from the TorchScript archive as a plain zip file. Never imports torch, so the API process
and the configuration check can use it.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import Literal

import msgspec
from tokenizers import Tokenizer

from gate.errors import GateError
from gate.files import sha256_file

FORMAT_VERSION = 1
CONTRACT_ENTRY = "contract.json"


class CheckpointError(GateError):
    """A gate checkpoint is missing, unreadable or contradicts itself."""


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the gate was trained for. E = len(experts), K = top_k, d = projected_size, S = state_size."""

    format_version: int
    """`FORMAT_VERSION` of the program that wrote it."""
    experts: list[str]
    """Names, in the order of the E axis."""
    vocabulary_hash: str
    """sha256, hexadecimal, of the experts' common vocabulary; see `vocabulary_hash`."""
    top_k: int
    """How many of each expert's most probable tokens the gate reads."""
    space: Literal["logprob", "prob"]
    """What the coefficients weigh: log-probabilities or probabilities."""
    inputs: list[Literal["topk", "hidden"]]
    """What the gate reads of each expert: its list, its last hidden state."""
    hidden_sizes: list[int]
    """H_i of each expert; empty when "hidden" is not among the inputs."""
    projected_size: int
    """Floats of each expert's hidden state that travel to the gate; 0 without hidden states."""
    state_size: int
    """Floats that the gate keeps between a sequence's tokens; 0 for none."""
    recording: bool = False
    """The projection is the hidden state itself, padded to the widest (`gate.training.recording_gate`): any expert can
    run it without having the checkpoint."""


def vocabulary_hash(tokenizer_json: Path) -> str:
    """sha256 (hexadecimal) over the sorted (id, token) pairs of a tokenizer.json, added tokens included."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(msgspec.json.encode(pairs)).hexdigest()


def require_sha256(path: Path, expected: str | None) -> None:
    """Raises CheckpointError if a file is not the one that `expected` (hexadecimal; None: any) pins."""
    if expected is not None and (found := sha256_file(path)) != expected:
        raise CheckpointError(f"{path} has sha256 {found}, expected {expected}")


def encode_contract(contract: Contract) -> str:
    """The JSON text that goes into the archive. Raises CheckpointError if the contract contradicts itself."""
    _validate(contract)
    return msgspec.json.encode(contract).decode()


def decode_contract(text: bytes) -> Contract:
    """Inverse of `encode_contract`. Raises CheckpointError on malformed or contradictory contracts."""
    try:
        contract = msgspec.json.decode(text, type=Contract)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"malformed gate contract: {error}") from error
    _validate(contract)
    return contract


def read_contract(path: Path) -> Contract:
    """The contract inside a TorchScript archive, read without torch. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"no gate checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [name for name in archive.namelist() if name.endswith(f"/extra/{CONTRACT_ENTRY}")]
            if not entries:
                raise CheckpointError(f"{path} has no embedded {CONTRACT_ENTRY}; it is not a gate checkpoint")
            return decode_contract(archive.read(entries[0]))
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is not a readable TorchScript archive: {error}") from error


def mismatches(
    contract: Contract,
    *,
    experts: list[str],
    vocabulary_hash: str,
    vocabulary_size: int,
    hidden_sizes: list[int] | None,
) -> list[str]:
    """Every way in which a deployment differs from the contract; empty when the gate fits.

    `hidden_sizes` is None while unknown, and is compared only when the gate reads hidden states.
    """
    pairs: list[tuple[str, object, object]] = [
        ("experts", contract.experts, experts),
        ("vocabulary_hash", contract.vocabulary_hash, vocabulary_hash),
    ]
    if hidden_sizes is not None and "hidden" in contract.inputs:
        pairs.append(("hidden_sizes", contract.hidden_sizes, hidden_sizes))
    problems = [
        f"{field}: the gate expects {expected}, the deployment has {found}"
        for field, expected, found in pairs
        if expected != found
    ]
    if contract.top_k > vocabulary_size:
        problems.append(f"top_k: the gate reads {contract.top_k} tokens of each expert, which has {vocabulary_size}")
    return problems


def require_fit(
    contract: Contract,
    path: Path,
    *,
    experts: list[str],
    vocabulary_hash: str,
    vocabulary_size: int,
    hidden_sizes: list[int] | None,
) -> None:
    """Raises CheckpointError, which names `path` and each field in which a deployment differs from its contract."""
    problems = mismatches(
        contract,
        experts=experts,
        vocabulary_hash=vocabulary_hash,
        vocabulary_size=vocabulary_size,
        hidden_sizes=hidden_sizes,
    )
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def _validate(contract: Contract) -> None:
    reads_hidden = "hidden" in contract.inputs
    sizes = len(contract.experts) if reads_hidden else 0
    rules = {
        f"format_version {contract.format_version} is not {FORMAT_VERSION}": contract.format_version == FORMAT_VERSION,
        "experts must be two or more distinct names": len(set(contract.experts)) == len(contract.experts) > 1,
        "top_k must be at least 1": contract.top_k >= 1,
        "inputs must not be empty": bool(contract.inputs),
        f"hidden_sizes must have {sizes} entries": len(contract.hidden_sizes) == sizes,
        "projected_size must be positive exactly when hidden is an input": (contract.projected_size > 0)
        == reads_hidden,
        "state_size must not be negative": contract.state_size >= 0,
        "a recording gate must project to the widest hidden state": not contract.recording
        or contract.projected_size == max(contract.hidden_sizes, default=0),
    }
    broken = [message for message, holds in rules.items() if not holds]
    if broken:
        raise CheckpointError("invalid gate contract: " + "; ".join(broken))
