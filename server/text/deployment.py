"""The text side of a deployment: each expert's tokenizer, chat template and context, and which experts a model name
uses. Loaded once at start; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.config import Config, ExpertConfig
from server.errors import NotFound, StartError
from server.policy import Policy, participants
from server.text.model_files import ModelFiles, read_model_files
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ExpertText:
    """One expert as text."""

    name: str
    """As in the configuration."""
    tokenizer: Tokenizer
    """The same object for experts with equal files."""
    template: ChatTemplate | None
    """The same object for experts with equal files; None: it takes no chats."""
    system_prompt: str | None
    """Its own, where a conversation has none."""
    max_model_len: int
    """Tokens of its context: prompt and answer together."""
    vocab_size: int
    """Token ids are below it."""
    eos_token_ids: frozenset[int]
    """Tokens that end its answers."""


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The experts that one request uses, and how they are fused."""

    model: str
    """The model name that was asked for."""
    policy: Policy
    """How their distributions are fused."""
    indexes: Sequence[int]
    """The experts' places in the deployment, ascending."""
    experts: Sequence[ExpertText]
    """One for each of `indexes`."""

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

    def policy(self, model: str) -> Policy:
        """What the model name `model` stands for. Raises NotFound."""
        if model not in self.models:
            raise NotFound(f"the model {model[:200]!r} does not exist", param="model", code="model_not_found")
        return self.models[model]

    def ensemble(self, model: str | None, policy: Policy | None = None) -> Ensemble:
        """The experts for model name `model` (None: the deployment's own), fused by `policy` (None: what the name
        stands for). Raises NotFound."""
        name = self.config.name if model is None else model
        policy = self.policy(name) if policy is None else policy
        indexes = participants(policy, self.config.expert_names)
        return Ensemble(name, policy, indexes, [self.experts[index] for index in indexes])


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
