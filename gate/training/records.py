"""Records on disk: what every expert showed at every token of graded responses. A directory with a manifest and shards.

    manifest.json           what was recorded, over which experts (`Manifest`)
    shard-00000.safetensors R responses with N tokens in all, one response after the other:
        topk_ids int32[N, E, K], topk_logprobs float16[N, E, K] (best first, over the whole vocabulary, before the token
        was chosen; -1 and -inf where an expert gave nothing), rest float32[N, E] (log of the probability that each list
        leaves), hidden.i float16[N, H_i] (what enters expert i's output layer), tokens int32[N] (the response's own),
        token_logprobs float32[N, E] (each expert's of that token), lengths int32[R], rewards float32[R] (of whole
        responses, 0..1),
        tasks int64[R] (which planned response it is), prompts int32[R] (line of the prompts file), sources int32[R]
        (index into the manifest's), temperatures float32[R]. The header holds the prompts' ids, a digest of the tensors
        and the manifest's sha256, so that no shard passes for another recording's.

Every file is written whole or not at all. In memory, for training, the same is `gate.training.dataset.Records`. Knows
nothing of models, of gates or of torch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as encode

from gate.errors import GateError
from gate.files import sha256_file, write_whole

FORMAT_VERSION = 4
"""1 had no sha256 of the manifest in its shards; the fingerprints of 2 saw only the ends of files of weights; 3 had
nothing of tokens outside the lists."""
MANIFEST = "manifest.json"
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
"""A shard is closed at the latest after so many seconds: no more than that is lost when the power fails."""
_HALF = float(np.finfo(np.float16).max)
_NO_MASS = 1e-9
"""What float32 cannot tell from 0 beside 1."""

Array = npt.NDArray[Any]


class RecordError(GateError):
    """Records are missing, damaged, or of something else. The message is one line."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a directory of records holds. E = len(experts), K = top_k, V = vocabulary_size."""

    format_version: int
    """`FORMAT_VERSION` of the program that wrote it."""
    experts: list[str]
    """Names, in the order of the E axis."""
    models: list[str]
    """[E], a fingerprint of each expert's files."""
    vocabulary_hash: str
    """sha256 (hexadecimal) of the experts' common vocabulary."""
    vocabulary_size: int
    """V, as the models have it."""
    top_k: int
    """Listed candidates of each expert and token."""
    hidden_sizes: list[int]
    """[E], H_i; empty where hidden states were left out."""
    prompts: str
    """sha256 (hexadecimal) of the prompts file."""
    grader: str
    """As given to `--grader`."""
    sources: list[str]
    """Names of what wrote the responses: experts, policies, "gate", "answer", "response"."""
    settings: dict[str, Any]
    """All else that decides which responses are planned and what they are."""


@dataclass(frozen=True, slots=True)
class SampledBy:
    """The law that sampled a response of T tokens."""

    coefficients: Array
    """float32 [T, E], what was fused with."""
    log_normaliser: Array
    """float32 [T], log of the sum of exp(score / temperature) over the vocabulary."""


@dataclass(frozen=True, slots=True)
class Response:
    """One graded response of T tokens."""

    task: int
    """Which of the planned responses it is."""
    prompt: int
    """Place of its prompt in the prompts file, from 0."""
    prompt_id: str
    """The prompt's id."""
    source: int
    """What wrote it: an index into the manifest's `sources`."""
    temperature: float
    """At which it was sampled."""
    reward: float
    """Of all of it, 0 to 1."""
    tokens: Array
    """int32 [T], its own."""
    topk_ids: Array
    """int32 [T, E, K], best first; -1 where an expert gave nothing."""
    topk_logprobs: Array
    """float32 [T, E, K], over the whole vocabulary, before the token was chosen; -inf where an expert gave nothing."""
    hidden: list[Array]
    """E times float [T, H_i], what enters each expert's output layer; empty where left out."""
    token_logprobs: Array
    """float32 [T, E], each expert's of the response's token, over the whole vocabulary; -inf where it gave nothing."""
    law: SampledBy | None = None
    """What sampled it, where a gate learns from that at once; not kept in files."""

    @property
    def nbytes(self) -> int:
        """About what it takes in a shard."""
        lists = self.topk_ids.nbytes + self.topk_logprobs.nbytes // 2
        return lists + 2 * self.token_logprobs.nbytes + 2 * sum(part.size for part in self.hidden)

    @property
    def rest(self) -> Array:
        """float32 [T, E], log of the probability that each list leaves. In half precision it would be noise."""
        listed = np.exp(self.topk_logprobs, dtype=np.float64).sum(-1)
        rest: Array = np.log(np.maximum(1 - listed, _NO_MASS)).astype(np.float32)
        return rest


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises RecordError."""
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise RecordError(f"{directory}: no records there (no {MANIFEST})") from None
    except (OSError, msgspec.DecodeError) as error:
        raise RecordError(f"{path}: {error}") from None
    if manifest.format_version != FORMAT_VERSION:
        versions = f"format version {manifest.format_version}, this program reads {FORMAT_VERSION}"
        raise RecordError(f"{path}: {versions}; record again")
    return manifest


def difference(old: Manifest, new: Manifest) -> str | None:
    """The first thing in which two manifests differ, as one line, or None."""
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    before |= {f"settings.{key}": value for key, value in before.pop("settings").items()}
    after |= {f"settings.{key}": value for key, value in after.pop("settings").items()}
    for key in [*after, *(before.keys() - after.keys())]:
        if before.get(key) != after.get(key):
            return f"{key} was {_short(before.get(key))}, is now {_short(after.get(key))}"
    return None


def shards(directory: Path) -> list[Path]:
    """The shards in `directory`, in order."""
    return sorted(directory.glob("shard-*.safetensors"))


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A shard as safetensors' lazy file of numpy arrays. Raises RecordError if it is damaged, or not of the manifest
    beside it."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if missing := {"digest", "ids", "manifest"} - header.keys():
                raise RecordError(f"{path}: its header has no {', '.join(sorted(missing))}")
            if header["manifest"] != sha256_file(path.parent / MANIFEST):
                raise RecordError(f"{path}: was recorded under another {MANIFEST} than the one beside it")
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: truncated or not a shard of records ({' '.join(str(error).split())})") from None


def tensors_sha256(tensors: dict[str, Array]) -> str:
    """sha256 (hexadecimal) over all tensors' bytes, by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()


class RecordWriter:
    """Adds responses to the directory of a manifest, which may hold some already. One process at a time.

    Raises RecordError if what is there was recorded under another manifest, is damaged, or is being written.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory)
        try:
            self._settle(manifest)
            self.done = self._tasks()
        except BaseException:
            os.close(self._lock)
            raise
        self._next = 1 + max((int(path.stem.removeprefix("shard-")) for path in shards(directory)), default=-1)
        self._waiting: list[Response] = []
        self._bytes = 0
        self._since = time.monotonic()

    def _settle(self, manifest: Manifest) -> None:
        """Write the manifest, or find that it is there already."""
        path = self._directory / MANIFEST
        if path.exists():
            if problem := difference(read_manifest(self._directory), manifest):
                raise RecordError(f"{self._directory} holds records of another recording: {problem}")
        elif shards(self._directory):
            raise RecordError(f"{self._directory} has shards but no {MANIFEST}")
        else:
            write_whole(path, msgspec.json.format(msgspec.json.encode(manifest), indent=1))

    def _tasks(self) -> set[int]:
        """The tasks whose responses are on disk."""
        done: set[int] = set()
        for path in shards(self._directory):
            with open_shard(path) as file:
                done.update(file.get_tensor("tasks").tolist())
        return done

    def add(self, response: Response) -> None:
        """Keep a response; it is on disk at the latest after `SHARD_SECONDS` and the next call, or `close`."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(response)
        self._bytes += response.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard."""
        if not self._waiting:
            return
        tensors = _tensors(self._waiting)
        metadata = {
            "digest": tensors_sha256(tensors),
            "ids": json.dumps([each.prompt_id for each in self._waiting]),
            "manifest": sha256_file(self._directory / MANIFEST),
        }
        write_whole(self._directory / f"shard-{self._next:05d}.safetensors", encode(tensors, metadata))
        self.done.update(each.task for each in self._waiting)
        self._next += 1
        self._waiting, self._bytes = [], 0

    def close(self) -> None:
        """Write what waits and let others write."""
        try:
            self.flush()
        finally:
            os.close(self._lock)


def _tensors(responses: list[Response]) -> dict[str, Array]:
    def column(name: str, kind: Any) -> Array:
        return np.array([getattr(each, name) for each in responses], kind)

    tensors: dict[str, Array] = {
        "topk_ids": np.concatenate([each.topk_ids for each in responses]).astype(np.int32),
        "topk_logprobs": np.concatenate([each.topk_logprobs for each in responses]).astype(np.float16),
        "rest": np.concatenate([each.rest for each in responses]),
        "tokens": np.concatenate([each.tokens for each in responses]).astype(np.int32),
        "token_logprobs": np.concatenate([each.token_logprobs for each in responses]).astype(np.float32),
        "lengths": np.array([len(each.tokens) for each in responses], np.int32),
        "rewards": column("reward", np.float32),
        "tasks": column("task", np.int64),
        "prompts": column("prompt", np.int32),
        "sources": column("source", np.int32),
        "temperatures": column("temperature", np.float32),
    }
    for index in range(len(responses[0].hidden)):
        hidden = np.concatenate([each.hidden[index] for each in responses])
        tensors[f"hidden.{index}"] = hidden.clip(-_HALF, _HALF).astype(np.float16)
    return tensors


def _lock(directory: Path) -> int:
    """Keep other writers out until the descriptor is closed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RecordError(f"{directory}: another process is recording there") from None
    return descriptor


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
