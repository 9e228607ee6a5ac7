"""The training objective: draw a time, hide tokens, and score the model on restoring them.

The AR loss is the special case in which nothing is hidden, every token is predicted, and the mask is
causal: `diffusion_loss(model, tokens, tokens, maskable, ones, attention_mask=annealed_mask(L, 0))`.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .annealing import annealed_mask

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # logits held at once: what a cache holds, what keeps a GPU busy


def seeded(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    Every draw of a run comes from one of these, so an interrupted run, or one spread over more processes,
    sees the same noise as any other.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
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

    `stratified` cuts [eps, 1] into `batch` equal strata and draws once in each, in random order: every
    time is still uniform, but a batch never lacks early or late ones.  `uniform` draws independently.

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
        generator: draws the coins, on its own device.

    Returns:
        noised `[B, L]` long and masked `[B, L]` bool.
    """
    maskable = default_maskable(tokens) if maskable is None else maskable
    where = generator.device if generator is not None else tokens.device
    coins = torch.rand(tokens.shape, generator=generator, device=where).to(tokens.device)
    masked = (coins < times[:, None]) & maskable
    return torch.where(masked, mask_id, tokens), masked


@dataclass
class DiffusionLoss:
    """What one batch says, in nats."""

    loss: Tensor  # scalar: total over the count that `normalize` names
    total: Tensor  # scalar: sum over masked tokens of (cross entropy with the target) / t
    nll: Tensor  # scalar: sum over masked tokens of nll / t, which is total unless a teacher has a part in the target
    token_nll: Tensor  # [num_masked] unweighted, in the order of masked.nonzero(); carries no gradient
    num_masked: int
    num_maskable: Tensor  # scalar, long


def hidden_states(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The last hidden states `[B, L, D]` of a stock causal-LM, without touching its head."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # OPT asks for them beside a 4D mask
    output = model.base_model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` in float32 at least; [MASK], where the model has one, gets no probability.

    The head runs in the weights' own dtype, also under autocast: the logits of an AR base lie far below zero, where
    bfloat16 knows every half only, and ties and shifts what is scored and drawn.
    """
    head = model.get_output_embeddings()
    with _without_autocast(hidden):
        logits = head(hidden.to(head.weight.dtype))
    return _forbid(_at_least_float32(logits), mask_id_of(model))


def mask_id_of(model: nn.Module) -> int | None:
    """The id of [MASK]; None for a model that is not a diffusion model."""
    return getattr(model.config, "mask_token_id", None)


def require_mask_id(model: nn.Module) -> int:
    """The id of [MASK]. Raises ValueError for a model that is not a diffusion model."""
    if mask_id_of(model) is None:
        raise ValueError(
            "this model has no [MASK] token; make it a diffusion model first: as_diffusion(model, tokenizer)"
        )
    return mask_id_of(model)


def chunk_rows(matrix: Tensor) -> int:
    """How many rows of logits to hold at once, for a head `[V, D]`; a product of fewer would be slow."""
    return max(256, CHUNK_ELEMENTS[matrix.device.type] // len(matrix))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _forbid(logits: Tensor, mask_id: int | None) -> Tensor:
    if mask_id is not None and mask_id < logits.shape[-1]:
        logits[..., mask_id] = -torch.inf
    return logits


def _matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of this tensor would run here, autocast considered."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if _is_autocast(kind) else tensor.dtype


def _is_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Matrix products run in the dtype of their factors."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else contextlib.nullcontext()


def diffusion_loss(
    model: nn.Module,
    tokens: Tensor,
    noised: Tensor,
    masked: Tensor,
    times: Tensor,
    *,
    attention_mask: Tensor | None = None,
    shift: bool = True,
    normalize: str = "maskable",
    maskable: Tensor | None = None,
    num_masked: int | None = None,
    teacher: nn.Module | None = None,
    share: float = 0.0,
) -> DiffusionLoss:
    """`1/N * sum over sequences of (1/t) * sum over masked i of -log p(x0_i | x_t)`.

    With a teacher, the AR model that the other one was made from, the target at i is not the token alone but
    `(1 - share) * token + share * teacher's prediction of token i from the clean text before it`.

    With `normalize="maskable"` N counts the maskable tokens: an unbiased estimate of the negative ELBO
    per token (arXiv 2406.03736, equation 8).  `"masked"` divides by the number of masked tokens, as the code
    released with arXiv 2410.17891 does; that is not a bound and depends on the batch size.

    Only masked positions meet the head, a chunk at a time, so no `[B, L, V]` tensor ever exists.

    Args:
        tokens, noised: `[B, L]` long; masked: `[B, L]` bool; times: `[B]`.
        attention_mask: additive `[1, 1, L, L]` from `annealed_mask`, a block mask under flex attention, or None.
        shift: the hidden state at i-1 predicts token i (True), or the one at i (False).
        num_masked: how many positions are masked, from a caller that knows, and knows that position 0 is not one of
            them: a GPU then need not be waited for.
        teacher: a frozen causal LM with the same tokens; [MASK] may be missing in it.
        share: its part of the target, in [0, 1].

    Raises:
        ValueError: position 0 is masked under the shift or with a teacher, or an unknown normalisation.
    """
    if normalize not in ("maskable", "masked"):
        raise ValueError(f"normalize must be maskable or masked, got {normalize!r}")
    maskable = default_maskable(tokens) if maskable is None else maskable

    # 1. The trunk sees the noised sequence.
    hidden = hidden_states(model, noised, attention_mask)  # [B, L, D]

    # 2. Where each masked token is predicted: one position to the left under the shift.
    if num_masked is None:
        num_masked = int(masked.sum())
        if (shift or teacher is not None) and bool(masked[:, 0].any()):
            raise ValueError(
                "position 0 is masked, but under the shift, and by a teacher, it is predicted nowhere; "
                "begin with a begin token"
            )
    rows, columns = masked.nonzero_static(size=num_masked).unbind(1)  # [M], [M]
    sources = hidden[rows, columns - 1 if shift else columns]  # [M, D]

    # 3. What the teacher, which sees all that comes before, would say there.
    known = None
    if teacher is not None and share > 0:
        with torch.no_grad():
            # The mask is what the teacher does anyway; without one transformers waits for the GPU to look for padding.
            closed = annealed_mask(tokens.shape[1], 0.0, dtype=teacher.dtype, device=tokens.device)
            known = hidden_states(teacher, tokens, closed)[rows, columns - 1]  # [M, D']

    # 4. Cross entropies there, and only there, weighed by 1/t; what is only scored is scored as `logits_of` says.
    head = model.get_output_embeddings()
    weights = 1.0 / times[rows]
    learning = torch.is_grad_enabled()
    dtype = _matmul_dtype(sources) if learning else head.weight.dtype
    with _without_autocast(sources):
        total, token_nll = _WeightedNLL.apply(
            sources,
            head.weight,
            head.bias,
            tokens[rows, columns],
            weights,
            mask_id_of(model),
            dtype,
            learning,
            None if known is None else (known, teacher.get_output_embeddings(), share),
        )

    # 5. Divide by a count that does not depend on the draw.
    num_maskable = maskable.sum()
    count = num_maskable if normalize == "maskable" else max(num_masked, 1)
    nll = total.detach() if known is None else (token_nll * weights).sum()
    return DiffusionLoss(total / count, total, nll, token_nll, num_masked, num_maskable)


class _WeightedNLL(torch.autograd.Function):
    """`sum_i weight_i * -sum_v target_iv * log softmax(h_i W^T + b)_v`, never holding more than a chunk of logits.

    The target is the token y_i; with a teacher (its hidden states, its head, its share) a mixture of the token and
    the teacher's softmax.  The gradient of a chunk, (softmax - target) times the weight, is known as soon as its
    softmax is, so it is taken on the spot and the logits are forgotten; the backward pass only scales it.  Exact,
    and cheaper than recomputing the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, mask_id, dtype, needs_grad, teaching=None):
        matrix = weight.to(dtype)  # [V, D]
        rows = chunk_rows(matrix)
        nll = torch.empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        loss = nll if teaching is None else torch.empty_like(nll)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=nll.dtype) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=nll.dtype) if needs_grad and bias is not None else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            source, target, share = hidden[part].to(dtype), targets[part, None], 0.0
            logits = _at_least_float32(F.linear(source, matrix, None if bias is None else bias.to(dtype)))
            if teaching is not None:
                belief, share = _belief(part, mask_id, dtype, *teaching)  # [m, V'], V' <= V
                expected = (belief * logits[:, : belief.shape[1]]).sum(-1)  # where [MASK] still is finite
            logits = _forbid(logits, mask_id)
            log_total, right = logits.logsumexp(-1, keepdim=True), logits.gather(-1, target)  # [m, 1]
            nll[part] = (log_total - right)[:, 0]
            if teaching is not None:
                loss[part] = nll[part] + share * (right[:, 0] - expected)
            if needs_grad:
                slope = logits.sub_(log_total).exp_()  # softmax [m, V]
                slope.scatter_add_(-1, target, torch.full_like(log_total, share - 1.0))
                if teaching is not None:
                    slope[:, : belief.shape[1]].sub_(belief, alpha=share)
                slope = slope.mul_(weights[part, None]).to(dtype)
                grad_hidden[part] = slope @ matrix
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(slope.T, source)  # no second [V, D]
                else:
                    grad_weight += _summed(slope, source, weights[part])
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=grad_bias.dtype)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return (loss * weights).sum(), nll

    @staticmethod
    def backward(ctx, grad_total, _):
        if ctx.grads is None:
            raise RuntimeError("this loss was differentiated before; its gradients are not kept, compute it again")
        grads, ctx.grads = ctx.grads, None  # handed on, not copied: the one of the head is as large as the head
        grads = [None if grad is None else grad.mul_(grad_total) for grad in grads]
        grads = [grad if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None, None, None


def _summed(slope: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """`slope^T source`, `[V, D]`.

    A sum over weights of 1/t may leave float16, and the loss scale, which comes later, could not mend that. No entry
    of a row exceeds its weight, so a source that is made small enough beforehand keeps the sum within.
    """
    if slope.dtype != torch.float16:
        return slope.T @ source
    largest = weights.sum() * source.abs().amax()
    room = (torch.finfo(torch.float16).max / largest).clamp(max=1.0).log2().sub(1).floor().exp2()  # of two: exact
    return (slope.T @ (source * room)).float().div_(room)


def _belief(part: slice, mask_id, dtype, known: Tensor, head: nn.Module, share: float) -> tuple[Tensor, float]:
    """The teacher's softmax for a chunk, with nothing for [MASK], and its share."""
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = F.linear(known[part].to(dtype), head.weight.to(dtype), bias)
    return _forbid(_at_least_float32(logits), mask_id).softmax(-1), share
