"""All vocabulary-sized computations, a chunk of rows at a time: logits, cross entropies and their gradients.

V tokens, D hidden dimensions, M predictions. No `[M, V]` tensor of all predictions ever exists.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # logits held at once: more leave a CPU's cache, fewer starve a GPU
ALIGNMENT = {"cpu": 1, "cuda": 64}  # `weighted_nll` pads the vocabulary to a multiple, for tensor cores


def chunk_rows(weight: Tensor) -> int:
    """How many rows of logits to hold at once for a head `[V, D]`: at least 256, since smaller products are slow."""
    return max(256, CHUNK_ELEMENTS[weight.device.type] // len(weight))


def mask_id_of(model: nn.Module) -> int | None:
    """The id of [MASK]; None for a model that is not a diffusion model."""
    return getattr(model.config, "mask_token_id", None)


def is_shifted(model: nn.Module) -> bool:
    """Whether the state at i-1 predicts token i: a model's setting, and so in an AR model, which has none."""
    return getattr(model.config, "shift", True)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` of hidden states `[..., D]`, in float32 or wider; [MASK] gets -inf.

    The head runs in the dtype of its weights, even under autocast: an AR model's logits are around -100, where
    bfloat16 has a spacing of 0.5, and rounding there changes likelihoods and creates ties.
    """
    head = model.get_output_embeddings()
    with _without_autocast(hidden):
        return _forbid(_logits(hidden, head.weight, head.bias), mask_id_of(model))


def weighted_nll(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    teacher: nn.Module | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum_i weight_i * cross entropy_i`, a scalar, and each token's -log p `[M]` without a gradient, in nats.

    The target at i is the token, or with a teacher `(1 - w) * token + w * softmax(teacher's logits)`.

    Args:
        hidden: `[M, D]`, the states that predict.
        targets: `[M]` long, the tokens to predict.
        weights: `[M]` float32. Where a weight is 0, so is the gradient.
        teacher: a frozen causal LM with the same vocabulary, except perhaps for [MASK].
        teacher_hidden: `[M, D']`, its states that predict the same tokens.
        teacher_weight: w, a float32 scalar in [0, 1] on the device of `hidden`.
    """
    head = model.get_output_embeddings()
    needs_grad = torch.is_grad_enabled()
    dtype = matmul_dtype(hidden) if needs_grad else head.weight.dtype  # for scores the head's own, as in `logits_of`
    teaching = None if teacher is None else (teacher_hidden, teacher.get_output_embeddings(), teacher_weight)
    with _without_autocast(hidden):
        return _WeightedNLL.apply(
            hidden, head.weight, head.bias, targets, weights, mask_id_of(model), dtype, needs_grad, teaching
        )


class _WeightedNLL(torch.autograd.Function):
    """Computes gradients in the forward pass.

    A chunk's gradient, (softmax - target) * weight, follows from its softmax, so the logits need not be kept; the
    backward pass only scales it. This is exact, and cheaper than computing the logits twice.
    """

    @staticmethod
    def forward(ctx, hidden, matrix, bias, targets, weights, mask_id, dtype, needs_grad, teaching):
        padded, offsets, vocab = matrix.to(dtype), None if bias is None else bias.to(dtype), len(matrix)
        if extra := -vocab % ALIGNMENT[matrix.device.type]:
            padded = F.pad(padded, (0, 0, 0, extra))  # [V + extra, D]
            offsets = None if offsets is None else F.pad(offsets, (0, extra))
        rows = chunk_rows(padded)
        nll = torch.empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        loss = nll if teaching is None else torch.empty_like(nll)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_matrix = torch.zeros_like(matrix, dtype=nll.dtype) if needs_grad and matrix.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=nll.dtype) if bias is not None and grad_matrix is not None else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            source, target = hidden[part], targets[part, None]  # [m, D], [m, 1]
            logits = _logits(source, padded, offsets)  # [m, V + extra]
            taught = None if teaching is None else _Taught(logits, target, part, mask_id, dtype, *teaching)
            logits = _forbid(logits, mask_id)
            logits[:, vocab:] = -torch.inf
            log_p = logits.log_softmax(-1)  # one kernel, where logsumexp makes several passes over memory
            del logits
            nll[part] = -log_p.gather(-1, target)[:, 0]
            if taught is not None:
                loss[part] = nll[part] + taught.excess
            if needs_grad:
                softmax = log_p.exp_()
                error = _minus_token(softmax, target) if taught is None else taught.minus_target(softmax)
                error = error.mul_(weights[part, None]).to(dtype)
                grad_hidden[part] = error @ padded
                if grad_matrix is not None:  # else the head is frozen
                    _add_head_gradient(grad_matrix, grad_bias, error, source.to(dtype), weights[part])
        ctx.grads = grad_hidden, grad_matrix, grad_bias
        ctx.dtypes = hidden.dtype, matrix.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return (loss.masked_fill(weights == 0, 0.0) * weights).sum(), nll  # an unused place may have an infinite NLL

    @staticmethod
    def backward(ctx, grad_total, _):
        if ctx.grads is None:
            raise RuntimeError(
                "backward was called on this loss before, and its gradients were not kept; compute it again"
            )
        grads, ctx.grads = ctx.grads, None  # scaled in place, without another [V, D]
        grads = [None if grad is None else grad.mul_(grad_total) for grad in grads]
        grads = [grad if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None, None, None


def _minus_token(softmax: Tensor, target: Tensor) -> Tensor:
    """softmax - token, in place: the gradient of the token's cross entropy by the logits."""
    return softmax.scatter_add_(-1, target, softmax.new_full(target.shape, -1.0))


class _Taught:
    """What a teacher changes for a chunk of M predictions: the target is (1 - w) * token + w * q, its prediction.

    Attributes:
        excess: `[M]`, the cross entropy of this target minus that of the token.
    """

    def __init__(self, logits, target, part, mask_id, dtype, hidden, head, weight):
        bias = None if head.bias is None else head.bias.to(dtype)
        q = _forbid(_logits(hidden[part], head.weight.to(dtype), bias), mask_id).softmax(-1)  # [M, V'], V' <= V
        expected = (q * logits[:, : q.shape[1]]).sum(-1)  # no logit is -inf yet
        self.excess = weight * (logits.gather(-1, target)[:, 0] - expected)
        self.target, self.q, self.weight = target, q, weight

    def minus_target(self, softmax: Tensor) -> Tensor:
        """softmax - target, in place."""
        softmax.scatter_add_(-1, self.target, (self.weight - 1.0).to(softmax.dtype).expand(self.target.shape))
        softmax[:, : self.q.shape[1]].addcmul_(self.q, self.weight, value=-1.0)
        return softmax


def _add_head_gradient(grad_matrix: Tensor, grad_bias: Tensor | None, error: Tensor, source: Tensor, weights: Tensor):
    """Add a chunk's part of the gradients of the head's matrix, `error^T source`, and bias.

    A sum over weights of 1/t can overflow float16, and the loss scale is applied only after this sum. No entry of a
    row exceeds the row's weight, so scaling the source down beforehand, by a power of two, bounds the sum.
    """
    vocab = len(grad_matrix)  # the error has columns for padding, too
    if error.dtype == grad_matrix.dtype:
        grad_matrix.addmm_(error[:, :vocab].T, source)  # in place, without a second [V, D]
    elif error.dtype != torch.float16:
        grad_matrix += (error.T @ source)[:vocab]
    else:
        largest = weights.sum() * source.abs().amax()
        scale = (torch.finfo(torch.float16).max / largest).clamp(max=1.0).log2().sub(1).floor().exp2()
        grad_matrix += (error.T @ (source * scale)).float().div_(scale)[:vocab]
    if grad_bias is not None:
        grad_bias += error[:, :vocab].sum(0, dtype=grad_bias.dtype)


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden matrix^T + bias`, computed in the dtype of the matrix, in float32 or wider."""
    logits = _linear(hidden.to(matrix.dtype), matrix, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`. On a CPU the rows of float32 logits begin at multiples of 64 bytes, where products are faster.

    [MASK] makes the vocabulary odd, and in rows of an odd length hardly any row is aligned.
    """
    vocab, on_cpu = len(weight), source.device.type == "cpu"
    if vocab % 16 == 0 or not on_cpu or source.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(source, weight, bias)
    rows = source.reshape(-1, source.shape[-1])
    logits = source.new_empty(len(rows), vocab + -vocab % 16)[:, :vocab]
    if bias is None:
        torch.mm(rows, weight.T, out=logits)
    else:
        torch.addmm(bias, rows, weight.T, out=logits)
    return logits.view(*source.shape[:-1], vocab)


def _forbid(logits: Tensor, mask_id: int | None) -> Tensor:
    if mask_id is not None and mask_id < logits.shape[-1]:
        logits[..., mask_id] = -torch.inf
    return logits


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of this tensor would run here, taking autocast into account."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if _is_autocast(kind) else tensor.dtype


def _is_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which matrix products run in the dtype of their inputs."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else contextlib.nullcontext()
