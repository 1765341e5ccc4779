"""On-policy refinement: a group-relative policy gradient on the gate's own samples.

Each step samples several responses to each of a few prompts from the fused policy, rewards whole responses,
and moves the gate towards those better than their group. Knows nothing of files or of the command line.
"""

import random
from dataclasses import dataclass

import torch

from gate.contract import Contract
from gate.ensemble import Ensemble, gate_policy, roll_out
from gate.model import GateModel
from gate.objective import clipped_policy_loss, group_advantages, prepare, token_logprobs
from gate.record import Prompt, to_records


@dataclass(frozen=True, slots=True)
class Refinement:
    """Settings of the refinement; `epochs` updates are made on each step's samples."""

    steps: int
    prompts_per_step: int = 32
    group: int = 8
    epochs: int = 4
    learning_rate: float = 1e-3
    clip: float = 0.2
    temperature: float = 1.0
    max_tokens: int = 24


def refine(
    model: GateModel,
    contract: Contract,
    ensemble: Ensemble,
    prompts: list[Prompt],
    settings: Refinement,
    seed: int,
) -> None:
    """Trains `model` in place and prints the mean reward of the samples."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    average = 0.0
    for step in range(1, settings.steps + 1):
        batch = rng.sample(prompts, settings.prompts_per_step)
        reward = refinement_step(model, contract, ensemble, batch, settings, optimizer, generator)
        average = reward if step == 1 else 0.9 * average + 0.1 * reward
        if step % 10 == 0:
            print(f"refine {step}/{settings.steps} mean sampled reward {average:.3f}", flush=True)


def refinement_step(
    model: GateModel,
    contract: Contract,
    ensemble: Ensemble,
    batch: list[Prompt],
    settings: Refinement,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """Samples, rewards and updates once. Returns the mean reward."""
    policy = gate_policy("gate", contract.space, model, contract.state_size)
    cursor = ensemble.prefill([prompt.tokens for prompt in batch]).fork(settings.group)
    rollout = roll_out(
        ensemble,
        cursor,
        policy,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        generator=generator,
    )
    repeated = [prompt for prompt in batch for _ in range(settings.group)]
    prepared = prepare(to_records(ensemble, rollout, repeated, "gate"))
    rewards = prepared.records.rewards
    advantages = group_advantages(rewards, settings.group)
    useful = advantages.nonzero().squeeze(1)
    if len(useful) == 0:
        return float(rewards.mean())
    with torch.no_grad():
        old, _ = token_logprobs(model, contract.state_size, contract.space, prepared, useful)
    for _ in range(settings.epochs):
        now, mask = token_logprobs(model, contract.state_size, contract.space, prepared, useful)
        loss = clipped_policy_loss(now, old, mask, advantages[useful], settings.clip)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(rewards.mean())
