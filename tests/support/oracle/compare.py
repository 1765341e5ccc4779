"""Whether a served answer is the oracle's, and if not, whether a near tie explains the first difference."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.oracle.huggingface import Decoded

TIE = 1e-4


@dataclass
class Comparison:
    """`equal` positions; `ties`: (row, position) of first differences within a tie; `wrong`: the other first
    differences."""

    equal: int = 0
    ties: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def compare(served: list[list[int]], decoded: Decoded, tie: float = TIE) -> Comparison:
    """`served[b]` against row b of `decoded`. A row is compared up to its first difference: after it the two have read
    different tokens."""
    result = Comparison()
    for row, tokens in enumerate(served):
        expected = decoded.tokens[row].tolist()
        if len(tokens) != len(expected):
            result.wrong.append(f"row {row}: {len(tokens)} tokens, not {len(expected)}")
        at = first_difference(tokens, expected)
        result.equal += len(expected) if at is None else at
        if at is None:
            continue
        logprobs = decoded.logprobs[row, at]
        gap = float(logprobs[expected[at]] - logprobs[tokens[at]])
        if gap < tie or float(decoded.slack[row, at]) < tie:
            result.ties.append((row, at))
        else:
            result.wrong.append(f"row {row}, position {at}: {tokens[at]}, not {expected[at]} (ahead by {gap:.2g} nats)")
    return result


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first token that differs; None where one list starts with the other."""
    return next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
