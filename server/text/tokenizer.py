"""Text to token ids and back, over one tokenizer.json. Knows nothing of chats, requests or HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from server.errors import StartError

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@dataclass(frozen=True, slots=True)
class TokenText:
    """How one token is shown."""

    text: str
    """Its text alone; U+FFFD for bytes that are only part of a character."""
    bytes: bytes
    """Its exact bytes."""


class Tokenizer:
    """One vocabulary. `source` is the text of tokenizer.json.

    Raises StartError from `load`; nothing else here raises for any text or id.
    """

    def __init__(self, source: str) -> None:
        self.core = tokenizers.Tokenizer.from_str(source)
        self._literal = tokenizers.Tokenizer.from_str(source)
        self._literal.encode_special_tokens = True
        for core in (self.core, self._literal):
            core.no_truncation()
            core.no_padding()
        added = self.core.get_added_tokens_decoder()
        self.special_tokens = sorted((token.content for token in added.values() if token.special), key=len)[::-1]
        self.special_pattern = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        self._byte_level = _has_byte_level(json.loads(source).get("decoder"))
        self._shown: dict[int, TokenText] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise StartError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from None

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token; a text of N characters has at least N / longest_token tokens."""
        return max(len(token) for token in self.core.get_vocab(with_added_tokens=True))

    def encode(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of each text; special tokens written in it are parsed."""
        return _encode(self.core, texts, add_special_tokens)

    def encode_literally(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it stay plain text."""
        return _encode(self._literal, [text], False)[0]

    def encode_parts(self, parts: Iterable[tuple[str, bool]], *, add_special_tokens: bool = False) -> list[int]:
        """Ids of one text in parts; in those marked True, special tokens stay plain text."""
        cores = (self.core, self._literal)
        found = [cores[literal].encode_batch_fast([text], add_special_tokens=False)[0] for text, literal in parts]
        whole = self.core.post_process(tokenizers.Encoding.merge(found, False), None, add_special_tokens)
        return list(whole.ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        # decode_batch releases the interpreter lock, decode does not
        return self.core.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def token(self, number: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self.core.id_to_token(number) or ""

    def shown(self, number: int) -> TokenText:
        """`number` as a client sees it in log-probabilities."""
        if (found := self._shown.get(number)) is None:
            found = self._shown[number] = self._show(number)
        return found

    def _show(self, number: int) -> TokenText:
        token = self.token(number)
        text = self.core.decode([number], skip_special_tokens=False)
        if token.startswith("\u2581") and not text.startswith(" "):  # sentencepiece: the decoder strips it
            text = " " + text
        return TokenText(text, self._bytes(token, text, special=token in self.special_tokens))

    def _bytes(self, token: str, text: str, *, special: bool) -> bytes:
        if not special and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        if self._byte_level and not special:
            values = [_BYTE_OF_SYMBOL.get(symbol) for symbol in token]
            if None not in values:
                return bytes(value for value in values if value is not None)
        return text.encode("utf-8", errors="replace")


def _encode(core: tokenizers.Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Unlike `encode`, this call releases the interpreter lock and keeps no offsets."""
    return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _has_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_has_byte_level, decoder.get("decoders") or []))


def _byte_symbols() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_symbols()
