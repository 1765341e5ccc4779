"""A conversation as OpenAI writes it, in request bodies and in prompts files: messages with text parts and tool calls,
and the tools that may be called. Validated and bounded; what templates make of it is `server.text.prompts`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from server.text.json_size import too_deep, too_much

MAX_MESSAGES = 4096
_MAX_CONTAINERS = 50_000  # in the arguments of all calls of a conversation
TEMPLATE_ARGUMENTS = (
    "date_string",
    "enable_thinking",
    "preserve_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
)

Role = Literal["system", "developer", "user", "assistant", "tool"]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


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
        other = f", not {kind[:40]!r}" if isinstance(kind, str) else ""
        raise ValueError(f"only text parts are supported{other}")
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
    calls = [_tool_call(call) for call in value]
    if fault := too_deep(calls):
        raise ValueError(f"calls have {fault}")
    return calls


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


def check_arguments(messages: Any) -> None:
    """Calls' arguments are JSON in strings, which the count of the body's own structure does not see. Raises
    ValueError."""
    texts = [text.encode(errors="replace") for text in _arguments(messages)]
    if fault := too_much(b"\n".join(texts), _MAX_CONTAINERS):
        raise ValueError(f"messages have tool_calls whose arguments have {fault}")


def _arguments(messages: Any) -> Iterator[str]:
    """The arguments in not yet validated messages that are strings."""
    for message in messages if isinstance(messages, list) else ():
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                yield arguments


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    if fault := too_deep(value):
        raise ValueError(f"has {fault}")
    return value


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


Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)]
ToolCalls = Annotated[
    list[dict[str, Any]] | None,
    PlainValidator(_tool_calls, json_schema_input_type=list[dict[str, Any]] | None),
]
Parameters = Annotated[dict[str, Any], AfterValidator(_shallow)]
TemplateArguments = Annotated[
    dict[str, Any], PlainValidator(_template_arguments, json_schema_input_type=dict[str, bool | float | str])
]


class Body(BaseModel):
    """Base of all requests, and of the objects in them. The lines under their fields are what /openapi.json says."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Message(Body):
    role: Role
    """Who speaks. `developer` is shown to the templates as `system`."""
    content: Content = None
    """Text, or a list of text parts, which are joined by newlines. Only an assistant's message may lack it."""
    name: str | None = None
    """Passed on to the chat template."""
    tool_calls: ToolCalls = None
    """The calls that an earlier turn of the assistant made; at most 128."""
    tool_call_id: str | None = None
    """The call that a `tool` message answers; passed on to the chat template."""
    reasoning: str | None = None
    """Passed on to the chat template."""
    reasoning_content: str | None = None
    """Passed on to the chat template."""
    function_call: None = None
    """Not supported: only null."""
    audio: None = None
    """Not supported: only null."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self


class Function(Body):
    """A call's arguments match `parameters`. Where the model decides whether to call, parameters that no grammar can
    describe stand for any object, unless `strict`."""

    name: FunctionName
    """What a call names."""
    description: str | None = None
    """For the model, by way of the chat template."""
    parameters: Parameters | None = None
    """JSON schema of a call's arguments."""
    strict: bool | None = None
    """Refuse parameters that no grammar can describe, rather than let them stand for any object."""


class Tool(Body):
    type: Literal["function"]
    """Always `function`."""
    function: Function
    """The function that may be called."""


class Conversation(Body):
    """What the chat template is given."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    """The conversation so far."""
    tools: list[Tool] = Field([], max_length=128, fail_fast=True)
    """Functions that the model may call."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn. Default: yes, unless `continue_final_message`."""
    continue_final_message: bool = False
    """The last message, the assistant's, is left open, and the answer continues it."""
    add_special_tokens: bool = False
    """Whether the tokenizer adds its own special tokens around what the template wrote."""
    chat_template_kwargs: TemplateArguments = {}
    """Variables for the chat template: `date_string`, `enable_thinking`, `preserve_thinking`, `reasoning_effort`,
    `thinking`, `thinking_budget`; each a boolean, a number or a string of at most 64 characters."""

    @model_validator(mode="before")
    @classmethod
    def _arguments_are_bounded(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            check_arguments(data.get("messages"))
        return data

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if "tools" in self.model_fields_set and not self.tools:
            raise ValueError("tools must not be empty")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt cannot be combined")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a final message with the role assistant")
        return self
