"""POST /v1/completions: text and token ids, one and many."""

from __future__ import annotations

import json

import pytest

from tests.support.api.deployment import BOS, CONTEXT, END, VOCABULARY, ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served


async def test_a_string(api: Served) -> None:
    answer = await api.openai.completions.create(model="duo", prompt="Hi<|end|>", max_tokens=5)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "length")
    assert api.fake.submitted[0].prompts == [ids("Hi<|end|>")] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)


async def test_the_default_length_is_sixteen(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: ids("x" * 40))
    assert (await api.complete()).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["a", "bc"], [[97], [98, 99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, END]], [[1], [2, END]]),
    ],
)
async def test_every_form_of_prompt(api: Served, prompt: list[object], prompts: list[list[int]]) -> None:
    answer = (await api.complete(prompt=prompt, n=2, seed=5)).json()
    assert [sequence.prompts[0] for sequence in api.fake.submitted] == [ids for ids in prompts for _ in range(2)]
    assert [sequence.sampling.seed for sequence in api.fake.submitted] == [5, 6] * len(prompts)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


NO_IDS = [[-1], [2**63], [2**70], [VOCABULARY], [[VOCABULARY]], [True], [1.5], [1] * CONTEXT]
MIXED = [[1, "a"], [[1], "a"], [["a"]], ["a", None]]
EMPTY = ["", [], [""], [[]]]


@pytest.mark.parametrize("prompt", [*NO_IDS, *MIXED, *EMPTY, 1, {}, ["a"] * 2000, "x" * 20_000])
async def test_what_is_no_prompt(api: Served, prompt: object) -> None:
    answer = await api.complete(prompt=prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert api.fake.submitted == []


async def test_stream(api: Served) -> None:
    options = {"include_usage": True}
    stream = await api.openai.completions.create(
        model="duo", prompt=["a", "b"], max_tokens=99, stream=True, stream_options=options
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "Hello, world!", 1: "Hello, world!"} and set(reasons.values()) == {"stop"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 28)


async def test_logprobs(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: ids("ab"))
    logprobs = (await api.complete(logprobs=2, expert_weights=True)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "a": -1.0}
    assert logprobs["expert_weights"] == [{"math": 0.75, "text": 0.25}] * 2


async def test_streamed_offsets_go_on(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: ids("abc"), pause=0.01)
    text = (await api.complete(logprobs=0, stream=True)).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert [o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2]


async def test_returned_token_ids(api: Served) -> None:
    choice = (await api.complete(prompt=[7, 8], return_token_ids=True, max_tokens=2)).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([7, 8], ids("He"))


async def test_what_completions_do_not_offer(api: Served) -> None:
    for field in ({"suffix": "x"}, {"best_of": 2}):
        answer = await api.complete(**field)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(field))


def replies(text: str) -> Script:
    """The given tokens, then `text`."""
    return Script(tokens=lambda sequence: [*sequence.given, *ids(text)])


async def test_echo_puts_the_prompt_before_the_answer(api: Served) -> None:
    api.fake.script = replies("!?")
    for prompt in ("Grüße, ", ids("Grüße, ")):
        answer = (await api.complete(prompt=prompt, echo=True, max_tokens=2, stop=["ü"])).json()
        assert answer["choices"][0]["text"] == "Grüße, !?"
        assert answer["choices"][0]["logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 2
    assert all(sequence.given == [] for sequence in api.fake.submitted)


@pytest.mark.parametrize("prompt", ["a<|end|>b<|bos|>", [97, END, 98, BOS]])
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"logprobs": 1}, {"logprobs": 1, "stream": True}])
async def test_echo_shows_the_prompt_as_it_is(api: Served, prompt: object, more: dict[str, object]) -> None:
    """Special tokens are hidden in answers only."""
    api.fake.script = replies("!<|stop|>?")
    text = (await api.complete(prompt=prompt, echo=True, **more)).text
    pieces = [line[6:] for line in text.split("\n\n") if line.startswith("data: {")] if "stream" in more else [text]
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == "a<|end|>b<|bos|>!?"
    if "logprobs" in more:
        assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 7


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_echo_with_logprobs_scores_the_prompt(api: Served, most: int) -> None:
    api.fake.script = replies("xyz")
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0, "min_tokens": most}
    answer = (await api.complete(**body)).json()
    request = api.fake.submitted[0]
    assert request.prompts == [ids("a")] * 2 and request.given == ids("bc")
    assert (request.max_tokens, request.min_tokens, request.top_logprobs) == (2 + most, 2 + most, 1)
    choice, logprobs = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert choice["text"] == "abc" + "xyz"[:most] and choice["finish_reason"] == "length"
    assert logprobs["tokens"] == list("abc" + "xyz"[:most])
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (2 + most)
    assert logprobs["top_logprobs"] == [None] + [{token: -0.5} for token in "bc" + "xyz"[:most]]
    assert logprobs["text_offset"] == list(range(3 + most))
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": most,
        "total_tokens": 3 + most,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_scored_prompts_come_as_a_stream_too(api: Served) -> None:
    api.fake.script = replies("!")
    body = {"prompt": ["ab", "cde"], "echo": True, "logprobs": 0, "max_tokens": 1, "stream": True}
    lines = (await api.complete(**body)).text.split("\n\n")
    texts, values = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in (json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")):
        texts[chunk["index"]] += chunk["text"]
        values[chunk["index"]] += chunk["logprobs"]["token_logprobs"]
    assert texts == {0: "ab!", 1: "cde!"}
    assert values == {0: [None, -0.5, -0.5], 1: [None, -0.5, -0.5, -0.5]}


async def test_prompt_logprobs_come_in_the_form_of_vllm(api: Served) -> None:
    """A sequence beside the answers scores each prompt; the answers are as without."""
    api.fake.script = replies("xy")
    body = {"prompt": ["ab", "cde"], "n": 2, "prompt_logprobs": 2, "max_tokens": 2, "seed": 1}
    answer = (await api.complete(**body)).json()
    assert [(sequence.prompts[0], sequence.given) for sequence in api.fake.submitted] == [
        *[(ids("ab"), [])] * 2,
        *[(ids("cde"), [])] * 2,
        (ids("a"), ids("b")),
        (ids("c"), ids("de")),
    ]
    assert [sequence.top_logprobs for sequence in api.fake.submitted] == [None] * 4 + [2] * 2
    first, _, third, _ = answer["choices"]
    chosen = {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    assert first["prompt_logprobs"] == [None, {"98": chosen, "97": {"logprob": -1, "rank": 2, "decoded_token": "a"}}]
    assert [None if entry is None else list(entry) for entry in third["prompt_logprobs"]] == [
        None,
        ["100", "99"],
        ["101", "100"],
    ]
    assert (first["text"], first["logprobs"]) == ("xy", None)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 8)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 0, "echo": True}),
        ("max_tokens", {"max_tokens": 0, "logprobs": 1}),
        ("echo", {"prompt": "a", "echo": True, "logprobs": 1}),
        ("prompt_logprobs", {"prompt": "a", "prompt_logprobs": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 0, "stream": True}),
        ("echo", {"echo": True, "response_format": {"type": "json_object"}}),
        ("echo", {"echo": "yes"}),
    ],
)
async def test_what_cannot_be_echoed_or_scored(api: Served, param: str, body: dict[str, object]) -> None:
    answer = await api.complete(**body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert api.fake.submitted == []
