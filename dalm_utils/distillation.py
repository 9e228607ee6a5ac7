"""How much of the training target a frozen AR base should get on a text that it may know badly.

A base that was trained on text like this predicts tokens far better than their frequencies do, and most of the target
may be its prediction. A base that was not is confidently wrong, and a model that imitates it has to unlearn that later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .annealing import annealed_mask
from .corpus import Blocks
from .objective import default_maskable, diffusion_loss

UNIGRAM_BLOCKS = 2_000  # at most this many training blocks are counted for token frequencies
BATCH = 32  # blocks in one forward pass of the teacher
MAX_LOG_RATIO = 50.0  # nats; larger ratios of probabilities do not change the answer and could overflow


@torch.no_grad()
def fit_distill(teacher: nn.Module, train: Blocks, held_out: Blocks, largest: float) -> float:
    """`choose_distill` for a text. It costs one pass of the teacher over the held-out blocks.

    Args:
        teacher: an AR model, run in the dtype of its weights.
        train, held_out: blocks of the text.
        largest: an upper bound, the configured `distill`.
    """
    blocks = held_out[list(range(len(held_out)))]  # [N, L]
    counted = train[list(range(0, len(train), -(-len(train) // UNIGRAM_BLOCKS)))][:, 1:]
    causal = annealed_mask(blocks.shape[1], 0.0, dtype=teacher.dtype, device=teacher.device)
    nll = []
    for tokens in blocks.to(teacher.device).split(BATCH):
        everything, ones = default_maskable(tokens), torch.ones(len(tokens), device=tokens.device)
        nll.append(diffusion_loss(teacher, tokens, tokens, everything, ones, attention_mask=causal).token_nll.cpu())
    vocab = 1 + int(max(blocks.max(), counted.max()))
    frequencies = unigram_nll(counted, blocks[:, 1:].flatten(), vocab)
    return choose_distill(torch.cat(nll), frequencies, largest)


def unigram_nll(train_tokens: Tensor, held_out: Tensor, vocab_size: int) -> Tensor:
    """-log p of each held-out token under the add-one-smoothed frequencies of the training tokens, in nats.

    Args:
        train_tokens, held_out: token ids below `vocab_size`, integers of any shape.

    Returns:
        float64, of the shape of `held_out`.
    """
    counts = torch.bincount(train_tokens.flatten(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out]


def choose_distill(teacher_nll: Tensor, frequency_nll: Tensor, largest: float) -> float:
    """The `distill` that a text deserves: the weight of the teacher's prediction in the target, against 1 of the token.

    Mix the teacher with a model that knows token frequencies and nothing else, and take the teacher's fraction of the
    mixture that makes held-out tokens most likely (linear interpolation with held-out estimation, Jelinek and Mercer,
    1980):

        fraction = argmax over s in [0, largest / (1 + largest)] of
                   mean over tokens of log(s * p_teacher(token) + (1 - s) * p_unigram(token))
        distill = fraction / (1 - fraction)

    The objective is concave in s, so the maximum is where its slope changes sign, or at an end of the interval.

    Args:
        teacher_nll: -log p of each held-out token given the tokens before it, in nats, any shape.
        frequency_nll: the same tokens under their frequencies in the training split, see `unigram_nll`.
        largest: an upper bound, the configured `distill`.

    Returns:
        a number in [0, largest].

    Raises:
        ValueError: no tokens, unequal numbers of them, an NLL that is not finite, or a `largest` that is negative or
            not finite.
    """
    if not 0 <= largest < float("inf"):
        raise ValueError(f"largest must be finite and not negative, got {largest}")
    if teacher_nll.shape != frequency_nll.shape or not teacher_nll.numel():
        raise ValueError(
            "need the NLLs of the same held-out tokens, at least one, "
            f"got shapes {tuple(teacher_nll.shape)} and {tuple(frequency_nll.shape)}"
        )
    log_ratio = frequency_nll.double() - teacher_nll.double().to(frequency_nll.device)
    if not log_ratio.isfinite().all():
        raise ValueError("an NLL of a held-out token is infinite or NaN; check the teacher's weights and precision")
    gain = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1()  # p_teacher / p_unigram - 1

    def slope(fraction: float) -> float:
        return (gain / (1 + fraction * gain)).mean().item()

    low, high = 0.0, largest / (1 + largest)
    if slope(high) >= 0:
        return largest
    if slope(low) <= 0:
        return 0.0
    for _ in range(50):  # to the last digits of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low / (1 - low)
