"""Trains a gate from response-level correctness: `python -m gate.train`.

First DLLG's objective on recorded responses, then, if asked for, an on-policy refinement. Writes one
checkpoint with its contract. Knows nothing of the server.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gate import checkpoint, dataset
from gate.contract import FORMAT_VERSION, Contract, vocabulary_hash
from gate.ensemble import Ensemble
from gate.model import GateModel
from gate.objective import Prepared, broadcast_loss, prepare, token_logprobs
from gate.record import expert_folders, read_prompts
from gate.refine import Refinement, refine


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Settings of the recorded-response objective."""

    epochs: int
    batch_size: int = 128  # responses
    learning_rate: float = 3e-3
    negative_weight: float = 0.02


def fit_broadcast(
    model: GateModel, contract: Contract, prepared: Prepared, settings: Broadcast, seed: int
) -> list[float]:
    """Trains `model` in place; the learning rate falls linearly to zero. Returns each epoch's mean loss."""
    generator = torch.Generator().manual_seed(seed)
    rewards = prepared.records.rewards
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    updates = settings.epochs * -(-len(rewards) // settings.batch_size)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 - done / updates)
    history = []
    for epoch in range(settings.epochs):
        losses = []
        order = torch.randperm(len(rewards), generator=generator)
        for chosen in order.tensor_split(updates // settings.epochs):
            logprobs, mask = token_logprobs(model, contract.state_size, contract.space, prepared, chosen)
            loss = broadcast_loss(logprobs, mask, rewards[chosen], settings.negative_weight)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rate.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
        print(f"broadcast epoch {epoch + 1}/{settings.epochs} loss {history[-1]:.4f}", flush=True)
    return history


def make_contract(
    ensemble: Ensemble,
    tokenizer_json: Path,
    *,
    space: Literal["logprob", "prob"],
    inputs: list[Literal["topk", "hidden"]],
    projected_size: int,
    state_size: int,
) -> Contract:
    """The contract of a new gate over these experts."""
    reads_hidden = "hidden" in inputs
    return Contract(
        format_version=FORMAT_VERSION,
        experts=ensemble.names,
        vocabulary_hash=vocabulary_hash(tokenizer_json),
        top_k=ensemble.top_k,
        space=space,
        inputs=inputs,
        hidden_sizes=ensemble.hidden_sizes if reads_hidden else [],
        projected_size=projected_size if reads_hidden else 0,
        state_size=state_size,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--traces", type=Path, required=True, help="written by gate.record")
    parser.add_argument("--prompts", type=Path, required=True, help="for the refinement's samples")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--space", choices=["logprob", "prob"], default="logprob")
    parser.add_argument("--inputs", nargs="+", choices=["topk", "hidden"], default=["topk", "hidden"])
    parser.add_argument("--projected-size", type=int, default=12)
    parser.add_argument("--state-size", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--negative-weight", type=float, default=0.02)
    parser.add_argument("--refine-steps", type=int, default=0)
    parser.add_argument("--refine-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    records = dataset.load(arguments.traces)
    folders = expert_folders(arguments.experts)
    ensemble = Ensemble(folders, top_k=records.topk_ids.size(2))
    contract = make_contract(
        ensemble,
        next(iter(folders.values())) / "tokenizer.json",
        space=arguments.space,
        inputs=arguments.inputs,
        projected_size=arguments.projected_size,
        state_size=arguments.state_size,
    )
    model = GateModel(contract)
    broadcast = Broadcast(epochs=arguments.epochs, negative_weight=arguments.negative_weight)
    fit_broadcast(model, contract, prepare(records), broadcast, arguments.seed)
    print(f"broadcast objective done, {time.perf_counter() - began:.0f}s", flush=True)
    if arguments.refine_steps:
        settings = Refinement(steps=arguments.refine_steps, learning_rate=arguments.refine_rate)
        refine(model, contract, ensemble, read_prompts(arguments.prompts, ensemble), settings, arguments.seed)
    checkpoint.save(model, contract, arguments.output)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters, {time.perf_counter() - began:.0f}s -> {arguments.output}")


if __name__ == "__main__":
    main()
