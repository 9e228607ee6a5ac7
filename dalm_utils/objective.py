"""The training objective: draw a time, mask tokens, and score the model on restoring them.

B sequences, L positions, K tokens to predict. The AR loss is the special case in which no token is replaced, every
token is predicted, and attention is causal:
`diffusion_loss(model, tokens, tokens, maskable, ones, attention_mask=closed)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .annealing import annealed_mask
from .backbone import hidden_states, predicting_states
from .head import is_shifted, matmul_dtype, weighted_nll


# ------------------------------------------------------------------------------------------------- drawing
def seeded(seed: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments; `index` is a step or an epoch.

    Every draw of a run comes from one of these, so interrupting a run, or dividing the same global batch among another
    number of processes, does not change its noise (dropout alone is drawn by each process for itself).
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_times(
    batch: int,
    *,
    method: str = "stratified",
    eps: float = 1e-3,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Diffusion times, one per sequence, uniform on [eps, 1].

    `stratified` cuts [eps, 1] into `batch` equal strata, draws once in each, and shuffles: each time by itself is
    still uniform, but a batch never lacks early or late ones. `uniform` draws independently.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: an unknown method, an empty batch, or eps outside (0, 1).
    """
    if batch < 1 or not 0.0 < eps < 1.0:
        raise ValueError(f"need batch >= 1 and 0 < eps < 1, got batch={batch}, eps={eps}")
    where = generator.device if generator is not None else device
    uniform = torch.rand(batch, generator=generator, device=where)
    if method == "stratified":
        uniform = (torch.randperm(batch, generator=generator, device=where) + uniform) / batch
    elif method != "uniform":
        raise ValueError(f"method must be stratified or uniform, got {method!r}")
    return (eps + (1.0 - eps) * uniform).clamp_(max=1.0).to(device)


def default_maskable(tokens: Tensor) -> Tensor:
    """Every position but the begin token at position 0: `[B, L]` bool."""
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:, 0] = False
    return maskable


def corrupt(
    tokens: Tensor,
    times: Tensor,
    mask_id: int,
    *,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace each maskable token by [MASK] with probability t (linear schedule, alpha_t = 1 - t).

    Args:
        tokens: `[B, L]` long.
        times: `[B]`, each in (0, 1].
        mask_id: the id of [MASK].
        maskable: `[B, L]` bool; by default everything but position 0.
        generator: draws which tokens are masked, on its own device.

    Returns:
        noised `[B, L]` long and masked `[B, L]` bool.
    """
    maskable = default_maskable(tokens) if maskable is None else maskable
    where = generator.device if generator is not None else tokens.device
    coins = torch.rand(tokens.shape, generator=generator, device=where).to(tokens.device)
    masked = (coins < times[:, None]) & maskable
    return torch.where(masked, mask_id, tokens), masked


# --------------------------------------------------------------------------------------------------- batch
@dataclass(frozen=True)
class Batch:
    """Noised sequences and the tokens to predict in them.

    `with_capacity` appends places of weight 0 to the `count` that are used. They change neither loss nor gradient, and
    give every batch of a run the same shapes.
    """

    noised: Tensor  # [B, L] long, what the model reads
    tokens: Tensor  # [B, L] long, the clean text (read by a teacher)
    places: Tensor  # [K] long, flat indices b * L + i of the tokens to predict, in order
    targets: Tensor  # [K] long, those tokens
    weights: Tensor  # [K] float32, 1/t
    normalizer: Tensor  # scalar: the divisor, counted over the global batch
    count: int  # of the places that are used
    real: Tensor | None = None  # [B, L] bool: False at padding, which nothing attends to; None: there is no padding

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        noised: Tensor,
        masked: Tensor,
        times: Tensor,
        normalizer: Tensor,
        real: Tensor | None = None,
    ) -> Batch:
        """From `[B, L]` tokens, `[B, L]` bool masked and `[B]` times. On a GPU this waits for the device."""
        places = masked.flatten().nonzero()[:, 0]
        weights = (1.0 / times)[places // tokens.shape[1]]
        return cls(noised, tokens, places, tokens.flatten()[places], weights, normalizer.float(), len(places), real)

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences start to stop of a batch on the CPU; the normalizer stays that of the whole batch."""
        length = self.tokens.shape[1]
        first, last = torch.searchsorted(self.places, torch.tensor([start * length, stop * length])).tolist()
        part = slice(first, last)
        return dataclasses.replace(
            self, noised=self.noised[start:stop], tokens=self.tokens[start:stop], count=last - first,
            places=self.places[part] - start * length, targets=self.targets[part], weights=self.weights[part],
            real=None if self.real is None else self.real[start:stop],
        )  # fmt: skip

    def trimmed(self) -> Batch:
        """The same batch on the CPU, without the columns on the right in which every sequence is padding."""
        if self.real is None:
            return self
        length, kept = self.tokens.shape[1], int(self.real.any(0).nonzero().max()) + 1
        cut = {name: getattr(self, name)[:, :kept] for name in ("noised", "tokens", "real")}
        return dataclasses.replace(self, **cut, places=self.places // length * kept + self.places % length)

    def with_capacity(self, capacity: int) -> Batch:
        """The same batch with `capacity` places. Raises ValueError if it has more than that."""
        unused = capacity - len(self.places)
        if unused < 0:
            raise ValueError(f"{len(self.places)} places do not fit into {capacity}")

        # The unused places lie in row 0, but not at its position 0, which no state predicts under the shift. They are
        # spread over the row, since a GPU adds the gradients of one position one after the other.
        places = 1 + torch.arange(unused) % (self.tokens.shape[1] - 1)
        targets, weights = self.targets.new_zeros(unused), self.weights.new_zeros(unused)
        return dataclasses.replace(
            self,
            places=torch.cat([self.places, places]),
            targets=torch.cat([self.targets, targets]),
            weights=torch.cat([self.weights, weights]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the batch by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self, change) -> Batch:
        """The batch with `change` applied to every tensor, for instance to move it to a device."""
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


def place_capacity(sequences: int, maskable: int, *, stratified: bool, eps: float = 1e-3) -> int:
    """A number of places K that about one draw in 10^9 exceeds, rounded up to a multiple of 256.

    The mean number of masked tokens plus six standard deviations. The variance is the sum of the coins',
    B * n * E[t(1 - t)], and the times', B * n^2 * Var(t), divided by B^2 if the times are stratified.

    Args:
        sequences: B, in the batch.
        maskable: n, maskable tokens in each.
        stratified: whether the batch's times are stratified among themselves.
        eps: the smallest time.
    """
    coins, times = sequences * maskable / 6, sequences * maskable**2 / 12
    deviation = math.sqrt(coins + times / (sequences**2 if stratified else 1))
    wanted = sequences * maskable * (1 + eps) / 2 + 6 * deviation + 1
    return 256 * math.ceil(min(wanted, sequences * maskable) / 256)


# ---------------------------------------------------------------------------------------------------- loss
@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of one batch, in nats."""

    loss: Tensor  # scalar with a gradient: sum over places of weight * cross entropy, divided by the normalizer
    nll: Tensor  # scalar without a gradient: what `loss` would be without a teacher
    token_nll: Tensor  # [K] -log p of each token to predict, in the order of masked.nonzero()
    num_masked: int


def diffusion_loss(
    model: nn.Module,
    tokens: Tensor,
    noised: Tensor,
    masked: Tensor,
    times: Tensor,
    *,
    attention_mask: Tensor | None = None,
    shift: bool | None = None,
    normalize: str = "maskable",
    maskable: Tensor | None = None,
    real: Tensor | None = None,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.0,
) -> DiffusionLoss:
    """`1/N * sum over sequences of (1/t) * sum over masked i of -log p(x0_i | x_t)`.

    With `normalize="maskable"` N counts the maskable tokens: an unbiased estimate, but for times below
    eps, of the negative ELBO per token (arXiv 2406.03736, equation 8). `"masked"` divides by the number of masked
    tokens, as the code released with arXiv 2410.17891 does; the result is not a bound and depends on the batch size.

    Args:
        tokens, noised: `[B, L]` long; masked: `[B, L]` bool; times: `[B]`.
        attention_mask: additive `[1, 1, L, L]` from `annealed_mask`, or None.
        shift: whether the logits at i-1 predict token i; None takes the model's own setting.
        maskable: `[B, L]` bool; by default everything but position 0.
        real: `[B, L]` bool: False at padding; None where there is no padding.
        teacher, teacher_weight: see `batch_loss`.

    Raises:
        ValueError: position 0 is masked under the shift or with a teacher, or an unknown normalization.
    """
    if normalize not in ("maskable", "masked"):
        raise ValueError(f"normalize must be maskable or masked, got {normalize!r}")
    shift = is_shifted(model) if shift is None else shift
    if (shift or teacher is not None) and bool(masked[:, 0].any()):
        raise ValueError(
            "position 0 is masked, but nothing predicts it under the shift or by a teacher; "
            "start each sequence with a begin token"
        )
    maskable = default_maskable(tokens) if maskable is None else maskable
    divisor = (maskable if normalize == "maskable" else masked).sum().clamp(min=1)
    batch = Batch.of(tokens, noised, masked, times, divisor, real)
    return batch_loss(
        model, batch, attention_mask, shift=shift, teacher=teacher if teacher_weight else None,
        teacher_weight=torch.full((), teacher_weight, device=tokens.device),
    )  # fmt: skip


def hide_padding(real: Tensor | None, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An additive attention mask under which nobody attends to padding, and otherwise as under `attention_mask`.

    Args:
        real: `[B, L]` bool: not padding. Each row has a position that every query may see, such as the begin token:
            a query that sees nothing would be NaN.
        attention_mask: additive `[1, 1, L', L']` with L' >= L, or None.
        dtype: in which attention runs.

    Returns:
        `[B, 1, L, L]`; `[B, 1, 1, L]` where there is padding alone; `attention_mask` where there is none.
    """
    if real is None:
        return attention_mask
    length = real.shape[1]
    padding = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, -math.inf)[:, None, None]
    return padding if attention_mask is None else padding + attention_mask[..., :length, :length]


def batch_loss(
    model: nn.Module,
    batch: Batch,
    attention_mask: Tensor | None = None,
    *,
    shift: bool | None = None,
    teacher: nn.Module | None = None,
    teacher_weight: Tensor | None = None,
) -> DiffusionLoss:
    """The loss of a batch that is already on the model's device. Nothing here waits for that device.

    Args:
        attention_mask: additive `[1, 1, L', L']` with L' >= L, or None: then the model uses its own attention.
        shift: None takes the model's own setting.
        teacher: the AR model that `model` was made from, frozen. The target at i is then
            `(1 - w) * token + w * teacher's prediction of token i from the clean text before it`.
        teacher_weight: w, a float32 scalar in [0, 1] on the model's device.
    """
    # 1. The model reads the noised sequences.
    dtype = matmul_dtype(model.get_input_embeddings().weight)
    hidden = hidden_states(model, batch.noised, hide_padding(batch.real, attention_mask, dtype))  # [B, L, D]

    # 2. The states that predict the masked tokens: one position to the left under the shift.
    sources = predicting_states(model, hidden, batch.places, shift)  # [K, D]

    # 3. The teacher reads the clean sequences, causally, and predicts the same tokens.
    teacher_hidden = None
    if teacher is not None:
        with torch.no_grad():  # without an explicit mask, transformers waits for the GPU to look for padding
            causal = annealed_mask(batch.tokens.shape[1], 0.0, dtype=teacher.dtype, device=batch.tokens.device)
            teacher_hidden = hidden_states(teacher, batch.tokens, causal)
            teacher_hidden = predicting_states(teacher, teacher_hidden, batch.places)  # [K, D']

    # 4. Cross entropy at the masked tokens and nowhere else, weighted by 1/t.
    total, token_nll = weighted_nll(
        model, sources, batch.targets, batch.weights,
        teacher=teacher, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight,
    )  # fmt: skip

    # 5. Divide by the global count, which does not depend on how the batch is split.
    nll = total.detach() if teacher is None else (token_nll.masked_fill(batch.weights == 0, 0) * batch.weights).sum()
    return DiffusionLoss(total / batch.normalizer, nll / batch.normalizer, token_nll, batch.count)
