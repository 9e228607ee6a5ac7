"""What a forward pass computes: every position, or one block against cached keys and values.

The cache is an approximation. A full pass stores the keys and values of every position. The passes after it compute
only the block in work and read the stored ones of everything else, prefix and suffix alike. In the first layer those
are exact; in deeper layers they were computed when more of the block was still [MASK]. They are refreshed when a
sequence begins its next block, and more often on request (arXiv 2505.22618 calls this a dual cache).
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .backbone import MODEL_ERRORS, eval_mode, hidden_states, predicting_states
from .head import is_shifted
from .machine import send

_PROVEN: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # models that passed `check_cache`


class FullPass:
    """Computes every position of the sequences that are asked for."""

    def __init__(self, model: PreTrainedModel, canvas: Tensor, attention_mask: Tensor | None):
        self.model, self.canvas, self.attention_mask = model, canvas, attention_mask

    def states(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The hidden states `[M, D]` that predict the tokens at M places of the canvas.

        Args:
            rows, columns: `[M]` long, on the CPU, sorted by row. Sequences without a place are left alone.
        """
        active, place = rows.unique_consecutive(return_inverse=True)
        where = self._send(active)
        mask = None if self.attention_mask is None else self.attention_mask[where]
        hidden = hidden_states(self.model, self.canvas[where], mask)
        return predicting_states(self.model, hidden, self._send(place * self.canvas.shape[1] + columns))

    def _send(self, index: Tensor) -> Tensor:
        return send(index, self.canvas.device)


class BlockPass(FullPass):
    """Computes a window around each sequence's block, and every position only when the cache has to be refreshed.

    Sequences of a batch may be in different blocks, and are refreshed independently: what is sampled for one does not
    depend on the others.

    Args:
        canvas: `[N, L]` long, the tokens; read again at every pass.
        attention_mask: additive `[N, 1, 1, L]`, or None.
        blocks: `[N, L]` long, on the CPU: the block of each position that is written, elsewhere -1.
        refresh: passes of a sequence from one refresh to the next, within a block; None: one refresh a block.
    """

    def __init__(self, model, canvas: Tensor, attention_mask: Tensor | None, blocks: Tensor, refresh: int | None):
        super().__init__(model, canvas, attention_mask)
        self.blocks, self.refresh = blocks, refresh or math.inf
        self.starts, self.width = _windows(blocks, int(is_shifted(model)))
        self.cache = _KeysAndValues(*canvas.shape)
        self.block = torch.full((len(blocks),), -1)  # [N]: the block for which a sequence was refreshed last
        self.age = torch.zeros(len(blocks), dtype=torch.long)  # [N]: passes since

    def states(self, rows: Tensor, columns: Tensor) -> Tensor:
        active, place, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
        block = self.blocks[rows, columns][counts.cumsum(0) - counts]  # [A]: of each sequence's first place
        stale = (block != self.block[active]) | (self.age[active] >= self.refresh)
        self.block[active], self.age[active] = block, torch.where(stale, 1, self.age[active] + 1)
        start = torch.where(stale, 0, self.starts[active, block])  # [A]: of the positions that are computed
        windows, first, done = [], torch.empty_like(active), 0  # first: where position 0 would be among all states
        for chosen, width in ((stale, self.canvas.shape[1]), (~stale, self.width)):
            if chosen.any():
                states = self._window(active[chosen], start[chosen], width)  # [A', W, D]
                first[chosen] = done + width * torch.arange(len(states)) - start[chosen]
                windows.append(states.flatten(0, 1))
                done += len(windows[-1])
        states = windows[0] if len(windows) == 1 else torch.cat(windows)
        return predicting_states(self.model, states[None], self._send(first[place] + columns))

    def _window(self, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Compute `width` positions of each of `rows` `[A]` from `start` `[A]` on: `[A, W, D]`."""
        rows, start = self._send(torch.stack([rows, start]))
        positions = start[:, None] + torch.arange(width, device=start.device)  # [A, W]
        places = (rows[:, None] * self.canvas.shape[1] + positions).flatten()
        self.cache.aim(None if len(rows) == len(self.canvas) else rows, places)
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        tokens = self.canvas.flatten()[places].view(positions.shape)
        return hidden_states(self.model, tokens, mask, positions, self.cache)


def _windows(blocks: Tensor, shift: int) -> tuple[Tensor, int]:
    """Where each sequence's window for each block begins, `[N, C]`, and the width of all of them.

    A window covers the block and, under the shift, the position before it, which predicts the block's first token.
    """
    length, count = blocks.shape[1], int(blocks.max()) + 1
    column, inside = torch.arange(length), blocks[:, None] == torch.arange(count)[:, None]  # [N, C, L]
    first = column.where(inside, length).amin(-1) - shift
    width = min(length, int((column.where(inside, -1).amax(-1) + 1 - first).max()))
    return first.clamp(max=length - width), width


class _KeysAndValues(Cache):
    """Keys and values of N sequences at L positions, in every layer; a pass writes where it computes and reads all."""

    def __init__(self, sequences: int, length: int):
        super().__init__(layers=[])
        self.sequences, self.length = sequences, length
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}  # layer: keys and values, each [N, L, H, D]

    def aim(self, rows: Tensor | None, places: Tensor) -> None:
        """The next pass computes `places` `[A * W]` (flat indices n * L + l) of `rows` `[A]`; None: all sequences."""
        self.rows, self.places = rows, places

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Take a layer's new `[A, H, W, D]`; return what its queries attend to, `[A, H, L, D]`."""
        new = [tensor.transpose(1, 2) for tensor in (keys, values)]  # [A, W, H, D]
        if layer not in self.stored:
            sizes = [(self.sequences, self.length, *tensor.shape[2:]) for tensor in new]
            self.stored[layer] = tuple(tensor.new_zeros(size) for tensor, size in zip(new, sizes, strict=True))
        for stored, tensor in zip(self.stored[layer], new, strict=True):
            stored.flatten(0, 1).index_copy_(0, self.places, tensor.flatten(0, 1))
        if keys.shape[2] == self.length:
            return keys, values
        return tuple((t if self.rows is None else t[self.rows]).transpose(1, 2) for t in self.stored[layer])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length, 0


# ------------------------------------------------------------------------------------------------- a proof
@torch.no_grad()
def check_cache(model: PreTrainedModel, length: int = 8) -> None:
    """Prove on random tokens that this model can compute a block against cached keys and values.

    After a full pass over some tokens, and a pass over windows with other tokens in them, a pass over the windows with
    the first tokens must give the states of the full pass. Each model is asked once.

    Raises:
        ValueError: it does not, or takes no such cache.
    """
    if model not in _PROVEN:
        with eval_mode(model):
            _prove(model, length)
        _PROVEN.add(model)


def _prove(model: PreTrainedModel, length: int) -> None:
    vocab = len(model.get_input_embeddings().weight)
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    blocks = torch.full((2, length), -1)
    blocks[0, 2:5], blocks[1, 4:7] = 0, 0
    places = (blocks >= 0).nonzero(as_tuple=True)
    canvas = tokens.clone()
    network = BlockPass(model, canvas, None, blocks, refresh=None)
    try:
        full = network.states(*places)
        canvas[places] = (canvas[places] + 1) % vocab
        other = network.states(*places)
        canvas.copy_(tokens)
        again = network.states(*places)
    except MODEL_ERRORS as error:
        raise ValueError(f"{type(model).__name__} cannot use cache=True ({error}); use cache=False") from error
    scale = float(full.abs().max()) * (1e-4 if full.dtype == torch.float32 else 3e-2)
    expected = FullPass(model, tokens, None).states(*places)
    if (again - expected).abs().max() > scale or (full - expected).abs().max() > scale or torch.equal(other, full):
        raise ValueError(
            f"{type(model).__name__} cannot use cache=True: a block computed against cached keys and values differs "
            "from the same block of a full pass; use cache=False"
        )
