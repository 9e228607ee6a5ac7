"""Opening the causal mask: from a model that sees only the past to one that sees everything."""

from __future__ import annotations

import torch
from torch import Tensor


def anneal_ratio(step: int, anneal_steps: int) -> float:
    """The fraction of look-ahead edges that is open at optimizer step `step` (counted from 0).

    `min(1, (step + 1) / anneal_steps)`: the first step already opens a little, and from step
    `anneal_steps - 1` on the model sees everything (arXiv 2410.17891, section 3.3).

    Raises:
        ValueError: `step` is negative or `anneal_steps` is not positive.
    """
    if step < 0 or anneal_steps < 1:
        raise ValueError(f"need step >= 0 and anneal_steps >= 1, got step={step}, anneal_steps={anneal_steps}")
    return min(1.0, (step + 1) / anneal_steps)


def annealed_mask(
    length: int,
    ratio: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """An additive attention mask whose look-ahead edges are each open with probability `ratio`.

    Causal edges are always open; ratio 0 is the AR model's own mask. The mask is additive (0 where a query may look,
    -inf where it may not) because eager attention silently adds a boolean mask as 0 and 1.

    Args:
        length: L, the number of positions.
        ratio: probability in [0, 1] that an edge above the diagonal is open.
        dtype: of the mask; use the dtype in which attention runs, so that no layer has to cast it.
        device: of the mask.
        generator: draws the edges, on its own device.

    Returns:
        `[1, 1, L, L]`, one matrix for the whole batch and every layer; None at ratio 1, where no mask is needed.

    Raises:
        ValueError: a ratio outside [0, 1] or a length below 1.
    """
    if length < 1 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"need length >= 1 and 0 <= ratio <= 1, got length={length}, ratio={ratio}")
    if ratio == 1.0:
        return None
    where = generator.device if generator is not None else device
    visible = torch.ones(length, length, dtype=torch.bool, device=where).tril()  # [L, L]: query i sees keys j <= i
    if ratio > 0.0:
        visible |= torch.rand(length, length, generator=generator, device=where) < ratio
    mask = torch.zeros(length, length, dtype=dtype, device=where).masked_fill_(~visible, float("-inf"))
    return mask[None, None].to(device, non_blocking=True)
