import itertools
import math

import numpy as np
import pytest
import torch

from dalm_utils import Estimate, ar_nll, nelbo, paired_difference, text_quality
from dalm_utils.objective import hidden_states, logits_of
from tests.helpers import tiny_diffusion, tiny_model, tiny_tokenizer


def exact_nelbo(model, block):
    """The mean over sizes k of the mean over sets of size k of the mean -log p: every mask enumerated."""
    n, shift = len(block) - 1, model.config.shift
    by_size = {k: [] for k in range(1, n + 1)}
    for bits in itertools.product((False, True), repeat=n):
        if any(bits):
            masked = torch.tensor([False, *bits])
            noised = torch.where(masked, model.config.mask_token_id, block)[None]
            log_p = logits_of(model, hidden_states(model, noised))[0].log_softmax(-1)
            scores = [-log_p[i - 1 if shift else i, block[i]].item() for i in masked.nonzero()[:, 0]]
            by_size[sum(bits)].append(np.mean(scores))
    return np.mean([np.mean(means) for means in by_size.values()])


@pytest.mark.parametrize("shift", [True, False])
@torch.no_grad()
def test_nelbo_is_unbiased(shift):
    model, tokenizer = tiny_diffusion(shift=shift)
    block = torch.tensor([0, 7, 99, 240, 31, 8])
    estimate = nelbo(model, tokenizer, block.repeat(800, 1), num_samples=4, precision="fp32")
    assert estimate.mean == pytest.approx(exact_nelbo(model, block), abs=4 * estimate.stderr)
    assert estimate.stderr < 0.05


def test_the_same_seed_gives_every_model_the_same_masks_whatever_the_batch_size():
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 320, (6, 16), generator=torch.Generator().manual_seed(0))
    one, other = (nelbo(model, tokenizer, blocks, batch_size=size, precision="fp32") for size in (32, 5))
    np.testing.assert_allclose(one.per_block, other.per_block, rtol=1e-5)


def test_ar_nll_is_the_models_own_loss_also_after_adaptation():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    blocks = torch.randint(1, 320, (5, 12), generator=torch.Generator().manual_seed(0))
    own = model(blocks, labels=blocks).loss.item()
    estimate = ar_nll(model, tokenizer, blocks, precision="fp32")
    assert estimate.mean == pytest.approx(own, rel=1e-5)
    model.config.is_causal = False  # what a diffusion model's config says: the causal mask is given explicitly
    assert ar_nll(model, tokenizer, blocks, precision="fp32").mean == pytest.approx(own, rel=1e-5)


def test_units():
    estimate = Estimate(np.array([1.0, 3.0]), tokens=20, bytes=50)
    assert estimate.mean == 2.0 and estimate.perplexity == pytest.approx(math.e**2)
    assert estimate.stderr == pytest.approx(1.0)
    assert estimate.bits_per_byte == pytest.approx(2.0 / math.log(2) * 20 / 50)
    better = Estimate(np.array([0.5, 2.0]), tokens=20, bytes=50)
    difference, error = paired_difference(better, estimate)
    assert difference == -0.75 and error == pytest.approx(0.25)


def test_quality_sees_repetition():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    varied = torch.arange(1, 33).repeat(2, 1)
    stuck = torch.full((2, 32), 7)
    good, bad = (text_quality(model, tokenizer, tokens) for tokens in (varied, stuck))
    assert good.entropy == pytest.approx(math.log(31)) and bad.entropy == 0
    assert good.repetition == 0 and bad.repetition == pytest.approx(30 / 31)
    assert good.distinct_2 == 1 and bad.distinct_2 == pytest.approx(1 / 30)
    assert good.perplexity == pytest.approx(ar_nll(model, tokenizer, varied).perplexity)
