"""What a transformers model says at some positions of texts that it reads at once (teacher forcing).

B texts of T tokens, N positions in all, V vocabulary, H hidden size. Knows nothing of gates.
"""

from typing import Any

from torch import Tensor, nn


def logits_at(model: Any, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [N, V] of the token after each `chosen` one, bool [B, T], of `ids` [B, T]; what enters the output layer
    there [N, H]).

    The logits are the model's own: some change what their output layer gives (Gemma's soft cap, Granite's and Cohere's
    scale). Other positions are left out before that layer: theirs would take B T V floats.
    """
    entered: list[Tensor] = []

    def select(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        entered.append(inputs[0][chosen])
        return entered[0].unsqueeze(0)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: Tensor = model(ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits, entered[0]
