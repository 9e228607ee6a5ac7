import itertools
import math

import numpy as np
import pytest
import torch

from dalm_utils import (
    Estimate,
    ar_nll,
    as_diffusion,
    continuation_nelbo,
    evaluation,
    nelbo,
    paired_difference,
    text_quality,
)
from dalm_utils.corpus import encode
from dalm_utils.objective import hidden_states, logits_of
from dalm_utils.quality import infilling
from tests.helpers import TEXTS, tiny_diffusion, tiny_model, tiny_tokenizer


def exact_nelbo(model, block, given=1):
    """The mean over sizes k of the mean over sets of size k of the mean -log p: every mask enumerated."""
    n, shift = len(block) - given, model.config.shift
    by_size = {k: [] for k in range(1, n + 1)}
    for bits in itertools.product((False, True), repeat=n):
        if any(bits):
            masked = torch.tensor([False] * given + list(bits))
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


@torch.no_grad()
def test_the_nelbo_of_a_continuation_is_unbiased_and_never_free():
    model, tokenizer = tiny_diffusion()
    prompt, continuation = "Return the sum", " of an array"
    before, after = encode(tokenizer, [prompt, continuation])
    block = torch.tensor([tokenizer.bos_token_id, *before, *after])
    exact = exact_nelbo(model, block, given=1 + len(before)) * len(after)
    nats, error = continuation_nelbo(model, tokenizer, prompt, continuation, num_samples=2000, precision="fp32")
    assert nats == pytest.approx(exact, abs=4 * error) and error < 0.05 * exact
    for seed in range(20):  # a single draw masks something, however short the continuation
        assert continuation_nelbo(model, tokenizer, prompt, "a", num_samples=1, seed=seed, precision="fp32")[0] > 1
    with pytest.raises(ValueError, match="no token to score"):
        continuation_nelbo(model, tokenizer, prompt, "")


@torch.no_grad()
def test_the_nelbo_of_one_token_is_exact():
    model, tokenizer = tiny_diffusion()
    before, after = encode(tokenizer, ["Return the sum", " of"])
    assert len(after) == 1
    exact = exact_nelbo(model, torch.tensor([tokenizer.bos_token_id, *before, *after]), given=1 + len(before))
    nats, error = continuation_nelbo(model, tokenizer, before, after, num_samples=4, precision="fp32")
    assert nats == pytest.approx(exact, rel=1e-5) and error == 0


def test_the_standard_error_agrees_with_a_bootstrap_over_documents():
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 320, (64, 16), generator=torch.Generator().manual_seed(0))
    estimate = nelbo(model, tokenizer, blocks, num_samples=2, precision="fp32")
    pick = np.random.default_rng(0).integers(64, size=(4000, 64))
    assert estimate.stderr == pytest.approx(estimate.per_block[pick].mean(1).std(), rel=0.2)


def test_the_same_seed_gives_every_model_the_same_masks_whatever_the_batch_size(monkeypatch):
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 320, (6, 16), generator=torch.Generator().manual_seed(0))
    one, other = (nelbo(model, tokenizer, blocks, batch_size=size, precision="fp32") for size in (32, 5))
    np.testing.assert_allclose(one.per_block, other.per_block, rtol=1e-5)
    seen = []

    def spy(model, tokens, noised, masked, *rest):
        seen.append(masked)
        return torch.ones(len(masked), dtype=torch.float64)

    monkeypatch.setattr(evaluation, "_token_means", spy)
    for seed, other in ((0, model), (0, tiny_diffusion("opt")[0]), (1, model)):
        nelbo(other, tokenizer, blocks, seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


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


# --------------------------------------------------------------------------------------------------- infilling
def knows_by_heart(block, diffusion, shift=True):
    """A model whose prediction is the token of `block` [L] at each place, whatever it sees."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab=len(tokenizer), tied=False)
    if diffusion:
        model, tokenizer = as_diffusion(model, tokenizer, shift=shift)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_f" not in name:
                weight.zero_()
        for place in range(len(block) - (1 if shift else 0)):
            model.transformer.wpe.weight[place, place] = 1.0
            model.lm_head.weight[block[place + (1 if shift else 0)], place] = 20.0
    return model, tokenizer


@pytest.mark.parametrize("diffusion, shift", [(True, True), (True, False), (False, True)])
def test_a_model_that_knows_the_text_restores_every_gap(diffusion, shift):
    tokenizer = tiny_tokenizer()
    block = torch.tensor([tokenizer.bos_token_id, *encode(tokenizer, TEXTS[:1])[0]][:16])
    model, tokenizer = knows_by_heart(block, diffusion, shift)
    quality = infilling(model, tokenizer, block.repeat(6, 1), gap=6, batch_size=4, precision="fp32")
    assert quality.filled.shape == (6, 6) and len(quality.filled.unique(dim=0)) > 1  # gaps at different places
    assert quality.mean == dict.fromkeys(("token_match", "exact_match", "rouge1", "rouge2", "rougeL"), 1.0)
    assert set(quality.stderr.values()) == {0.0}


def test_a_model_that_knows_nothing_restores_next_to_nothing():
    model, tokenizer = tiny_diffusion()
    ids = torch.tensor(encode(tokenizer, [" ".join(TEXTS)])[0][: 20 * 31]).view(20, 31)
    blocks = torch.cat([torch.full((20, 1), tokenizer.bos_token_id), ids], 1)
    quality = infilling(model, tokenizer, blocks, gap=8, precision="fp32")
    assert quality.mean["token_match"] < 0.1 and quality.mean["exact_match"] == 0 and quality.mean["rouge1"] < 0.2
    assert quality.stderr["token_match"] == pytest.approx(quality.per_block["token_match"].std(ddof=1) / 20**0.5)


def test_an_ar_model_sees_the_prefix_alone_and_a_diffusion_model_both_sides():
    tokenizer = tiny_tokenizer()
    blocks = torch.randint(1, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    blocks[:, 0] = tokenizer.bos_token_id
    gap = 18  # starts at 2 to 5
    others = blocks.clone()
    others[:, 6:] = blocks[:, 6:].flip(0)  # what stands in the gap from 6 on, and after it
    filled = {}
    for name, (model, words) in {"ar": (tiny_model(vocab=320), tokenizer), "diffusion": tiny_diffusion()}.items():
        filled[name] = [infilling(model, words, rows, gap=gap, precision="fp32").filled for rows in (blocks, others)]
    assert torch.equal(*filled["ar"]) and not torch.equal(*filled["diffusion"])


def test_a_gap_without_words_has_no_rouge_and_one_that_does_not_fit_is_refused():
    tokenizer = tiny_tokenizer()
    stops = torch.tensor([tokenizer.bos_token_id, *encode(tokenizer, ["." * 9])[0]])
    model, tokenizer = knows_by_heart(stops, diffusion=True)
    quality = infilling(model, tokenizer, stops[None], gap=2, precision="fp32")
    assert quality.mean["exact_match"] == 1 and math.isnan(quality.mean["rouge1"])
    assert math.isnan(quality.stderr["exact_match"])  # one block tells nothing about its spread
    for gap in (0, len(stops) - 2):
        with pytest.raises(ValueError, match=f"1 to {len(stops) - 3}, got {gap}"):
            infilling(model, tokenizer, stops[None], gap=gap)


def test_progress_is_shown_on_request(capsys):
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    for progress in (False, True):
        nelbo(model, tokenizer, blocks, num_samples=1, progress=progress)
        infilling(model, tokenizer, blocks, gap=2, progress=progress)
        shown = capsys.readouterr()
        assert shown.out == "" and [word in shown.err for word in ("scoring", "infilling")] == [progress] * 2
