import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalm_utils import (
    Estimate,
    Restored,
    annealed_mask,
    ar_nll,
    by_time,
    continuation_nelbo,
    evaluation,
    load_base,
    load_corpus,
    nelbo,
    paired_difference,
    train,
)
from dalm_utils.backbone import hidden_states
from dalm_utils.corpus import Blocks
from dalm_utils.evaluation import standard_error
from dalm_utils.head import logits_of
from dalm_utils.objective import seeded
from dalm_utils.tokens import encode
from tests.helpers import TEXTS, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer
from tests.test_documents import write_lines


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


def blocks_of_documents(count=40, length=16):
    """Blocks from documents of uneven lengths, each of which repeats a few tokens of its own."""
    draws, documents = np.random.default_rng(0), []
    for _ in range(count):
        documents += [draws.choice(draws.integers(1, 320, 3), draws.integers(20, 120)), [0]]
    return Blocks(np.concatenate(documents), length, begin=0)


@pytest.mark.parametrize("score", [partial(nelbo, num_samples=2), ar_nll])
def test_the_standard_error_agrees_with_a_bootstrap_over_documents(score):
    model, tokenizer = tiny_diffusion()
    blocks = blocks_of_documents()
    estimate = score(model, tokenizer, blocks, precision="fp32")
    numbers = np.unique(blocks.documents, return_inverse=True)[1]
    count = numbers.max() + 1
    sums, sizes = np.bincount(numbers, estimate.per_block), np.bincount(numbers)
    pick = np.random.default_rng(0).integers(count, size=(4000, count))
    drawn = sums[pick].sum(1) / sizes[pick].sum(1)  # the mean over the blocks of documents drawn with replacement
    assert estimate.stderr == pytest.approx(drawn.std(), rel=0.15)
    alone = score(model, tokenizer, blocks[:], precision="fp32")  # a tensor does not know its documents
    assert np.array_equal(alone.per_block, estimate.per_block) and alone.stderr < 0.75 * estimate.stderr


def test_a_difference_counts_documents_too():
    model, tokenizer = tiny_diffusion()
    blocks = blocks_of_documents()
    first, second = (ar_nll(m, tokenizer, blocks, precision="fp32") for m in (model, tiny_diffusion("opt")[0]))
    difference, error = paired_difference(first, second)
    assert difference == pytest.approx(first.mean - second.mean)
    assert error == standard_error(first.per_block - second.per_block, blocks.documents)
    unaware = ar_nll(tiny_diffusion("opt")[0], tokenizer, blocks[:], precision="fp32")
    assert paired_difference(first, unaware) == (difference, error)
    assert paired_difference(unaware, first) == (-difference, error)


@pytest.mark.parametrize(
    "documents, expected",
    [
        ([0, 1, 2, 3], np.std([1, 2, 4, 9], ddof=1) / 2),
        (None, np.std([1, 2, 4, 9], ddof=1) / 2),
        ([5, 5, 7, 7], math.sqrt(2 * (5.0**2 + 5.0**2)) / 4),  # the mean is 4, the sums of the differences -5 and 5
        ([3, 3, 3, 3], math.nan),
    ],
)
def test_the_formula_of_the_standard_error(documents, expected):
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert standard_error(values, documents and np.array(documents)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_a_sample_of_blocks_speaks_for_a_text_of_long_documents_which_its_first_blocks_do_not(tmp_path):
    """Documents from all that a shipped model knows to all that it does not, each longer than 64 blocks."""
    model, tokenizer = load_base("tiny-gpt2")
    draws, texts = np.random.default_rng(0), []
    for known in draws.random(40):
        strange = [" ".join("".join(draws.choice([*"bcdfghjklm"], 4)) for _ in range(8)) for _ in range(60)]
        texts.append(" ".join(draws.choice(TEXTS if draws.random() < known else strange) for _ in range(60)))
    corpus = load_corpus(write_lines(tmp_path / "t.jsonl", [{"text": t} for t in texts]), tokenizer, cache=tmp_path)
    sample = ar_nll(model, tokenizer, corpus.blocks("train", 17, 64), precision="fp32")
    whole = ar_nll(model, tokenizer, corpus.blocks("train", 17), precision="fp32", batch_size=256)
    assert len(set(sample.documents)) > 20
    assert abs(sample.mean - whole.mean) < 2 * sample.stderr

    windows = whole.per_block[: len(whole.per_block) // 64 * 64].reshape(-1, 64)  # 64 blocks one after another
    claimed = np.mean([standard_error(window) for window in windows])
    spread = windows.mean(1).std(ddof=1)
    assert len(set(whole.documents[:64])) == 1 and spread > 3 * claimed


def test_a_run_counts_the_documents_of_its_held_out_blocks(tmp_path):
    config = tiny_config(tmp_path, eval_blocks=8, sample_every=0)
    model, tokenizer = tiny_diffusion()
    history = train(model, tokenizer, config)
    blocks = load_corpus(config.text, tokenizer).blocks("validation", config.length, config.eval_blocks)
    again = nelbo(model, tokenizer, blocks, num_samples=config.eval_samples, precision="fp32")
    assert history.last("nelbo_stderr") == pytest.approx(again.stderr)
    assert again.stderr != pytest.approx(standard_error(again.per_block), rel=1e-3)


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
    sets = evaluation._random_sets(torch.ones(rows, n).bool(), count, torch.Generator().manual_seed(0))
    sizes = sets.sum(1).view(rows, count)
    strata = torch.arange(count) * n // count
    assert ((sizes > strata) & (sizes <= strata + n // count)).all()
    for size in range(1, n + 1):  # 3 sizes in a stratum, 3000 draws of it: 1000 each, give or take 26
        assert abs(int((sizes == size).sum()) - 1000) < 5 * 26
    shares = sets[sets.sum(1) == 6].double().mean(0)  # half of the positions, each as often as any other
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 1000**0.5
    uneven = evaluation._random_sets(torch.ones(2000, 5).bool(), 3, torch.Generator().manual_seed(0)).sum(
        1
    )  # n is no multiple of S
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


def test_blocks_that_spell_nothing_have_no_bits_per_byte():
    model, tokenizer = tiny_diffusion()
    estimate = nelbo(model, tokenizer, torch.zeros(2, 8, dtype=torch.long), num_samples=1, precision="fp32")
    assert estimate.bytes == 0 and math.isnan(estimate.bits_per_byte) and estimate.mean > 0


@pytest.mark.parametrize(
    "other, message",
    [
        (Estimate(np.ones(3), 30, 30), "got 2 and 3 blocks$"),
        (Estimate(np.ones(1), 10, 10), "got 2 and 1 blocks$"),
        (Estimate(np.ones(2), 20, 20, np.array([1, 2])), "got 2 and 2 blocks of other documents"),
    ],
)
def test_a_difference_of_other_blocks_is_refused(other, message):
    estimate = Estimate(np.ones(2), 20, 20, np.array([1, 1]))
    with pytest.raises(ValueError, match=message):
        paired_difference(estimate, other)


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


# ------------------------------------------------------------------------------------- by the fraction hidden
def plain_restored(model, blocks, t, shift, causal):
    """Block by block, from all logits."""
    coins = torch.rand(blocks.shape, generator=seeded(0, 0, "by time"))
    hidden = (coins < t) & (torch.arange(blocks.shape[1]) > 0)
    mask_id = getattr(model.config, "mask_token_id", None)
    read = blocks if mask_id is None else torch.where(hidden, mask_id, blocks)
    options = dict(attention_mask=annealed_mask(blocks.shape[1], 0.0)) if causal else {}
    logits = model(read, **options).logits.detach()
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf
    nll, right = [], []
    for row, (block, gone) in enumerate(zip(blocks, hidden, strict=True)):
        places = gone.nonzero()[:, 0]
        at = logits[row, places - int(shift)]
        nll.append(F.cross_entropy(at, block[places]).item())
        right.append((at.argmax(-1) == block[places]).double().mean().item())
    return nll, right


@pytest.mark.parametrize("shift", [True, False])
def test_restoration_by_time_equals_a_plain_computation(shift):
    model, tokenizer = tiny_diffusion(shift=shift)
    blocks = torch.randint(1, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    blocks[:, 0] = 0
    found = by_time(model, tokenizer, blocks, times=(0.3, 1.0), batch_size=2, precision="fp32")
    for index, t in enumerate((0.3, 1.0)):
        nll, right = plain_restored(model, blocks, t, shift, causal=False)
        assert found.nll[index] == pytest.approx(nll, rel=1e-4, nan_ok=True)
        assert found.accuracy[index] == pytest.approx(right, nan_ok=True)


def test_an_ar_model_is_scored_on_the_same_hidden_tokens_from_the_left():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    blocks = torch.randint(1, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    found = by_time(model, tokenizer, blocks, times=(0.5,), precision="fp32")
    nll, right = plain_restored(model, blocks, 0.5, shift=True, causal=True)
    assert found.nll[0] == pytest.approx(nll, rel=1e-4) and found.accuracy[0] == pytest.approx(right)
    later = blocks.clone()
    later[:, -1] = 7  # a change at the end reaches the predictions of the last token alone
    changed = by_time(model, tokenizer, later, times=(0.5,), precision="fp32")
    last = torch.rand(blocks.shape, generator=seeded(0, 0, "by time"))[:, -1] < 0.5
    assert (found.nll[0][~last.numpy()] == changed.nll[0][~last.numpy()]).all()


def test_restoration_has_paired_errors_that_ignore_blocks_without_a_hidden_token():
    rng = np.random.default_rng(0)
    nll = rng.random((1, 50))
    one = Restored((0.1,), nll, nll.copy())
    two = Restored((0.1,), nll + 0.25, nll.copy())
    one.nll[0, 3] = np.nan
    mean, error = two.difference(one, "nll")
    assert mean[0] == pytest.approx(0.25) and error[0] == pytest.approx(0, abs=1e-12)
    mean, error = one.mean("nll")
    kept = np.delete(nll[0], 3)
    assert mean[0] == pytest.approx(kept.mean()) and error[0] == pytest.approx(kept.std(ddof=1) / 49**0.5)


@pytest.mark.parametrize("times", [(), (0.0,), (1.1,), (float("nan"),)])
def test_times_that_are_no_probabilities_are_refused(times):
    model, tokenizer = tiny_diffusion()
    with pytest.raises(ValueError, match="times are probabilities above 0 and at most 1"):
        by_time(model, tokenizer, torch.ones(2, 8, dtype=torch.long), times=times)
