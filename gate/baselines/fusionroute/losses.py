"""FusionRoute's losses (arXiv 2601.05106, section 3.2). N tokens, E experts, V vocabulary, P preference pairs."""

import torch
from torch import Tensor, nn

ROUTING_WEIGHT = 1 / 3
BETA = 0.1


def disagreement(experts: Tensor) -> Tensor:
    """bool [N]: where two experts' most probable tokens differ; log-probabilities [N, E, V]."""
    best = experts.argmax(-1)
    return (best != best[:, :1]).any(1)


def routing_loss(scores: Tensor, experts: Tensor, targets: Tensor) -> Tensor:
    """-sum_i w_i log p_i(target), w = softmax(scores [N, E]), averaged over the tokens where the experts disagree.

    `experts` [N, E, V], `targets` int64 [N]. 0 where they agree everywhere.
    """
    given = experts.gather(2, targets.view(-1, 1, 1).expand(-1, experts.size(1), 1)).squeeze(2)  # [N, E]
    values = -(scores.softmax(-1) * given).sum(1)
    differ = disagreement(experts)
    return (values * differ).sum() / differ.sum().clamp_min(1)


def sft_loss(router: Tensor, scores: Tensor, experts: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the router alone, log-probabilities [N, V], and the routing loss."""
    language = nn.functional.nll_loss(router, targets)
    return language + ROUTING_WEIGHT * routing_loss(scores, experts, targets)


def combined(router: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
    """log p [N, V] of the served policy; the chosen expert is a constant, so gradients reach the router's part only."""
    chosen = scores.detach().argmax(-1)
    return (router + experts[torch.arange(len(chosen)), chosen].detach()).log_softmax(-1)


def preference_loss(right: Tensor, wrong: Tensor, start_right: Tensor, start_wrong: Tensor) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) on log-probabilities [P] of whole responses under the combined policy, now and
    at the start of this phase."""
    return -nn.functional.logsigmoid(BETA * ((right - start_right) - (wrong - start_wrong))).mean()
