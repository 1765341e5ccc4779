"""Grammars for vLLM's scheduler, run by llguidance: which tokens may follow, for the logits of every row.

vLLM has a back end for llguidance too. This one differs in what lockstep needs: it reads tokenizer.json itself, so the
engine starts without a tokenizer; every expert marks the end of a text with the same ids, so that masks are equal; a
sequence that comes back is advanced over what it had generated; and a grammar that fails never fails the engine.

Compiling takes a millisecond, hundreds for the largest that the api lets through; regular expressions are derivatives
with limits, so no pattern makes a step slow for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.torch import fill_next_token_bitmask
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar

_COMPILED = 64
"""Grammars kept compiled: the choices of a request, and sequences that come back, compile nothing."""


class Grammar(StructuredOutputGrammar):
    """One sequence's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why this grammar cannot be followed any further; empty while it can."""
        return self._matcher.get_error()

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Always true, so that vLLM leaves the sequence to the coordinator. What the grammar refuses is the stand-in of
        a row that was not decided: that sequence leaves before its next row."""
        if self._matcher.validate_tokens(tokens) == len(tokens):
            self._matcher.consume_tokens(tokens)
        return True

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """`bitmask` int32[B, V / 32]; nothing is allowed once the grammar has failed."""
        fill_next_token_bitmask(self._matcher, bitmask, batch_index)
        if self._matcher.is_error():
            bitmask[batch_index] = 0

    def is_terminated(self) -> bool:
        """Never: after its end a text has nothing but end tokens left."""
        return False

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens[: self._matcher.validate_tokens(tokens)]

    def rollback(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)

    def reset(self) -> None:
        self._matcher.reset()


class GrammarBackend(StructuredOutputBackend):
    """Compiles grammars for one vocabulary. `tokenizer`: a tokenizer.json; `end_tokens`: any of them ends a text.

    The tokenizer is read at the first grammar.
    """

    def __init__(self, tokenizer: Path, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self._path = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = list(end_tokens)
        self._compiled = lru_cache(_COMPILED)(self._compile)

    def compile_grammar(self, request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None) -> Grammar:
        """A fresh grammar; one that is wrong has an `error`. Raises ValueError if llguidance cannot read the
        tokenizer."""
        return Grammar(self._compiled(grammar_spec).deep_copy())

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        return torch.full((max_num_seqs, -(-self._vocabulary // 32)), -1, dtype=torch.int32)

    def destroy(self) -> None:
        self._compiled.cache_clear()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(str(self._path), n_vocab=self._vocabulary, eos_token=self._end_tokens)

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0)
