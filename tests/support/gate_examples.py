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


def rest(logprobs, ids):
    """log of what lists [N, E, K] of the full `logprobs` [N, E, V] leave, [N, E]."""
    return logprobs.scatter(2, ids, -torch.inf).logsumexp(2).clamp_min(-20.0)


def token_logprobs(logprobs, tokens):
    """[N, E] of `tokens` [N], by the full `logprobs` [N, E, V]."""
    return logprobs[torch.arange(len(tokens)), :, tokens.long()]


def whole(coefficients, logprobs, space):
    """Fused scores [N, V] over the whole vocabulary."""
    if space == "logprob":
        return torch.einsum("ne,nev->nv", coefficients, logprobs)
    return torch.einsum("ne,nev->nv", coefficients, logprobs.exp()).log()


def records(responses=40, length=4, seed=0):
    """The records of `made_up`."""
    return made_up(responses, length, seed)[0]


def made_up(responses=40, length=4, seed=0):
    """(records, all log-probabilities [N, E, V]): responses whose hidden states tell which expert knows the next token;
    half of them follow it.

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
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(8)
    signal = torch.nn.functional.one_hot(knows, len(EXPERTS)).float()
    hidden = [
        torch.cat((3 * signal, torch.randn(count, size - len(EXPERTS), generator=generator)), dim=1) for size in HIDDEN
    ]
    rewards = (torch.arange(responses) % 2).float()
    tokens = torch.where(rewards.repeat_interleave(length) == 1, right, right + 1)
    made = Records(
        vocabulary_size=VOCABULARY,
        topk_logprobs=best.values.half(),
        topk_ids=best.indices.int(),
        rest=rest(logprobs, best.indices),
        hidden=[states.half() for states in hidden],
        tokens=tokens.int(),
        token_logprobs=token_logprobs(logprobs, tokens),
        lengths=torch.full((responses,), length),
        rewards=rewards,
        prompts=[f"p{number}" for number in range(responses)],
    )
    return made, logprobs
