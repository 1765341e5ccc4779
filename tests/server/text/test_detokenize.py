"""Incremental text against the text of all tokens at once; stop strings against a search of the whole
text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from server.text.detokenize import StopStrings, TextStream
from server.text.tokenizer import Tokenizer
from tests.support.api.deployment import END, STOP, byte_tokenizer

BYTES = Tokenizer(byte_tokenizer().to_str())


def spoken(tokenizer: Tokenizer, tokens: list[int], *, prompt: list[int] = [], skip: bool = True) -> list[str]:  # noqa: B006
    stream = TextStream(tokenizer, prompt, skip_special_tokens=skip)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def test_text_comes_back() -> None:
    dice = random.Random(1)
    for _ in range(200):
        text = "".join(dice.choices("aé€😀 \n\u0301\u200d👩", k=dice.randrange(20)))
        assert "".join(spoken(BYTES, list(text.encode()))) == text


def test_any_tokens_give_their_text() -> None:
    """Bytes that are no UTF-8 may be cut differently, but their valid neighbours are all there."""
    dice = random.Random(2)
    for _ in range(500):
        tokens = dice.choices([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF, END], k=dice.randrange(40))
        whole = BYTES.decode(tokens, skip_special_tokens=True)
        assert "".join(spoken(BYTES, tokens)).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_text_comes_as_early_as_it_can() -> None:
    assert spoken(BYTES, list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    stream = TextStream(BYTES, [], skip_special_tokens=True)
    pieces = [stream.push(0xFF) for _ in range(1000)]
    assert len("".join(pieces)) >= 1000 - 16
    assert len(stream._pending) < 16


def test_special_tokens() -> None:
    assert "".join(spoken(BYTES, [97, END, 98, STOP])) == "ab"
    assert "".join(spoken(BYTES, [97, END, 98], skip=False)) == "a<|end|>b"


def test_a_character_that_begins_in_the_prompt() -> None:
    first, *rest = "€".encode()
    assert "".join(spoken(BYTES, [*rest, 97], prompt=[98, first])).endswith("a")


def test_a_sentence_piece_decoder_keeps_the_first_space() -> None:
    core = Core(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(core.to_str())
    assert "".join(spoken(tokenizer, [1, 2], prompt=[0])) == " bc"
    assert "".join(spoken(tokenizer, [0, 1, 2])) == "a bc"
    assert tokenizer.shown(1).text == " b"


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings(seed: int) -> None:
    dice = random.Random(seed)
    pieces = ["".join(dice.choices("ab", k=dice.randrange(6))) for _ in range(8)]
    stops = ["".join(dice.choices("abc", weights=[5, 5, 1], k=dice.randint(1, 6))) for _ in range(dice.randint(1, 4))]
    whole = "".join(pieces)
    scanner = StopStrings(stops, include=False)
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.found is not None:
            break
    ends = {stop: whole.index(stop) + len(stop) for stop in stops if stop in whole}
    if not ends:
        assert scanner.found is None and shown + scanner.flush() == whole
        return
    end = min(ends.values())
    assert scanner.found is not None and ends[scanner.found] == end
    assert shown == whole[: end - len(scanner.found)]


def test_only_text_that_may_become_a_stop_string_is_held() -> None:
    scanner = StopStrings(["END", "\n\n"], include=True)
    assert [scanner.push(text) for text in ("a", "bE", "N", "N", "\n", "x\n", "\ny")] == (
        ["a", "b", "", "ENN", "", "\nx", "\n\n"]
    )
    assert scanner.found == "\n\n"


@pytest.mark.parametrize("token", [0xC3, 0xA9, 65, END])
def test_bytes_of_a_token(token: int) -> None:
    expected = bytes([token]) if token < 256 else b"<|end|>"
    assert BYTES.shown(token).bytes == expected
