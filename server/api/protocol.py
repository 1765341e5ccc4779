"""What a client may send, as pydantic models: strict types, every number in range, unsupported fields refused
by name.

A field set to null counts as absent. Unknown keys are ignored, as OpenAI does; so are user,
metadata, store and service_tier. Knows nothing of the deployment: names, vocabulary and context are checked
where they are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from server.api.fields import INT64_MAX, INT64_MIN, LogitBias, Prompts, Stops, TokenId, by_expert
from server.request import MAX_PRIORITY
from server.text.conversation import Body, Conversation, Function, FunctionName


class StreamOptions(Body):
    include_usage: bool = False
    """One more chunk at the end, with the counts of tokens."""
    continuous_usage_stats: bool = False
    """With `include_usage`: the counts so far in every chunk."""
    include_obfuscation: Literal[False] = False
    """Not supported: only false."""


class FusionOptions(Body):
    """Our own: how this request is fused."""

    model_config = ConfigDict(extra="forbid")

    policy: str | None = Field(None, max_length=64)
    """The name of a policy that the deployment offers."""
    coefficients: Annotated[dict[str, float], by_expert(-1000.0, 1000.0)] | None = None
    """Expert name -> coefficient, -1000 to 1000: a policy of the request's own. Experts not named do not run."""
    space: Literal["logprob", "prob"] | None = None
    """The space in which `coefficients` combine. Default: `logprob`."""
    temperature: Annotated[dict[str, float], by_expert(0.01, 100.0)] | None = None
    """Expert name -> what its own logits are divided by before fusion, 0.01 to 100. Default: 1 for all."""

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            raise ValueError(f"has unknown fields; allowed are {', '.join(cls.model_fields)}")
        return data

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.policy is not None and self.coefficients is not None:
            raise ValueError("policy and coefficients cannot be combined")
        if self.space is not None and self.coefficients is None:
            raise ValueError("space needs coefficients")
        return self


class JsonSchema(Body):
    """`strict` or not, the answer matches the schema."""

    name: str = Field(min_length=1, max_length=256)
    """Any name; for the client's own use."""
    description: str | None = None
    """For the client's own use."""
    definition: dict[str, Any] = Field(alias="schema")
    """The JSON schema."""
    strict: bool | None = None
    """Accepted either way: the answer always matches."""


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    """Free text, any JSON object, or JSON of a schema."""
    json_schema: JsonSchema | None = None
    """The schema, for `json_schema`."""

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is required with type json_schema, and allowed with no other type")
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
    """One of the tools' names."""


class NamedTool(Body):
    type: Literal["function"]
    """Always `function`."""
    function: NamedFunction
    """The function that must be called."""


def _tool_choice(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One fault for all that it might have been."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError('must be "none", "auto", "required" or an object that names a function') from None


class GenerationRequest(Body):
    """What chat and text completions share."""

    model: str | None = Field(None, max_length=256)
    """`NAME`, `NAME:POLICY` or `NAME:EXPERT`, as `/v1/models` lists them. Default: the deployment's name."""
    stream: bool = False
    """Answer as server-sent events, token by token."""
    stream_options: StreamOptions | None = None
    """What a stream says besides tokens; only with `stream`."""
    n: int = Field(1, ge=1, le=16)
    """How many choices are generated for each prompt."""
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    """Makes sampling repeatable: the same text alone, in a batch and after an expert's restart. Default: random."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Of sampling, after fusion; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most probable tokens that together have this probability."""
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    """How many of the most probable tokens are sampled from; 0 and -1: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less probable than this share of the most probable one."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Lowers every token that the answer has already."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Lowers a token for each time that the answer has it already."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Above 1: lowers tokens that the prompt or the answer has already, as in vLLM."""
    logit_bias: LogitBias = Field({})
    """Token id -> what is added to its fused score, -100 to 100; at most 1024 entries."""
    stop: Stops = ()
    """A string, or up to 4, of at most 1024 characters each, that end the answer."""
    stop_token_ids: list[TokenId] = Field([], max_length=128, fail_fast=True)
    """Tokens that end the answer, besides the models' own."""
    include_stop_str_in_output: bool = False
    """Whether the stop string stays in the answer."""
    ignore_eos: bool = False
    """Go on after the models' end tokens."""
    min_tokens: int = Field(0, ge=0, le=INT64_MAX)
    """No end before so many tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    return_token_ids: bool = False
    """Return the ids of the prompt's and the answer's tokens, as vLLM does."""
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probabilities of the prompt's own tokens with so many alternatives, in vLLM's form; not with `stream`."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    """What the answer must be: free text, JSON, or JSON of a schema."""
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower runs earlier; ties in order of arrival."""
    fusion: FusionOptions | None = None
    """How this request is fused, instead of as its model name says."""
    expert_weights: bool = False
    """Return each token's coefficients by expert, and their means."""

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _scores_are_not_streamed(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not available with stream: true")
        return self

    @model_validator(mode="after")
    def _grammar_ends(self) -> Self:
        if self.response_format.constrains and self.ignore_eos:
            raise ValueError("ignore_eos and response_format cannot be combined")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token's log-probabilities have; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int | None:
        """The client's limit of generated tokens; None for what the context leaves."""
        raise NotImplementedError


class ChatRequest(GenerationRequest, Conversation):
    """A conversation to be continued."""

    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, WrapValidator(_tool_choice)] = None
    """Whether tools are called: `none`, `auto`, `required`, or the one that an object names. Default: `auto`
    if there are tools."""
    parallel_tool_calls: bool = True
    """Whether one answer may call several times."""
    logprobs: bool = False
    """Return each token's log-probability under the fused distribution."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """With `logprobs`: how many alternatives come with each token."""
    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    """Longest answer in tokens. Default: what the experts' contexts leave."""
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    """The same, and goes before `max_tokens`."""

    @model_validator(mode="after")
    def _choice_needs_tools(self) -> Self:
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and not self.callable_tools:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not one of the tools")
        if self.forces_call and self.ignore_eos:
            raise ValueError("ignore_eos and a forced tool_choice cannot be combined")
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
    def max_calls(self) -> int | None:
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
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """Text to be continued."""

    prompt: Prompts
    """A string, strings, token ids, or lists of token ids: each prompt has `n` choices."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Return each token's log-probability under the fused distribution, with so many alternatives."""
    max_tokens: int = Field(16, ge=0, le=INT64_MAX)
    """Longest answer in tokens; 0 only with `echo` and `logprobs`."""
    echo: bool = False
    """Return the prompt before the answer; with `logprobs`, its tokens' log-probabilities, too."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens to a prompt of text."""

    @model_validator(mode="after")
    def _has_something_to_say(self) -> Self:
        if not self.max_tokens and not self.scores_prompt:
            raise ValueError("max_tokens may be 0 only with echo and logprobs")
        if self.echo and self.response_format.constrains:
            raise ValueError("echo and response_format cannot be combined")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens get log-probabilities."""
        return self.echo and self.logprobs is not None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens


class TokenizeTextRequest(Body):
    """Text to be turned into token ids."""

    model: str | None = Field(None, max_length=256)
    """As for completions. Default: the deployment's name."""
    prompt: str
    """The text."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens."""
    return_token_strs: bool = False
    """Return the tokens as strings, too."""


class TokenizeChatRequest(Conversation):
    """A conversation to be turned into the token ids of its prompt."""

    model: str | None = Field(None, max_length=256)
    """As for completions. Default: the deployment's name."""
    return_token_strs: bool = False
    """Return the tokens as strings, too."""


class DetokenizeRequest(Body):
    """Token ids to be turned into text."""

    model: str | None = Field(None, max_length=256)
    """As for completions. Default: the deployment's name."""
    tokens: list[TokenId] = Field(fail_fast=True)
    """The ids."""
