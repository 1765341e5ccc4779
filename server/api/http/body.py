"""From the bytes of a request to a validated model, or a `BadRequest` that names what is wrong."""

from __future__ import annotations

import asyncio
import itertools
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import Request

from server.api.http.errors import UnsupportedMedia
from server.errors import BadRequest
from server.text.conversation import Body
from server.text.json_size import too_much

Model = TypeVar("Model", bound=Body)

_READ_SECONDS = 60.0
_MAX_CONTAINERS = 50_000
_LONG = 100_000  # bytes from which a body is validated outside of the event loop
_MAX_FAULTS = 10
_ECHO = 200

# Fields that OpenAI or vLLM know and a model here does not: the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "ec_transfer_params": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}


async def read(request: Request, model: type[Model]) -> Model:
    """The body of `request` as a `model`."""
    return await validated(request, model, await read_json(request))


async def validated(request: Request, model: type[Model], body: dict[str, Any]) -> Model:
    """`body`, which was read from `request`, as a `model`."""
    if len(await request.body()) > _LONG:
        return await asyncio.to_thread(parse, model, body)
    return parse(model, body)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. NaN, Infinity, numbers out of range and deep nesting are refused."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia("the content type must be application/json")
    try:
        async with asyncio.timeout(_READ_SECONDS):
            raw = await request.body()
    except TimeoutError:
        raise BadRequest("the body did not arrive in time") from None
    if fault := too_much(raw, _MAX_CONTAINERS):
        raise BadRequest(f"the body has {fault}", code="invalid_json")
    await asyncio.sleep(0)  # of a long body each step takes some 20 ms: others get a turn between them
    try:
        body = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    await asyncio.sleep(0)
    return body


def parse(model: type[Model], body: Mapping[str, Any]) -> Model:
    """`body` as a `model`. Raises BadRequest."""
    for name, value in body.items():
        foreign = value is not None and name in _NEUTRAL and name not in model.model_fields
        if foreign and value not in _NEUTRAL[name]:
            raise BadRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _bad_request(error) from None


def _bad_request(error: ValidationError) -> BadRequest:
    faults = error.errors(include_url=False, include_context=False)
    lines = [_line(fault) for fault in faults[:_MAX_FAULTS]]
    if len(faults) > _MAX_FAULTS:
        lines.append(f"and {len(faults) - _MAX_FAULTS} more")
    return BadRequest("; ".join(lines), param=_where(faults[0]["loc"]) or _mentioned(faults[0]["msg"]))


def _line(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    where = _where(fault["loc"])
    if fault["type"] == "missing":
        return f"{where}: is required"
    if fault["type"] == "value_error" and not where:
        return str(message)
    return f"{where}: {message} (got {_echo(fault['input'])})"


def _where(location: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "role") -> messages[0].role"""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step[:64]}" for step in location]
    return "".join(steps).removeprefix(".") or None


def _mentioned(message: str) -> str:
    """Whole-model faults begin with the name of their field."""
    return message.removeprefix("Value error, ").partition(" ")[0]


class _Short(reprlib.Repr):
    """Of a large object, the library would sort all keys."""

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(itertools.islice(value.items(), self.maxdict + 1)), level)


def _echo(value: Any) -> str:
    short = _Short()
    short.maxstring = short.maxother = short.maxlong = _ECHO // 2
    return short.repr(value)[:_ECHO]
