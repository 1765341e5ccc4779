"""Small made-up experts' outputs for the gate's tests; no model is involved."""

import torch

from gate.contract import Contract
from gate.training.dataset import Records

VOCABULARY = 20
EXPERTS = ["math", "text", "chat"]
HIDDEN = [16, 24, 16]


def contract(inputs=("topk", "hidden"), state_size=0, space="logprob"):
    reads_hidden = "hidden" in inputs
    return Contract(
        format_version=1,
        experts=EXPERTS,
        vocabulary_hash="ab" * 32,
        top_k=8,
        space=space,
        inputs=list(inputs),
        hidden_sizes=HIDDEN if reads_hidden else [],
        projected_size=4 if reads_hidden else 0,
        state_size=state_size,
    )


def topk(rows, generator=None, listed=8):
    """Random (log-probabilities [B, E, K], ids [B, E, K])."""
    logits = 2 * torch.randn(rows, len(EXPERTS), VOCABULARY, generator=generator)
    return tuple(logits.log_softmax(-1).topk(listed))


def records(responses=40, length=4, seed=0):
    """Responses whose hidden states tell which expert knows the next token; half of them follow it.

    The knowing expert puts most mass on token t, the others on t + 1. A response that takes every t is
    rewarded; one that takes a t + 1 is not.
    """
    generator = torch.Generator().manual_seed(seed)
    count = responses * length
    right = torch.randint(0, VOCABULARY - 1, (count,), generator=generator)
    knows = torch.randint(0, len(EXPERTS), (count,), generator=generator)
    wanted = torch.where(torch.arange(len(EXPERTS)) == knows.unsqueeze(1), 0, 1) + right.unsqueeze(1)  # [N, E]
    logits = torch.randn(count, len(EXPERTS), VOCABULARY, generator=generator)
    logits.scatter_(2, wanted.unsqueeze(2), 6.0)
    best = logits.log_softmax(-1).topk(8)
    signal = torch.nn.functional.one_hot(knows, len(EXPERTS)).float()
    hidden = [
        torch.cat((3 * signal, torch.randn(count, size - len(EXPERTS), generator=generator)), dim=1) for size in HIDDEN
    ]
    rewards = (torch.arange(responses) % 2).float()
    tokens = torch.where(rewards.repeat_interleave(length) == 1, right, right + 1)
    return Records(
        vocabulary_size=VOCABULARY,
        topk_logprobs=best.values.half(),
        topk_ids=best.indices.int(),
        hidden=[states.half() for states in hidden],
        tokens=tokens.int(),
        lengths=torch.full((responses,), length),
        rewards=rewards,
        prompts=[f"p{number}" for number in range(responses)],
    )
