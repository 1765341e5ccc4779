"""Prompts as token ids, for each expert its own; `math` has no system prompt, `text` has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.errors import BadRequest
from server.text.conversation import Conversation
from server.text.deployment import Deployment, Ensemble
from server.text.prompts import chat_prompts, check_scorable, id_prompts, room, text_prompts
from tests.support.api.deployment import CONTEXT, VOCABULARY, deployment, ids


@pytest.fixture
def both(tmp_path: Path) -> Ensemble:
    return Deployment(deployment(tmp_path)).ensemble("duo")


def conversation(*roles: str, **fields: Any) -> Conversation:
    return Conversation.model_validate({"messages": [{"role": role, "content": role} for role in roles], **fields})


async def test_an_expert_has_a_system_prompt_of_its_own(both: Ensemble) -> None:
    turn = "<|user|>user<|end|><|assistant|>"
    assert await chat_prompts(both, conversation("user")) == [
        ids(f"<|bos|>{turn}"),
        ids(f"<|bos|><|system|>Be brief.<|end|>{turn}"),
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_the_clients_system_prompt_goes_before_it(both: Ensemble, role: str) -> None:
    math, text = await chat_prompts(both, conversation(role, "user"))
    assert math == text == ids(f"<|bos|><|system|>{role}<|end|><|user|>user<|end|><|assistant|>")


async def test_a_final_message_is_continued(both: Ensemble) -> None:
    math, _ = await chat_prompts(both, conversation("user", "assistant", continue_final_message=True))
    assert math == ids("<|bos|><|user|>user<|end|><|assistant|>assistant")


async def test_equal_work_is_done_once(both: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = both.tokenizer.encode, []
    monkeypatch.setattr(both.tokenizer, "encode", lambda texts, **more: calls.append(texts) or encode(texts, **more))
    prompts = await text_prompts(both, ["a", "b"], add_special_tokens=False)
    assert prompts == [[ids("a")] * 2, [ids("b")] * 2] and calls == [["a", "b"]]


def test_room_is_what_the_longest_prompt_leaves(both: Ensemble) -> None:
    assert room(both, [[1] * 5, [1] * 9], "prompt") == CONTEXT - 9
    assert room(both, [[1] * (CONTEXT - 1), [1]], "prompt") == 1
    with pytest.raises(BadRequest, match=f"{CONTEXT} tokens") as refused:
        room(both, [[1], [1] * CONTEXT], "messages")
    assert (refused.value.param, refused.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 1.0, True, "1", None])
def test_ids_are_of_the_vocabulary(both: Ensemble, wrong: Any) -> None:
    assert id_prompts(both, [0, VOCABULARY - 1]) == [[0, VOCABULARY - 1]] * 2
    with pytest.raises(BadRequest, match="token ids must be integers"):
        id_prompts(both, [0, wrong])


def test_scores_need_one_prompt_of_two_tokens(both: Ensemble) -> None:
    check_scorable(both, [[1, 2], [1, 2]], "echo")
    with pytest.raises(BadRequest, match="echo with logprobs: the experts' prompts differ"):
        check_scorable(both, [[1, 2], [1, 3]], "echo")
    with pytest.raises(BadRequest, match="prompt_logprobs: needs a prompt of at least two tokens"):
        check_scorable(both, [[1], [1]], "prompt_logprobs")
