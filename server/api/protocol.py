"""What a client may send, as pydantic models: strict types, every number in range, unsupported fields refused
by name.

A field set to null counts as absent. Keys that nobody knows are ignored, as OpenAI does; so are user,
metadata, store and service_tier. Knows nothing of the deployment: names, vocabulary and context are checked
where they are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from server.api.fields import INT64_MAX, INT64_MIN, LogitBias, Prompts, Stops, TokenId, by_expert
from server.request import MOST_PRIORITY
from server.text.conversation import Body, Conversation, Function, FunctionName


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class FusionOptions(Body):
    """Our own: how this request is fused. `policy` is the name of an offered one; `coefficients` makes one,
    in `space`; `temperature` divides the logits of single experts before fusion."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    policy: str | None = Field(None, max_length=64)
    coefficients: Annotated[dict[str, float], by_expert(-1000.0, 1000.0)] | None = None
    space: Literal["logprob", "prob"] | None = None
    temperature: Annotated[dict[str, float], by_expert(0.01, 100.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            raise ValueError(f"knows {', '.join(cls.model_fields)}, and nothing else")
        return data

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.policy is not None and self.coefficients is not None:
            raise ValueError("policy and coefficients exclude each other")
        if self.space is not None and self.coefficients is None:
            raise ValueError("space needs coefficients")
        return self


class JsonSchema(Body):
    """`strict` or not, the answer matches the schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and to no other")
        return self

    @property
    def constrains(self) -> bool:
        return self.type != "text"

    @property
    def definition(self) -> dict[str, Any] | None:
        """The schema; None for any object."""
        return None if self.json_schema is None else self.json_schema.definition


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One fault for all that it might have been."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError('must be "none", "auto", "required" or an object that names a function') from None


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
    logit_bias: LogitBias = Field({})
    stop: Stops = ()
    stop_token_ids: list[TokenId] = Field([], max_length=128, fail_fast=True)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=INT64_MAX)
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    priority: int = Field(0, ge=-MOST_PRIORITY, le=MOST_PRIORITY)
    fusion: FusionOptions | None = None
    expert_weights: bool = False

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _scores_are_no_stream(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not available with stream: true")
        return self

    @model_validator(mode="after")
    def _grammar_ends(self) -> Self:
        if self.response_format.constrains and self.ignore_eos:
            raise ValueError("ignore_eos and response_format exclude each other")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token's log-probabilities have; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The client's limit of generated tokens; None for what the context leaves."""
        raise NotImplementedError


class ChatRequest(GenerationRequest, Conversation):
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, WrapValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)

    @model_validator(mode="after")
    def _choice_needs_tools(self) -> Self:
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and not self.callable_tools:
            raise ValueError(f"tool_choice names no tool: {self.tool_choice.function.name!r}")
        if self.forces_call and self.ignore_eos:
            raise ValueError("ignore_eos and a forced tool_choice exclude each other")
        return self

    @property
    def callable_tools(self) -> list[Function]:
        """What the answer may call."""
        functions = [tool.function for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else functions

    @property
    def names_call(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or self.names_call

    @property
    def most_calls(self) -> int | None:
        return None if self.parallel_tool_calls and not self.names_call else 1

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
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
    max_tokens: int = Field(16, ge=0, le=INT64_MAX)
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _has_something_to_say(self) -> Self:
        if not self.max_tokens and not self.scores_prompt:
            raise ValueError("max_tokens may be 0 only with echo and logprobs")
        if self.echo and self.response_format.constrains:
            raise ValueError("echo and response_format exclude each other")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens get log-probabilities."""
        return self.echo and self.logprobs is not None

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


class TokenizeChatRequest(Conversation):
    model: str | None = Field(None, max_length=256)
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=256)
    tokens: list[TokenId] = Field(fail_fast=True)
