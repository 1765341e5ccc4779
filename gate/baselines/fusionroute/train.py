"""Trains a FusionRoute router: first on reference answers (SFT), then on preferences (CDPO).

The experts are frozen and run beside the router on every batch, so nothing of the size of a vocabulary is kept.
N answer tokens of a batch, E experts, V vocabulary.
"""

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gate.baselines.fusionroute.data import Encoder, Sequences, batches
from gate.baselines.fusionroute.losses import combined, preference_loss, sft_loss
from gate.baselines.models import logits_at
from gate.evaluation.prompts import Question


@dataclass(frozen=True, slots=True)
class Settings:
    """Of both phases; an epoch reads every prompt, or pair, once."""

    epochs: int
    """On reference answers."""
    preference_epochs: int = 1
    """On preferences."""
    batch_size: int = 32
    """Prompts, or pairs, an update."""
    learning_rate: float = 1e-3
    """On reference answers, the highest of one cycle."""
    preference_rate: float = 1e-4
    """Learning rate on preferences."""


class RouterModel:
    """The router model, its head, and the frozen experts."""

    def __init__(self, model: Any, experts: list[Any], encoder: Encoder, device: str) -> None:
        self.model = model.to(device).train()
        self.experts = [expert.to(device).eval().requires_grad_(False) for expert in experts]
        self.head = nn.Linear(model.config.hidden_size, len(experts)).to(device)
        self.encoder = encoder
        self.device = device

    def forward(self, rows: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """(router's log-probabilities [N, V], head's scores [N, E], targets int64 [N])."""
        logits, hidden = logits_at(self.model, rows.ids[:, :-1], rows.answer[:, 1:])
        targets = rows.ids[:, 1:][rows.answer[:, 1:]]
        return logits.float().log_softmax(-1), self.head(hidden.float()), targets

    @torch.no_grad()
    def expert_logprobs(self, rows: Sequences) -> Tensor:
        """The experts' log-probabilities [N, E, V]."""
        logits = [logits_at(expert, rows.ids[:, :-1], rows.answer[:, 1:])[0] for expert in self.experts]
        return torch.stack([each.float().log_softmax(-1) for each in logits], dim=1)

    def rows(self, pairs: list[tuple[Question, str]]) -> Sequences:
        return self.encoder.batch(pairs).to(self.device)

    def response_logprobs(self, rows: Sequences, experts: Tensor) -> Tensor:
        """log p [B] of each row's whole answer under the combined policy; `experts` [N, E, V] are theirs."""
        router, scores, targets = self.forward(rows)
        return _sums(combined(router, scores, experts).gather(1, targets.unsqueeze(1)).squeeze(1), rows)

    @torch.no_grad()
    def measure(self, pairs: list[tuple[Question, str]], size: int) -> tuple[float, float]:
        """(share of the answers that greedy decoding of the combined policy gives, mean log-probability of an answer).

        Greedy decoding gives an answer exactly when each of its tokens is the most probable one after those before.
        """
        found, total = 0.0, 0.0
        for at in range(0, len(pairs), size):
            rows = self.rows(pairs[at : at + size])
            router, scores, targets = self.forward(rows)
            policy = combined(router, scores, self.expert_logprobs(rows))
            found += float((_sums((policy.argmax(1) != targets).float(), rows) == 0).sum())
            total += float(policy.gather(1, targets.unsqueeze(1)).sum())
        return found / len(pairs), total / len(pairs)


def fit_references(
    router: RouterModel,
    train: list[tuple[Question, str]],
    validation: list[tuple[Question, str]],
    settings: Settings,
    seed: int,
) -> None:
    """SFT in place; keeps the epoch whose combined policy answers the most validation prompts right, decoding greedily;
    of equals, the one under which the answers are most probable."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW([*router.model.parameters(), *router.head.parameters()], lr=settings.learning_rate)
    updates = settings.epochs * -(-len(train) // settings.batch_size)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=updates)
    best: tuple[tuple[float, float], Any] = ((-1.0, 0.0), None)
    for epoch in range(settings.epochs):
        for batch in batches(train, settings.batch_size, rng):
            rows = router.rows(batch)
            experts = router.expert_logprobs(rows)
            made, scores, targets = router.forward(rows)
            _update(optimizer, sft_loss(made, scores, experts, targets), router)
            rate.step()
        value = router.measure(validation, settings.batch_size)
        print(f"sft {epoch + 1}/{settings.epochs}: {_shown(value)}", flush=True)
        if value > best[0]:
            best = value, copy.deepcopy((router.model.state_dict(), router.head.state_dict()))
    router.model.load_state_dict(best[1][0])
    router.head.load_state_dict(best[1][1])


def fit_preferences(
    router: RouterModel,
    pairs: list[tuple[Question, str, str]],
    validation: list[tuple[Question, str]],
    settings: Settings,
    seed: int,
) -> None:
    """CDPO in place, the head frozen; taken back if fewer validation prompts are answered right than before."""
    rng = random.Random(seed)
    start = RouterModel(copy.deepcopy(router.model), router.experts, router.encoder, router.device)
    start.head = router.head
    before = router.measure(validation, settings.batch_size)
    optimizer = torch.optim.AdamW(router.model.parameters(), lr=settings.preference_rate)
    for _ in range(settings.preference_epochs):
        for batch in batches(pairs, settings.batch_size, rng):
            right = router.rows([(question, good) for question, good, _ in batch])
            wrong = router.rows([(question, bad) for question, _, bad in batch])
            experts = router.expert_logprobs(right), router.expert_logprobs(wrong)
            with torch.no_grad():
                before_right, before_wrong = map(start.response_logprobs, (right, wrong), experts)
            now_right, now_wrong = map(router.response_logprobs, (right, wrong), experts)
            _update(optimizer, preference_loss(now_right, now_wrong, before_right, before_wrong), router)
    after = router.measure(validation, settings.batch_size)
    print(f"cdpo: {_shown(before)} -> {_shown(after)}", flush=True)
    if after[0] < before[0]:
        router.model.load_state_dict(start.model.state_dict())
        print("cdpo taken back", flush=True)


def _sums(values: Tensor, rows: Sequences) -> Tensor:
    """Values [N] of the answers' tokens, summed by row [B]."""
    owner = torch.arange(len(rows.ids), device=values.device).unsqueeze(1).expand_as(rows.answer)[rows.answer]
    return values.new_zeros(len(rows.ids)).index_add(0, owner, values)


def _shown(measured: tuple[float, float]) -> str:
    return f"{measured[0]:.3f} of the validation answers right, log-probability {measured[1]:.3f}"


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, router: RouterModel) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([*router.model.parameters(), *router.head.parameters()], 1.0)
    optimizer.step()
