"""The policies in use, as numbers."""

from __future__ import annotations

import numpy as np

from server.coordinator.arrays import Bool, Int32
from server.policy import Policy, needs_gate


class PolicyBook:
    """Numbers the policies in use, so that rows of one policy can be found in an array."""

    def __init__(self) -> None:
        self._number: dict[Policy, int] = {}
        self._policy: dict[int, Policy] = {}
        self._users: dict[int, int] = {}
        self._next = 0

    def acquire(self, policy: Policy) -> int:
        """The number of `policy`, for one more sequence."""
        if (number := self._number.get(policy)) is None:
            number = self._number[policy] = self._next
            self._policy[number] = policy
            self._users[number] = 0
            self._next += 1
        self._users[number] += 1
        return number

    def release(self, number: int) -> None:
        """One sequence less; a policy without any is forgotten."""
        self._users[number] -= 1
        if not self._users[number]:
            del self._number[self._policy.pop(number)], self._users[number]

    def present(self, numbers: Int32) -> list[tuple[int, Policy]]:
        """The policies among `numbers`."""
        return [(number, self._policy[number]) for number in set(numbers.tolist())]

    def gated(self, numbers: Int32) -> Bool:
        """bool[B]: which of `numbers` [B] are policies that ask the gate."""
        return np.isin(numbers, [number for number, policy in self.present(numbers) if needs_gate(policy)])
