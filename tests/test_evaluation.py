import itertools
import math

import numpy as np
import pytest
import torch

from dalm_utils import (
    Estimate,
    ar_nll,
    continuation_nelbo,
    evaluation,
    nelbo,
    paired_difference,
)
from dalm_utils.backbone import encode, hidden_states
from dalm_utils.head import logits_of
from tests.helpers import tiny_diffusion, tiny_model, tiny_tokenizer


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


def test_choices_of_one_length_are_scored_under_the_same_masks_whatever_comes_before(monkeypatch):
    model, tokenizer = tiny_diffusion()
    seen, score = [], evaluation._token_means
    monkeypatch.setattr(
        evaluation, "_token_means", lambda *given: seen.append((given[1], given[3])) or score(*given)
    )  # tokens and what is masked
    for prompt in ("Return the sum", "Return"):
        continuation_nelbo(model, tokenizer, prompt, " of an array", num_samples=8)
    ends = [masked[:, -len(encode(tokenizer, [" of an array"])[0]) :] for _, masked in seen]
    assert torch.equal(*ends) and seen[0][0].shape[1] > seen[1][0].shape[1]
    assert all(masked.sum() == end.sum() for (_, masked), end in zip(seen, ends, strict=True))  # nothing else is


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


def test_each_block_draws_one_size_from_each_stratum_and_any_positions():
    n, count, rows = 12, 4, 3000
    sets = evaluation._random_sets(rows, n, count, torch.Generator().manual_seed(0))
    sizes = sets.sum(1).view(rows, count)
    strata = torch.arange(count) * n // count
    assert ((sizes > strata) & (sizes <= strata + n // count)).all()
    for size in range(1, n + 1):  # 3 sizes in a stratum, 3000 draws of it: 1000 each, give or take 26
        assert abs(int((sizes == size).sum()) - 1000) < 5 * 26
    shares = sets[sets.sum(1) == 6].double().mean(0)  # half of the positions, each as often as any other
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 1000**0.5
    uneven = evaluation._random_sets(2000, 5, 3, torch.Generator().manual_seed(0)).sum(1)  # n is no multiple of S
    assert all(abs(int((uneven == size).sum()) - 1200) < 5 * 31 for size in range(1, 6))


def test_bits_are_per_byte_of_the_text_and_nats_per_token_of_it():
    model, tokenizer = tiny_diffusion()
    texts = ["Zürich: π ≈ 3", "axis=0, ünïcode ∑"]
    blocks = [torch.tensor([tokenizer.bos_token_id, *ids[:12]]) for ids in encode(tokenizer, texts)]
    estimate = nelbo(model, tokenizer, blocks, num_samples=1, precision="fp32")
    written = [tokenizer.decode(block[1:]) for block in blocks]
    assert estimate.tokens == 24 and estimate.bytes == sum(len(text.encode()) for text in written)
    assert estimate.bytes > sum(map(len, written))


def test_units():
    estimate = Estimate(np.array([1.0, 3.0]), tokens=20, bytes=50)
    assert estimate.mean == 2.0 and estimate.perplexity == pytest.approx(math.e**2)
    assert estimate.stderr == pytest.approx(1.0)
    assert estimate.bits_per_byte == pytest.approx(2.0 / math.log(2) * 20 / 50)
    better = Estimate(np.array([0.5, 2.0]), tokens=20, bytes=50)
    difference, error = paired_difference(better, estimate)
    assert difference == -0.75 and error == pytest.approx(0.25)


def test_what_cannot_be_scored_is_named():
    model, tokenizer = tiny_diffusion()
    blocks = torch.ones(2, 100, dtype=torch.long)
    for score in (nelbo, ar_nll):
        with pytest.raises(ValueError, match="length 100 is more than the model's 64 positions"):
            score(model, tokenizer, blocks)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        nelbo(model, tokenizer, blocks[:, :8], num_samples=0)
    with pytest.raises(ValueError, match=r"no \[MASK\] token; make it a diffusion model first"):
        nelbo(tiny_model(vocab=len(tokenizer)), tokenizer, blocks[:, :8])


def test_progress_is_shown_on_request(capsys):
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    for progress in (False, True):
        nelbo(model, tokenizer, blocks, num_samples=1, progress=progress)
        shown = capsys.readouterr()
        assert shown.out == "" and ("scoring" in shown.err) == progress
