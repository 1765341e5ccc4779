"""What a client may send, as pydantic models: strict types, every number in range, unsupported fields refused
by name.

A field set to null counts as absent. Keys that nobody knows are ignored, as OpenAI does; so are user,
metadata, store and service_tier. Knows nothing of the deployment: names, vocabulary and context are checked
where they are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MOST_STOPS, MOST_STOP_CHARACTERS = 4, 1024
MOST_MESSAGES = 4096
TEMPLATE_ARGUMENTS = (
    "date_string",
    "enable_thinking",
    "preserve_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
)

Role = Literal["system", "developer", "user", "assistant", "tool"]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]


def _stops(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MOST_STOPS:
        raise ValueError(f"at most {MOST_STOPS} strings")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MOST_STOP_CHARACTERS:
            raise ValueError(f"must be strings of 1 to {MOST_STOP_CHARACTERS} characters")
    return tuple(strings)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > 1024:
        raise ValueError("at most 1024 entries")
    return {_token_id(key): _number(bias, -100.0, 100.0) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 19):
        raise ValueError("keys must be token ids")
    return int(key)


def _number(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"values must be numbers from {low:g} to {high:g}")
    return float(value)


def _by_expert(low: float, high: float) -> PlainValidator:
    """An object of expert names and numbers."""

    def validate(value: Any) -> dict[str, float]:
        if not isinstance(value, dict) or not 0 < len(value) <= 64:
            raise ValueError("must be an object of 1 to 64 expert names and numbers")
        return {name: _number(number, low, high) for name, number in value.items()}

    return PlainValidator(validate, json_schema_input_type=dict[str, float])


def _content(value: Any) -> str | None:
    """Text, or a list of text parts: one string."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(map(_part, value))


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise ValueError("parts must be objects")
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise ValueError(f"only text parts are supported, not {str(kind)[:40]!r}")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError("a text part needs a string in 'text'")
    return text


def _tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """An earlier turn's calls, with the arguments as objects: templates write them in their own format."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > 128:
        raise ValueError("must be a list of at most 128 calls")
    return [_tool_call(call) for call in value]


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call needs a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):
            raise ValueError("arguments are not valid JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _template_arguments(value: Any) -> dict[str, Any]:
    """A few names, plain values: the deployment's templates read nothing else of a client."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    for name, argument in value.items():
        if name not in TEMPLATE_ARGUMENTS:
            raise ValueError(f"{name[:64]!r} is not allowed; allowed are {', '.join(TEMPLATE_ARGUMENTS)}")
        if not isinstance(argument, bool | int | float) and not (isinstance(argument, str) and len(argument) <= 64):
            raise ValueError(f"{name} must be a boolean, a number or a short string")
    return value


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A string, strings, token ids or lists of them: always a list of one kind. Ids are checked later."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(value):
        raise ValueError("must be a non-empty string, or a list of strings, token ids or lists of token ids")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if kinds == {str} or kinds == {list}:
        return value
    raise ValueError("must be all strings, all token ids or all lists of token ids")


Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)]
ToolCalls = Annotated[
    list[dict[str, Any]] | None,
    PlainValidator(_tool_calls, json_schema_input_type=list[dict[str, Any]] | None),
]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str])]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])]


TemplateArguments = Annotated[
    dict[str, Any], PlainValidator(_template_arguments, json_schema_input_type=dict[str, bool | float | str])
]


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Message(Body):
    role: Role
    content: Content = None
    name: str | None = None
    tool_calls: ToolCalls = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Fusion(Body):
    """Our own: how this request is fused. `policy` is the name of an offered one; `coefficients` makes one,
    in `space`; `temperature` divides the logits of single experts before fusion."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    policy: str | None = Field(None, max_length=64)
    coefficients: Annotated[dict[str, float], _by_expert(-1000.0, 1000.0)] | None = None
    space: Literal["logprob", "prob"] | None = None
    temperature: Annotated[dict[str, float], _by_expert(0.01, 100.0)] | None = None

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.policy is not None and self.coefficients is not None:
            raise ValueError("policy and coefficients exclude each other")
        if self.space is not None and self.coefficients is None:
            raise ValueError("space needs coefficients")
        return self


class GenerationRequest(Body):
    """What chat and text completions share."""

    model: str | None = Field(None, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: LogitBias = {}
    stop: Stops = ()
    stop_token_ids: list[TokenId] = Field([], max_length=128, fail_fast=True)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=INT64_MAX)
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    priority: int = Field(0, ge=INT64_MIN, le=INT64_MAX)
    fusion: Fusion | None = None
    expert_weights: bool = False

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token's log-probabilities have; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The client's limit of generated tokens; None for what the context leaves."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateArguments = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int = Field(16, ge=1, le=INT64_MAX)
    add_special_tokens: bool = True

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


class TokenizeTextRequest(Body):
    model: str | None = Field(None, max_length=256)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Body):
    model: str | None = Field(None, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateArguments = {}
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=256)
    tokens: list[TokenId] = Field(fail_fast=True)
