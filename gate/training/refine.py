"""On-policy refinement: a group-relative policy gradient on the gate's own samples.

Each step samples several responses to each of a few prompts from the fused policy, rewards whole responses, and moves
the gate towards those better than their group. Where samples come from is the caller's (`Policy`): the samples of
`polylogit train` come through a deployment, so that what is trained is what is served.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gate.contract import Contract
from gate.model import GateModel
from gate.training.curves import Point
from gate.training.dataset import Batch, Records
from gate.training.fit import FitProgress, TrainingError, finite
from gate.training.objective import (
    Law,
    clipped_policy_loss,
    divergence,
    gate_coefficients,
    group_advantages,
    served_law,
)


@dataclass(frozen=True, slots=True)
class Refinement:
    """Settings of the second phase, on the gate's own samples."""

    steps: int
    """At most."""
    prompts: int = 32
    """Prompts a step."""
    group: int = 8
    """Samples a prompt, compared with each other."""
    epochs: int = 4
    """Updates on each step's samples."""
    learning_rate: float = 1e-3
    """The same throughout."""
    clip: float = 0.2
    """How far the ratio of new and old probability may move from 1."""
    divergence_weight: float = 0.01
    """Of what holds the gate near the one it started from."""
    temperature: float = 1.0
    """Of the samples, and so of the policy that learns from them."""
    interval: int = 10
    """Steps between validations."""
    patience: int = 4
    """Validations in a row that brought nothing better, after which it ends."""


class Policy(Protocol):
    """The fused policy of a gate. Prompts are numbers."""

    def load(self, model: GateModel) -> None:
        """Sample from this gate from now on."""

    def sample(self, prompts: list[int], copies: int, *, temperature: float, seed: int) -> Records:
        """Graded responses, `copies` for each prompt, one prompt after the other. Those that were sampled (the
        temperature is not 0) come with the law that sampled them."""


def refine(
    model: GateModel,
    contract: Contract,
    policy: Policy,
    parts: tuple[list[int], list[int]],
    settings: Refinement,
    progress: FitProgress,
    *,
    seed: int,
    report: Callable[[FitProgress], None],
) -> None:
    """Trains `model` in place on prompts `parts[0]`, from where `progress` is; the weights with the best greedy reward
    on `parts[1]` are kept, the last ones without any. `report` is called after each step."""
    training, validation = parts
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    if not progress.resume(model, optimizer) and validation:
        reward = _greedy_reward(model, policy, validation, seed)
        progress.measure(model, reward)
        progress.points.append(Point("refine", 0, validation=reward))
    for step in range(progress.step + 1, settings.steps + 1):
        if validation and progress.since >= settings.patience:
            break
        policy.load(model)
        chosen = random.Random(f"{seed} {step}").sample(training, min(settings.prompts, len(training)))
        made = policy.sample(chosen, settings.group, temperature=settings.temperature, seed=seed * 1_000_003 + step)
        away = update(model, start, contract.space, made, settings, optimizer)
        measured = None
        if validation and (step % settings.interval == 0 or step == settings.steps):
            measured = _greedy_reward(model, policy, validation, seed)
            progress.measure(model, measured)
        elif not validation:
            progress.measure(model, step)
        point = Point("refine", step, validation=measured, reward=float(made.rewards.mean()), divergence=away)
        progress.points.append(point)
        progress.keep(model, optimizer, step)
        report(progress)
    model.load_state_dict(progress.best)


def _greedy_reward(model: GateModel, policy: Policy, prompts: list[int], seed: int) -> float:
    """Mean reward of one greedy response to each of `prompts`."""
    policy.load(model)
    return float(policy.sample(prompts, 1, temperature=0.0, seed=seed).rewards.mean())


def update(
    model: GateModel,
    start: GateModel,
    space: str,
    made: Records,
    settings: Refinement,
    optimizer: torch.optim.Optimizer,
) -> float | None:
    """Learns from one step's samples; nats a token between the policy that made them and `start`, None if no group had
    both better and worse responses."""
    advantages = group_advantages(made.rewards, settings.group)
    useful = advantages.nonzero().squeeze(1)
    if not len(useful):
        return None
    device = next(model.parameters()).device
    batch = made.batch(useful, device)
    gains = advantages[useful].to(device)
    if batch.served is None:
        raise TrainingError("samples without the law that sampled them")
    law = served_law(batch, batch.served, space, settings.temperature)
    with torch.no_grad():
        old, mask = law.token_logprobs(batch.served.coefficients)
        first, _ = law.token_logprobs(gate_coefficients(start, batch))
        away = float(divergence(old, first, mask))
    for _ in range(settings.epochs):
        loss = _loss(model, law, batch, old, first, gains, settings)
        finite(loss.item(), "a refinement's loss")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return away


def _loss(
    model: GateModel, law: Law, batch: Batch, old: Tensor, first: Tensor, gains: Tensor, settings: Refinement
) -> Tensor:
    now, mask = law.token_logprobs(gate_coefficients(model, batch))
    loss = clipped_policy_loss(now, old, mask, gains, settings.clip)
    return loss + settings.divergence_weight * divergence(now, first, mask)
