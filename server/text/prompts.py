"""A request's prompt as token ids, once per expert: each has its own chat template and system prompt. Equal
work is done once, long work in a thread, and a prompt that cannot fit is refused before it is tokenised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from server.errors import BadRequest
from server.policy import Perplexity
from server.text.conversation import Conversation, Message
from server.text.deployment import Ensemble, ExpertText
from server.text.template import SpecialTokenEscaper

_LONG = 8192  # characters from which work leaves the event loop
_OVERHEAD = 100  # a message's share of it, whatever its length


class Chat:
    """A conversation to be rendered for one expert after another."""

    def __init__(self, request: Conversation) -> None:
        self.messages = [_conversation(message) for message in request.messages]
        self._request = request
        self._tools = [tool.model_dump(exclude_unset=True) for tool in request.tools]
        self._generation_prompt = request.add_generation_prompt
        if self._generation_prompt is None:
            self._generation_prompt = not request.continue_final_message

    def ids(self, expert: ExpertText) -> list[int]:
        """The prompt for `expert`. Raises BadRequest."""
        if expert.template is None:
            raise BadRequest(f"the expert {expert.name!r} has no chat template", param="model")
        escaper = SpecialTokenEscaper(expert.tokenizer, max_marks=expert.max_model_len)
        messages = [_escaped(message, escaper) for message in self._with_system(expert.system_prompt)]
        if self._request.continue_final_message:
            messages[-1]["content"] += escaper.tail
        rendered = expert.template.render(
            messages,
            add_generation_prompt=self._generation_prompt,
            tools=escaper.escape(self._tools) or None,
            documents=None,
            **escaper.escape(self._request.chat_template_kwargs),
        )
        if self._request.continue_final_message:
            rendered = escaper.cut(rendered)
        check_length(rendered, expert, "messages")
        return escaper.encode(rendered, add_special_tokens=self._request.add_special_tokens)

    def _with_system(self, prompt: str | None) -> list[dict[str, Any]]:
        """The messages, after the expert's own system prompt where the client sends none."""
        if prompt is None or any(message["role"] == "system" for message in self.messages):
            return self.messages
        return [{"role": "system", "content": prompt}, *self.messages]


async def chat_prompts(ensemble: Ensemble, request: Conversation) -> list[list[int]]:
    """The prompt for each expert of `ensemble`."""
    characters = sum(len(message.content or "") + _OVERHEAD for message in request.messages)
    if characters > _LONG or request.tools or any(message.tool_calls for message in request.messages):
        return await asyncio.to_thread(_chat_prompts, ensemble, request)
    return _chat_prompts(ensemble, request)


def _chat_prompts(ensemble: Ensemble, request: Conversation) -> list[list[int]]:
    chat = Chat(request)
    done: dict[tuple[int, int, str | None], list[int]] = {}
    prompts: list[list[int]] = []
    for expert in ensemble.experts:
        key = (id(expert.tokenizer), id(expert.template), expert.system_prompt)
        if key not in done:
            done[key] = chat.ids(expert)
        prompts.append(done[key])
    return prompts


async def text_prompts(ensemble: Ensemble, texts: list[str], *, add_special_tokens: bool) -> list[list[list[int]]]:
    """Raw texts, each for each expert of `ensemble`; special tokens written in them are parsed, as vLLM
    does."""
    if sum(map(len, texts)) > _LONG:
        return await asyncio.to_thread(_text_prompts, ensemble, texts, add_special_tokens)
    return _text_prompts(ensemble, texts, add_special_tokens)


def _text_prompts(ensemble: Ensemble, texts: list[str], add_special_tokens: bool) -> list[list[list[int]]]:
    done: dict[int, list[list[int]]] = {}
    for expert in ensemble.experts:
        check_length(max(texts, key=len), expert, "prompt")
        if id(expert.tokenizer) not in done:
            done[id(expert.tokenizer)] = expert.tokenizer.encode(texts, add_special_tokens=add_special_tokens)
    by_expert = [done[id(expert.tokenizer)] for expert in ensemble.experts]
    return [list(prompt) for prompt in zip(*by_expert, strict=True)]


def id_prompts(ensemble: Ensemble, ids: list[int]) -> list[list[int]]:
    """Token ids, the same for each expert. Raises BadRequest for anything that is not an id of the vocabulary."""
    if len(ids) >= ensemble.max_model_len:
        raise _too_long(f"{len(ids)} tokens", ensemble.max_model_len, "prompt")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= ensemble.vocab_size:
        raise BadRequest(f"prompt: token ids must be integers from 0 to {ensemble.vocab_size - 1}", param="prompt")
    return [ids] * len(ensemble.experts)


def check_length(text: str, expert: ExpertText, param: str) -> None:
    """Refuse a text that has more tokens than the context whatever they are."""
    if len(text) > expert.max_model_len * expert.tokenizer.longest_token:
        raise _too_long(f"{len(text)} characters", expert.max_model_len, param)


def room(ensemble: Ensemble, prompts: Sequence[list[int]], param: str) -> int:
    """Tokens that every expert's context leaves for the answer; at least 1, else BadRequest."""
    left = min(expert.max_model_len - len(ids) for expert, ids in zip(ensemble.experts, prompts, strict=True))
    if left < 1:
        raise _too_long(f"{max(map(len, prompts))} tokens", ensemble.max_model_len, param)
    return left


def check_scorable(ensemble: Ensemble, prompts: Sequence[list[int]], param: str) -> None:
    """A prompt's tokens get log-probabilities one after another: from two on, and the same for all experts."""
    what = "echo with logprobs" if param == "echo" else param
    if isinstance(ensemble.policy, Perplexity):
        raise BadRequest(
            f"{what}: not available with the policy perplexity, which reads the prompt before it weighs", param=param
        )
    if any(own != prompts[0] for own in prompts):
        raise BadRequest(f"{what}: the experts' prompts differ here; ask one expert by its model name", param=param)
    if len(prompts[0]) < 2:
        raise BadRequest(f"{what}: needs a prompt of at least two tokens", param=param)


def _too_long(length: str, context: int, param: str) -> BadRequest:
    message = f"the prompt has {length}; the context of {context} tokens must hold it and at least one more"
    return BadRequest(message, param=param, code="context_length_exceeded")


def _conversation(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content always a string, developer as system, tool arguments as
    objects."""
    shown: dict[str, Any] = {name: value for name, value in message if value is not None}
    if not message.tool_calls:  # templates ask whether there are any by name
        shown.pop("tool_calls", None)
    shown["role"] = "system" if message.role == "developer" else message.role
    shown["content"] = message.content or ""
    return shown


def _escaped(message: dict[str, Any], escaper: SpecialTokenEscaper) -> dict[str, Any]:
    return {key: value if key == "role" else escaper.escape(value) for key, value in message.items()}
