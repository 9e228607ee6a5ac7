"""Opening the causal mask: from a model that sees only the past to one that sees everything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def anneal_ratio(step: int, anneal_steps: int) -> float:
    """The share of look-ahead edges that is open at optimizer step `step` (counted from 0).

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

    Causal edges are always open; ratio 0 is the AR model's own mask.  The mask is additive (0 where a
    query may look, -inf where it may not) because a boolean one is silently added as 0 and 1 by eager
    attention.

    Args:
        length: L, the number of positions.
        ratio: probability in [0, 1] that an edge above the diagonal is open.
        dtype: of the mask; the dtype in which attention runs, so that no layer has to cast it.
        device: of the mask.
        generator: draws the edges, on its own device.

    Returns:
        `[1, 1, L, L]`, one matrix for the whole batch and every layer; None at ratio >= 1, where no mask
        is needed.

    Raises:
        ValueError: a ratio outside [0, 1] or a length below 1.
    """
    _check(length, ratio)
    if ratio == 1.0:
        return None
    where = generator.device if generator is not None else device
    visible = torch.ones(length, length, dtype=torch.bool, device=where).tril()  # [L, L]: query i sees keys j <= i
    if ratio > 0.0:
        visible |= torch.rand(length, length, generator=generator, device=where) < ratio
    mask = torch.zeros(length, length, dtype=dtype, device=where).masked_fill_(~visible, float("-inf"))
    return mask[None, None].to(device, non_blocking=True)


def open_edges(ratio: float, seed: int, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
    """The same mask as a function of where one looks: `mask_mod(b, h, q, k)` of flex attention.

    An edge above the diagonal is open if a hash of (seed, q, k) falls below `ratio`: nothing is drawn beforehand and
    nothing kept, and the same edge gives the same answer wherever it is asked for.  Not the edges that
    `annealed_mask` draws, but drawn as they are.

    Args:
        seed: 32 bits; another one for each step.
        device: where attention runs; both numbers live there, so that a new step does not compile anew.
    """
    numbers = int(ratio * 2**32), seed & 0xFFFFFFFF
    below, salt = (torch.full((), number, dtype=torch.long, device=device) for number in numbers)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        bits = (q.long() * 0x9E3779B1 + k.long() * 0x85EBCA77 + salt) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # an avalanche: each bit depends on all
            bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
        return (k <= q) | ((bits ^ (bits >> 16)) < below)

    return mask_mod


def annealed_block_mask(
    length: int, ratio: float, *, seed: int, device: torch.device | str = "cpu", block: int = 128
) -> BlockMask | None:
    """What `annealed_mask` is, for flex attention and long sequences: no `[L, L]` tensor ever exists.

    Every block of edges may hold an open one, so none is left out, and none has to be looked at beforehand.

    Returns:
        a mask for the whole batch and every layer; None at ratio >= 1.

    Raises:
        ValueError: a ratio outside [0, 1] or a length below 1.
    """
    _check(length, ratio)
    if ratio == 1.0:
        return None
    rows = -(-length // block)
    count = torch.full((1, 1, rows), rows, dtype=torch.int32, device=device)
    index = torch.arange(rows, dtype=torch.int32, device=device).expand(1, 1, rows, rows).contiguous()
    edges = open_edges(ratio, seed, device)
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=block, mask_mod=edges, seq_lengths=(length, length))


def _check(length: int, ratio: float) -> None:
    if length < 1 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"need length >= 1 and 0 <= ratio <= 1, got length={length}, ratio={ratio}")
