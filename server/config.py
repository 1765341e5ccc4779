"""The deployment's configuration: one YAML file, read into frozen structs. Unknown keys are errors that name the
nearest known key, or what became of one that older files have. Knows nothing of engines; `server.launch.check` looks at
the files that a configuration names.

Relative paths are relative to the configuration file.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from server.errors import ConfigError
from server.policy import Contrastive, Gate, Policy, Single, Uniform, Weights, expert_names, needs_gate, range_problem

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]

_ADDRESS = re.compile(r"^(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)\s*$")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


NOT_ENGINE_ARGS = {
    "async_scheduling",
    "data_parallel_size",
    "disable_log_stats",
    "distributed_executor_backend",
    "dtype",
    "enable_batch_sharded_sampling",
    "enable_chunked_prefill",
    "kv_cache_memory_bytes",
    "logits_processors",
    "logprobs_mode",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "model",
    "pipeline_parallel_size",
    "scheduling_policy",
    "skip_tokenizer_init",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "speculative_config",
    "tensor_parallel_size",
    "use_tqdm_on_load",
}
"""What `engine_args` may not set: it has a key of its own, or the rendezvous depends on it."""

_REMOVED = {
    "top_k": "experts list `list_length` log-probabilities of each token, of which a gate reads as many as its "
    "checkpoint says; delete the key, or rename it",
    "missing": "an expert is always asked for what the lists do not settle, within `tolerance`; delete the key",
}
"""Keys that older files have -> what became of them and what to do."""


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: frozen, and strict about keys."""


class ExpertConfig(_Struct, frozen=True):
    """One expert: a vLLM engine in a process of its own."""

    name: Name
    """Its name: how clients, policies, metrics and logs call it."""
    model: str
    """A directory in Hugging Face format."""
    address: str | None = None
    """`host:port` where `polylogit expert` runs it on another host; its cores and GPUs are that host's then."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where its engine runs."""
    cpus: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """The cores of a CPU expert. Default: its share of this process's cores, in turn."""
    gpus: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """Indexes of its GPUs, `tensor_parallel_size` of them. Default: the next free ones."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of its weights and activations, as in vLLM; `auto` takes the checkpoint's."""
    kv_cache_memory: str | None = None
    """Memory for its KV cache, as `64MiB` or `20GiB`. Default: vLLM decides."""
    max_model_len: Positive | None = None
    """Its context in tokens, as in vLLM. Default: the model's."""
    max_num_batched_tokens: Positive | None = None
    """Tokens that one engine step may process, as in vLLM. Default: vLLM's."""
    tensor_parallel_size: Positive = 1
    """Over how many GPUs its weights are split, as in vLLM."""
    chat_template: str | None = None
    """A Jinja file used instead of the model's own chat template."""
    system_prompt: str | None = None
    """Put before the conversation, for this expert only, where the client sends no system message."""
    engine_args: dict[str, Any] = {}
    """Further vLLM EngineArgs by name, passed on as they are. What has a key of its own, and what the lockstep
    depends on, is refused."""

    @property
    def host(self) -> str | None:
        """The other host that it runs on; None for the one that `polylogit serve` runs on."""
        return None if self.address is None else parse_address(self.address)[0]


class GateConfig(_Struct, frozen=True):
    """The gate checkpoint."""

    file: str
    """The TorchScript checkpoint that `polylogit train` writes."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    """Its digest; another file is refused. A checkpoint is code: pin it."""
    on_failure: Literal["uniform", "fail"] = "uniform"
    """What happens to a token for which the gate raises or returns nonsense: all experts weigh alike, or the request
    fails."""


class Limits(_Struct, frozen=True):
    """What the deployment takes on, and how long it waits."""

    sequences: Positive = 64
    """Sequences that run at once. A request with `n` choices has `n` of them."""
    queue: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Sequences that wait beyond those; more are answered with 503."""
    kv_watermark: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    """Share of each engine's KV cache that is kept free when a sequence is admitted beside others."""
    tick_seconds: Seconds = 60.0
    """How long an engine may take for a step before it is taken for hung, and replaced."""
    start_seconds: Seconds = 600.0
    """How long loading the experts may take."""
    grace_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """How long running requests may go on after SIGTERM."""
    restarts_per_hour: Annotated[int, msgspec.Meta(ge=0)] = 10
    """How often one expert's process is replaced within an hour before the deployment gives up."""
    body_bytes: Positive = 4_000_000
    """The longest HTTP body; a longer one is answered with 413."""
    key_requests: Positive | None = None
    """Requests that one API key may have running; more are answered with 429. Default: no limit."""
    key_requests_per_minute: Positive | None = None
    """Requests that one API key may start a minute; more are answered with 429. Default: no limit."""


class HttpConfig(_Struct, frozen=True):
    """Where clients reach the API, and who may."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    """The port to listen on; 0 takes a free one."""
    api_keys_file: str | None = None
    """A file with one API key a line; the environment's `POLYLOGIT_API_KEYS` (comma-separated) adds to it. Without any
    key, everybody who reaches the port may ask."""
    cors_origins: list[str] = []
    """Origins of web pages that may ask, as `https://example.org`; none: no CORS headers."""
    keepalive_seconds: Seconds = 15.0
    """How often a stream that has nothing to say sends a comment, so that proxies keep it open."""
    write_seconds: Seconds = 60.0
    """How long an answer may wait for a client that does not read, before it is cut off."""


class LoggingConfig(_Struct, frozen=True):
    """What the processes write to stderr. Libraries' lines below `warning` are never shown."""

    format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least serious lines that are written."""


class TracingConfig(_Struct, frozen=True):
    """OpenTelemetry traces."""

    endpoint: Annotated[str, msgspec.Meta(pattern="^https?://")] | None = None
    """Where spans go, by OTLP over HTTP: `http://collector:4318`. Without it `OTEL_EXPORTER_OTLP_ENDPOINT` (or
    `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) says where; without both nothing is traced."""


class Config(_Struct, frozen=True):
    """A deployment."""

    name: Name
    """The model name that clients ask for."""
    experts: Annotated[list[ExpertConfig], msgspec.Meta(min_length=1, max_length=64)]
    """The models that are fused. All need one vocabulary, token by token."""
    policies: dict[Name, Policy] = msgspec.field(default_factory=lambda: {"uniform": Uniform()})
    """How experts may be fused: name -> policy, offered to clients as the model `NAME:POLICY`."""
    default_policy: str = "uniform"
    """The policy that answers for the deployment's own name."""
    list_length: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 128
    """Log-probabilities that each expert lists of each token; where they do not settle a token, the expert is asked for
    the whole row."""
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-3
    """How far a reported log-probability may be from that of the fused distribution, in nats."""
    gate: GateConfig | None = None
    """The learned gate, for the policies that ask one."""
    on_expert_loss: Literal["wait", "degrade", "fail"] = "wait"
    """Running sequences wait for the restart of a lost expert (`wait`), go on without it (`degrade`), or fail."""
    tool_parser: Literal["hermes"] | None = None
    """The format in which the chat templates have the models call tools (`hermes`: Hermes, Qwen). Needed where a client
    leaves the choice to the model (`tool_choice: auto`)."""
    example_prompt: str = "Hello!"
    """What the curl line printed at start asks; the playground offers it first."""
    examples: list[str] = []
    """More prompts that the playground offers."""
    cluster_key_file: str | None = None
    """The secret that the hosts share if experts have an `address`; else the environment's `POLYLOGIT_CLUSTER_KEY`."""
    limits: Limits = Limits()
    """What the deployment takes on, and how long it waits."""
    http: HttpConfig = HttpConfig()
    """Where clients reach the API, and who may."""
    logging: LoggingConfig = LoggingConfig()
    """What the processes write to stderr."""
    tracing: TracingConfig = TracingConfig()
    """OpenTelemetry traces."""
    directory: str = "."
    """Where the file lies: relative paths start there. Not a key of the file."""

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    def path(self, relative: str) -> Path:
        """`relative` as written in the file -> a path from here."""
        return Path(self.directory) / relative

    def models(self) -> dict[str, Policy]:
        """Model name a client may ask for -> policy. The deployment's own name comes first."""
        models: dict[str, Policy] = {self.name: self.policies[self.default_policy]}
        models |= {f"{self.name}:{name}": policy for name, policy in self.policies.items()}
        models |= {f"{self.name}:{name}": Single(name) for name in self.expert_names}
        return models


def parse_size(text: str) -> int:
    """ "64MiB" -> bytes. Raises ConfigError."""
    if not (match := _SIZE.match(text)):
        raise ConfigError(f"{text!r} is not a size such as 512MiB or 20GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_address(text: str) -> tuple[str, int]:
    """ "host:port" or "[IPv6]:port" -> (host, port). Raises ConfigError."""
    if not (match := _ADDRESS.match(text)) or int(match[3]) > 65535:
        raise ConfigError(f"{text!r} is not an address such as 10.0.0.2:8100")
    return match[1] or match[2], int(match[3])


def load_config(path: Path) -> Config:
    """Read and validate the YAML file at `path`. Raises ConfigError with one line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys")
    return parse_config(data, directory=path.resolve().parent, source=str(path))


def parse_config(data: dict[str, Any], *, directory: Path, source: str = "configuration") -> Config:
    """A parsed YAML mapping -> Config. Raises ConfigError naming the key and, for an unknown one, the nearest."""
    if unknown := _unknown_key(data, Config, ""):
        raise ConfigError(f"{source}: {unknown}")
    if "directory" in data:
        raise ConfigError(f"{source}: unknown key 'directory'")
    data = {**data, "policies": _with_rules(data.get("policies", {"uniform": {}}))}
    try:
        config = msgspec.convert({**data, "directory": str(directory)}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from None
    if problem := _contradiction(config):
        raise ConfigError(f"{source}: {problem}")
    return config


def with_gate(config: Config, file: Path) -> Config:
    """`config` with the checkpoint `file`, a path from here, in place of its own, not pinned. A deployment that had no
    gate offers the policy `gate` now."""
    given = msgspec.structs.replace(config.gate or GateConfig(""), file=str(file.resolve()), sha256=None)
    return msgspec.structs.replace(config, gate=given, policies={"gate": Gate(), **config.policies})


def _with_rules(policies: object) -> object:
    """`uniform: {}` is short for `uniform: {rule: uniform}`."""
    if not isinstance(policies, dict):
        return policies
    return {
        name: {"rule": name, **(value or {})} if isinstance(value, dict | None) else value
        for name, value in policies.items()
    }


def _contradiction(config: Config) -> str | None:
    """The first thing that no single key shows to be wrong, or None."""
    names = config.expert_names
    for name in names:
        if names.count(name) > 1:
            return f"experts: two are named {name!r}"
        if name in config.policies:
            return f"policies: {name!r} is also the name of an expert"
    if config.default_policy not in config.policies:
        return f"default_policy: {config.default_policy!r} is not one of {', '.join(config.policies)}"
    for name, policy in config.policies.items():
        if problem := policy_problem(policy, names, has_gate=config.gate is not None):
            return f"policies.{name}: {problem}"
    if problem := next((problem for expert in config.experts if (problem := _expert_problem(expert))), None):
        return problem
    return _address_problem(config)


def policy_problem(policy: Policy, experts: list[str], *, has_gate: bool) -> str | None:
    """Why `policy` cannot run over `experts`, or None. Also used for a policy that a request brings."""
    if unknown := [name for name in expert_names(policy) if name not in experts]:
        return f"no expert is named {unknown[0]!r} (there are {', '.join(experts)})"
    if needs_gate(policy) and not has_gate:
        return "needs a gate, and none is configured"
    if problem := range_problem(policy):
        return problem
    if isinstance(policy, Weights):
        if not any(policy.weights.values()):
            return "weights: at least one must not be 0"
        if policy.space == "prob" and min(policy.weights.values()) < 0:
            return "weights: must not be negative in space prob"
    if isinstance(policy, Contrastive) and policy.expert == policy.amateur:
        return "expert and amateur must differ"
    if isinstance(policy, Gate) and len(experts) < 2:
        return "a gate needs at least two experts"
    return None


def _address_problem(config: Config) -> str | None:
    taken: dict[str, str] = {}
    for expert in config.experts:
        if expert.address is None:
            continue
        if not (match := _ADDRESS.match(expert.address)) or not 0 < int(match[3]) < 65536:
            return f"experts.{expert.name}.address: {expert.address!r} is not an address such as 10.0.0.2:8100"
        if (other := taken.setdefault(expert.address, expert.name)) != expert.name:
            return f"experts.{expert.name}.address: {expert.address} is also expert {other}'s"
    return None


def _expert_problem(expert: ExpertConfig) -> str | None:
    where = f"experts.{expert.name}"
    if expert.device == "cpu" and expert.gpus is not None:
        return f"{where}.gpus: device is cpu"
    if expert.device == "cuda" and expert.cpus is not None:
        return f"{where}.cpus: device is cuda"
    if expert.gpus is not None and len(expert.gpus) != expert.tensor_parallel_size:
        return f"{where}.gpus: {len(expert.gpus)} given, tensor_parallel_size is {expert.tensor_parallel_size}"
    if taken := sorted(NOT_ENGINE_ARGS.intersection(expert.engine_args)):
        return f"{where}.engine_args: {taken[0]!r} is not free: it has a key of its own or the rendezvous depends on it"
    if expert.kv_cache_memory is not None and not _SIZE.match(expert.kv_cache_memory):
        return f"{where}.kv_cache_memory: {expert.kv_cache_memory!r} is not a size such as 512MiB or 20GiB"
    return None


def _unknown_key(data: object, kind: Any, where: str) -> str | None:
    """The first key of `data` that `kind` does not have, with the nearest one it has."""
    if origin := typing.get_origin(kind):
        return _unknown_in_container(data, origin, typing.get_args(kind), where)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(data, dict)):
        return None
    fields = typing.get_type_hints(kind, include_extras=True)
    known = [field for field in kind.__struct_fields__ if (kind, field) != (Config, "directory")]
    for key, value in data.items():
        if kind is Config and key in _REMOVED:
            return f"there is no key {key!r} any more: {_REMOVED[key]}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            return f"unknown key {f'{where}{key}'!r}; {hint}"
        if problem := _unknown_key(value, fields[key], f"{where}{key}."):
            return problem
    return None


def _unknown_in_container(data: object, origin: Any, arguments: tuple[Any, ...], where: str) -> str | None:
    """`_unknown_key` for lists, optional values and Annotated; policies are tagged, msgspec checks their keys."""
    if origin is Annotated:
        return _unknown_key(data, arguments[0], where)
    if origin is list and isinstance(data, list):
        found = (_unknown_key(item, arguments[0], f"{where}{index}.") for index, item in enumerate(data))
        return next((problem for problem in found if problem), None)
    if origin is types.UnionType:
        return next((problem for kind in arguments if (problem := _unknown_key(data, kind, where))), None)
    return None
