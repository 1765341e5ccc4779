"""Trains a gate on recorded responses by DLLG's objective. Knows nothing of files, of the command line or the server.

Held-out prompts decide which weights are kept and when to stop; what is in between can be resumed (`FitProgress`).
"""

import copy
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gate.checkpoint import Checkpoint
from gate.contract import Contract
from gate.errors import GateError
from gate.model import GateModel
from gate.training.curves import Point
from gate.training.dataset import Records
from gate.training.objective import broadcast_loss, token_logprobs

RIGHT = 0.5
"""A response with at least this reward counts as right where it must be one or the other."""
_VALIDATION_BATCH = 512


class TrainingError(GateError):
    """Nothing can be learned from these responses."""


def finite(value: float, what: str) -> float:
    """`value`. Raises TrainingError if it is not finite: then some weights are not either, or some records."""
    if not math.isfinite(value):
        raise TrainingError(f"{what} is {value}: lower the learning rate, or look for such numbers in the records")
    return value


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Settings of the first phase, on recorded responses."""

    updates: int = 1000
    """At most."""
    batch_size: int = 128
    """Responses an update."""
    learning_rate: float = 3e-3
    """At the start; it falls linearly to zero over `updates`."""
    negative_weight: float = 0.02
    """Of the tokens of wrong responses, where those of right ones have 1."""
    interval: int = 50
    """Updates between measurements on held-out prompts."""
    patience: int = 6
    """Measurements in a row that brought nothing better, after which it ends."""


@dataclass(slots=True)
class FitProgress:
    """Where a training is: all that is needed to go on."""

    phase: str = "broadcast"
    """"broadcast" (recorded responses), then perhaps "refine" (the gate's own samples)."""
    step: int = 0
    """Updates, or steps, of the phase that are done."""
    score: float = float("-inf")
    """The best measurement of the phase; higher is better."""
    since: int = 0
    """Measurements since the best one."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """Weights with which the phase began; empty in the first."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best measurement."""
    model: dict[str, Tensor] = field(default_factory=dict)
    """Weights at `step`; empty before the first measurement of the phase."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The optimiser's state at `step`."""
    points: list[Point] = field(default_factory=list)
    """All that was measured, of all phases."""

    def measure(self, model: GateModel, score: float) -> None:
        """Keep the weights if none were better so far."""
        self.since = 0 if score > self.score else self.since + 1
        if score >= self.score:
            self.score = score
            self.best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def keep(self, model: GateModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Note where the phase is."""
        self.step = step
        self.model = copy.deepcopy(model.state_dict())
        self.optimizer = copy.deepcopy(optimizer.state_dict())

    def resume(self, model: GateModel, optimizer: torch.optim.Optimizer) -> bool:
        """Put both where the phase was interrupted; False where it has only begun."""
        if not self.model:
            return False
        model.load_state_dict(self.model)
        optimizer.load_state_dict(self.optimizer)
        return True

    def enter(self, phase: str, model: GateModel) -> None:
        """Begin the next phase with the weights of `model`."""
        self.start = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        self.phase, self.step, self.score, self.since = phase, 0, float("-inf"), 0
        self.best, self.model, self.optimizer = {}, {}, {}


def held_out(prompt: str, seed: int, share: float) -> bool:
    """Whether a prompt is for validation: a function of its id and the seed."""
    point = hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8]
    return int.from_bytes(point) < share * 2**64


def split(records: Records, *, seed: int, share: float, limit: int | None) -> tuple[Tensor, Tensor]:
    """(responses to train on, responses to validate on), of `limit` chosen at random if given; no prompt is in both.

    Raises TrainingError if there is no right or no wrong response to train on.
    """
    order = torch.randperm(len(records.rewards), generator=torch.Generator().manual_seed(seed))
    if limit is not None and limit > len(order):
        raise TrainingError(f"{limit} responses are wanted, the records have {len(order)}")
    chosen = order[:limit]
    held = torch.tensor([held_out(records.prompts[number], seed, share) for number in chosen.tolist()])
    training = chosen[~held]
    for name, there in (("right", records.rewards[training] >= RIGHT), ("wrong", records.rewards[training] < RIGHT)):
        if not there.any():
            raise TrainingError(f"none of the {len(training)} responses to train on is {name}: nothing to learn from")
    return training, chosen[held]


def fit(
    model: GateModel,
    contract: Contract,
    records: Records,
    parts: tuple[Tensor, Tensor],
    settings: Broadcast,
    progress: FitProgress,
    *,
    seed: int,
    report: Callable[[FitProgress], None],
) -> None:
    """Trains `model` in place, from where `progress` is; the best weights on held-out prompts are kept, the last ones
    without any. `report` is called after each measurement."""
    training, validation = parts
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    progress.resume(model, optimizer)
    losses: list[float] = []
    for step in range(progress.step, settings.updates):
        if progress.since >= settings.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.updates)
        batch = records.batch(_batch(training, settings.batch_size, step, seed), device)
        logprobs, mask = token_logprobs(model, contract.space, batch)
        loss = broadcast_loss(logprobs, mask, batch.rewards, settings.negative_weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(finite(loss.item(), f"the loss of update {step + 1}"))
        if (step + 1) % settings.interval == 0 or step + 1 == settings.updates:
            measured = validation_loss(model, contract.space, records, validation, settings.negative_weight)
            progress.measure(model, step if measured is None else -measured)
            progress.points.append(Point("broadcast", step + 1, statistics.fmean(losses), measured))
            progress.keep(model, optimizer, step + 1)
            report(progress)
            losses = []
    model.load_state_dict(progress.best)


def _batch(training: Tensor, size: int, step: int, seed: int) -> Tensor:
    """The responses of update number `step`: the training set in an order of its own each time round."""
    size = min(size, len(training))
    turn, place = divmod(step, len(training) // size)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
    return training[order[place * size : (place + 1) * size]]


@torch.no_grad()
def validation_loss(
    model: GateModel, space: str, records: Records, chosen: Tensor, negative_weight: float
) -> float | None:
    """Mean loss a token on `chosen` responses, None without any."""
    if not len(chosen):
        return None
    device = next(model.parameters()).device
    total, tokens = 0.0, 0.0
    for part in torch.split(chosen, _VALIDATION_BATCH):
        batch = records.batch(part, device)
        logprobs, mask = token_logprobs(model, space, batch)
        loss = broadcast_loss(logprobs, mask, batch.rewards, negative_weight)
        total, tokens = total + loss.item() * mask.sum().item(), tokens + mask.sum().item()
    return finite(total / max(1.0, tokens), "the loss on held-out prompts")


def forward_microseconds(gate: Checkpoint, rows: int, repeats: int = 200) -> float:
    """Median time of one `forward` over made-up rows, on the gate's device, with as many threads as torch has now."""
    contract, device = gate.contract, torch.device(gate.device)
    experts = len(contract.experts)
    logprobs = torch.randn(rows, experts, contract.top_k).log_softmax(-1).sort(-1, descending=True).values
    arguments = (
        logprobs.to(device),
        torch.randint(0, 1000, logprobs.shape, device=device),
        torch.randn(rows, experts, contract.projected_size, device=device),
        torch.zeros(rows, contract.state_size, device=device),
    )
    times = []
    for _ in range(repeats + 20):
        began = time.perf_counter()
        gate.forward(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[20:]) * 1e6
