"""What the api process knows of the deployment: each expert's tokenizer, chat template and context, and which
experts a request uses. Loaded once at start; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.api.protocol import Fusion
from server.api.template import ChatTemplate
from server.api.tokenizer import Tokenizer
from server.config import Config, ExpertConfig, policy_problem
from server.errors import BadRequest, NotFound, StartError
from server.model_files import ModelFiles, read_model_files
from server.policy import Policy, Weights, participants


@dataclass(frozen=True, slots=True)
class ExpertText:
    """One expert as text. Experts with equal files share the same `tokenizer` and `template` objects."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    system_prompt: str | None
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The experts that one request uses. `indexes` are their places in the deployment, ascending."""

    model: str
    policy: Policy
    indexes: Sequence[int]
    experts: Sequence[ExpertText]

    @property
    def tokenizer(self) -> Tokenizer:
        """The first one's; all have the same vocabulary."""
        return self.experts[0].tokenizer

    @property
    def max_model_len(self) -> int:
        return min(expert.max_model_len for expert in self.experts)

    @property
    def vocab_size(self) -> int:
        return min(expert.vocab_size for expert in self.experts)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset[int]().union(*(expert.eos_token_ids for expert in self.experts))


class Deployment:
    """The configuration with what its files say."""

    def __init__(self, config: Config) -> None:
        """Reads every expert's files. Raises StartError."""
        self.config = config
        self.models = config.models()
        loader = _Loader(config)
        self.experts = [loader.expert(expert) for expert in config.experts]

    def ensemble(self, model: str | None, fusion: Fusion | None = None) -> Ensemble:
        """The experts for model name `model` (None: the deployment's own). Raises NotFound, BadRequest."""
        name = self.config.name if model is None else model
        if name not in self.models:
            raise NotFound(f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")
        policy = self._policy(self.models[name], fusion)
        indexes = participants(policy, self.config.expert_names)
        return Ensemble(name, policy, indexes, [self.experts[index] for index in indexes])

    def _policy(self, policy: Policy, fusion: Fusion | None) -> Policy:
        if fusion is None:
            return policy
        if fusion.policy is not None:
            if fusion.policy not in self.config.policies:
                offered = ", ".join(self.config.policies)
                raise BadRequest(f"fusion.policy must be one of {offered}", param="fusion.policy")
            return self.config.policies[fusion.policy]
        if fusion.coefficients is None:
            return policy
        policy = Weights(fusion.coefficients, space=fusion.space or "logprob")
        if problem := policy_problem(policy, self.config.expert_names, has_gate=self.config.gate is not None):
            raise BadRequest(f"fusion.coefficients: {problem[:500]}", param="fusion.coefficients")
        return policy

    def temperatures(self, fusion: Fusion | None) -> list[float] | None:
        """One for each expert of the deployment, or None for 1 everywhere."""
        if fusion is None or fusion.temperature is None:
            return None
        names = self.config.expert_names
        if unknown := [name for name in fusion.temperature if name not in names]:
            message = f"fusion.temperature: no expert is named {unknown[0][:64]!r}"
            raise BadRequest(message, param="fusion.temperature")
        return [fusion.temperature.get(name, 1.0) for name in names]


class _Loader:
    """Reads experts; equal files give the same object."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tokenizers: dict[str, Tokenizer] = {}
        self._templates: dict[tuple[str, frozenset[tuple[str, str]]], ChatTemplate] = {}

    def expert(self, expert: ExpertConfig) -> ExpertText:
        files = read_model_files(self._config.path(expert.model), weights=False)
        return ExpertText(
            name=expert.name,
            tokenizer=self._tokenizer(files.tokenizer_path),
            template=self._template(expert, files),
            system_prompt=expert.system_prompt,
            max_model_len=min(expert.max_model_len or files.max_positions, files.max_positions),
            vocab_size=files.vocab_size,
            eos_token_ids=frozenset(files.eos_token_ids),
        )

    def _tokenizer(self, path: Path) -> Tokenizer:
        source = path.read_text(encoding="utf-8")
        if source not in self._tokenizers:
            self._tokenizers[source] = Tokenizer.load(path)
        return self._tokenizers[source]

    def _template(self, expert: ExpertConfig, files: ModelFiles) -> ChatTemplate | None:
        source = files.chat_template
        if expert.chat_template is not None:
            source = _read(self._config.path(expert.chat_template))
        if source is None:
            return None
        key = (source, frozenset(files.special_tokens.items()))
        if key not in self._templates:
            where = f"experts.{expert.name}"
            self._templates[key] = ChatTemplate(source, files.special_tokens, where=where)
        return self._templates[key]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
