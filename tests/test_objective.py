import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dalm_utils import annealed_mask, corrupt, diffusion_loss, head, objective, sample_times
from dalm_utils.backbone import hidden_states
from dalm_utils.head import _WeightedNLL, logits_of
from dalm_utils.objective import Batch, batch_loss
from tests.helpers import FAMILIES, assert_same_loss_and_gradients, tiny_diffusion, tiny_model


def noisy_batch(shape=(4, 12)):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 320, shape, generator=generator)
    tokens[:, 0] = 0
    times = sample_times(shape[0], generator=generator)
    return tokens, *corrupt(tokens, times, 320, generator=generator), times


def plain_loss(model, tokens, noised, masked, times, attention_mask, shift, normalize):
    """All logits, then a loop over every token: slow, and obviously the definition."""
    positions = torch.arange(tokens.shape[1])[None]
    logits = model(noised, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
    logits[..., model.config.mask_token_id] = -math.inf
    log_p = logits.log_softmax(-1)
    total, count = 0.0, 0
    for b, i in itertools.product(*map(range, tokens.shape)):
        count += i > 0 if normalize == "maskable" else int(masked[b, i])
        if masked[b, i]:
            total = total - log_p[b, i - 1 if shift else i, tokens[b, i]] / times[b]
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("normalize", ["maskable", "masked"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_plain_definition(family, shift, normalize, tied, monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 0)  # 256 rows at a time, so that several chunks are needed
    model, _ = tiny_diffusion(family, shift, tied=tied)
    tokens, noised, masked, times = noisy_batch(shape=(48, 16))
    assert masked.sum() > 256
    mask = annealed_mask(16, 0.5, generator=torch.Generator().manual_seed(1))
    options = dict(attention_mask=mask, shift=shift, normalize=normalize)
    assert_same_loss_and_gradients(
        model,
        lambda: diffusion_loss(model, tokens, noised, masked, times, **options).loss,
        lambda: plain_loss(model, tokens, noised, masked, times, mask, shift, normalize),
    )


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_with_a_teacher_the_target_is_a_mixture_of_the_token_and_what_the_teacher_says(
    share, family, shift, monkeypatch
):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 0)
    model, _ = tiny_diffusion(family, shift, tied=False)
    teacher = tiny_model(family, vocab=320, seed=1)
    tokens, noised, masked, times = noisy_batch(shape=(48, 16))

    ours = diffusion_loss(model, tokens, noised, masked, times, shift=shift, teacher=teacher, teacher_weight=share)
    ours.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    logits = model(noised).logits[..., :320]  # [MASK] is never the answer, and the teacher does not know it
    log_p = logits.log_softmax(-1)
    says = teacher(tokens).logits.softmax(-1).detach()
    total, nll = 0.0, 0.0
    for b, i in masked.nonzero().tolist():
        target = (1 - share) * F.one_hot(tokens[b, i], 320) + share * says[b, i - 1]
        p = log_p[b, i - 1 if shift else i]
        total = total - (target * p).sum() / times[b]
        nll = nll - p[tokens[b, i]].item() / times[b]
    plain = total / masked[:, 1:].numel()
    plain.backward()
    assert ours.loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert ours.nll.item() == pytest.approx(nll.item() / masked[:, 1:].numel(), rel=1e-5) and not ours.nll.requires_grad
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest)
    assert all(p.grad is None for p in teacher.parameters())


def test_what_a_teacher_says_of_mask_is_left_out():
    """Where [MASK] was a token of the base already, its share goes to the other tokens."""
    model, teacher = tiny_diffusion()[0], tiny_model(vocab=321, seed=1)
    batch = noisy_batch()
    loss = diffusion_loss(model, *batch, teacher=teacher, teacher_weight=1.0)
    loss.loss.backward()
    assert torch.isfinite(loss.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    teacher.get_output_embeddings().weight.data[320] += 50.0  # now it would say nothing else
    assert diffusion_loss(model, *batch, teacher=teacher, teacher_weight=1.0).loss.item() == pytest.approx(
        loss.loss.item()
    )


def test_shift_reads_one_position_to_the_left_worked_by_hand():
    """Position 2 of [begin, a, MASK, b] is masked: with the shift the logits after `a` predict it."""
    model, _ = tiny_diffusion()
    mask_id = model.config.mask_token_id
    tokens, noised = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 5, mask_id, 7]])
    masked, times = noised == mask_id, torch.tensor([0.5])
    logits = model(noised, position_ids=torch.arange(4)[None]).logits[0].detach()
    logits[:, mask_id] = -math.inf
    at_1, at_2 = (-logits[i].log_softmax(-1)[6] for i in (1, 2))
    with_shift = diffusion_loss(model, tokens, noised, masked, times, shift=True)
    without = diffusion_loss(model, tokens, noised, masked, times, shift=False)
    assert at_1 != pytest.approx(float(at_2), rel=1e-3)
    assert with_shift.loss.item() == pytest.approx(float(at_1) / 0.5 / 3, rel=1e-5)  # 1/t, then 3 maskable tokens
    assert without.loss.item() == pytest.approx(float(at_2) / 0.5 / 3, rel=1e-5)


def test_without_noise_and_with_a_closed_mask_it_is_the_ar_loss():
    model = tiny_model()
    tokens = torch.randint(1, 61, (3, 10), generator=torch.Generator().manual_seed(0))
    everything = objective.default_maskable(tokens)
    ours = diffusion_loss(model, tokens, tokens, everything, torch.ones(3), attention_mask=annealed_mask(10, 0.0))
    assert ours.loss.item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-5)


def test_in_bf16_the_loss_and_its_gradient_stay_close():
    model, _ = tiny_diffusion()
    batch = noisy_batch(shape=(16, 16))
    exact = diffusion_loss(model, *batch).loss
    exact.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = diffusion_loss(model, *batch).loss
    half.backward()
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert F.cosine_similarity(gradient.flatten(), model.get_input_embeddings().weight.grad.flatten(), 0) > 0.995


@torch.no_grad()
def test_what_is_scored_meets_the_head_in_its_own_dtype_under_autocast():
    """Where logits lie at -100, as those of an AR base do, bfloat16 knows every half only."""
    model, _ = tiny_diffusion(tied=False)
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.full((321,), -100.0))
    tokens, noised, masked, times = noisy_batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model, noised)
        nll = diffusion_loss(model, tokens, noised, masked, times).token_nll
        logits = logits_of(model, hidden)
    exact = logits_of(model, hidden)
    assert torch.equal(logits, exact) and len(exact[0, 0].unique()) > 300
    rows, columns = masked.nonzero(as_tuple=True)
    log_p = exact[rows, columns - 1].log_softmax(-1)
    torch.testing.assert_close(nll, -log_p.gather(-1, tokens[rows, columns][:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_is_never_waited_for(family, ratio, monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "meta", 2**20)
    monkeypatch.setitem(head.ALIGNMENT, "meta", 64)
    model, _ = tiny_diffusion(family)
    tokens, noised, masked, times = noisy_batch()
    mask = annealed_mask(12, ratio, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(tokens, noised, masked, times, masked.sum())
    model, mask = model.to("meta"), None if mask is None else mask.to("meta")  # shapes without values
    batch = batch.map(lambda tensor: tensor.to("meta"))
    taught = dict(teacher=tiny_model(family, vocab=320).to("meta"), teacher_weight=torch.zeros((), device="meta"))
    batch_loss(model, batch, mask, **taught).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):  # whatever asks for a value raises there
        Batch.of(batch.tokens, batch.noised, masked.to("meta"), times.to("meta"), batch.normalizer)


# ------------------------------------------------------------------------------------------------- batches
def batch_of(tokens, noised, masked, times):
    return Batch.of(tokens, noised, masked, times, objective.default_maskable(tokens).sum())


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_unused_places_change_no_loss_and_no_gradient(family, taught):
    model, _ = tiny_diffusion(family, tied=False)
    batch = batch_of(*noisy_batch())
    teaching = dict(teacher=tiny_model(family, vocab=320, seed=1), teacher_weight=torch.tensor(0.4)) if taught else {}
    results = []
    for given in (batch, batch.with_capacity(batch.count + 100)):
        model.zero_grad()
        loss = batch_loss(model, given, **teaching)
        loss.loss.backward()
        results.append(
            (loss.loss, loss.nll, loss.token_nll[: batch.count], [p.grad.clone() for p in model.parameters()])
        )
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taught", [False, True])
def test_rows_that_align_the_head_change_no_loss_and_no_gradient(taught, dtype, monkeypatch):
    model, _ = tiny_diffusion(tied=False)
    linear = torch.nn.Linear(*reversed(model.get_output_embeddings().weight.shape))  # a head with a bias
    model.set_output_embeddings(linear)
    batch = batch_of(*noisy_batch())
    teaching = dict(teacher=tiny_model(vocab=320, seed=1), teacher_weight=torch.tensor(0.4)) if taught else {}
    results = []
    for alignment in (1, 64):
        monkeypatch.setitem(head.ALIGNMENT, "cpu", alignment)
        assert -len(linear.weight) % 64 != 0
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = batch_loss(model, batch, **teaching)
        loss.loss.backward()
        results.append((loss.loss, loss.token_nll, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_the_rows_of_a_batch_are_the_batch():
    batch = batch_of(*noisy_batch((6, 12)))
    parts = [batch.rows(0, 2), batch.rows(2, 3), batch.rows(3, 6)]
    assert sum(part.count for part in parts) == batch.count
    for start, part in zip((0, 2, 3), parts, strict=True):
        assert torch.equal(part.noised.flatten()[part.places], torch.full((part.count,), 320))
        assert torch.equal(part.tokens.flatten()[part.places], part.targets)
        assert torch.equal(batch.tokens[start : start + len(part.tokens)], part.tokens)
        assert part.normalizer == batch.normalizer
    for name in ("targets", "weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_a_batch_that_does_not_fit_its_capacity_is_never_truncated():
    batch = batch_of(*noisy_batch())
    with pytest.raises(ValueError, match=f"{batch.count} places do not fit into {batch.count - 1}"):
        batch.with_capacity(batch.count - 1)


def test_places_suffice_for_nearly_every_draw():
    """At 8 x 511 tokens the masked count is 2,044 on average with a standard deviation of 58."""
    capacity = objective.place_capacity(8, 511, stratified=True)
    assert capacity == 2560
    rng = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [torch.binomial(torch.full((8,), 511.0), sample_times(8, generator=rng), rng).sum() for _ in range(4000)]
    )
    assert counts.mean() == pytest.approx(2046, abs=5) and counts.std() == pytest.approx(58.3, rel=0.05)
    assert counts.max() < capacity
    assert objective.place_capacity(8, 511, stratified=False) == 4096  # independent times may mask nearly everything
    assert objective.place_capacity(1, 3, stratified=True) == 256


def test_a_loss_is_differentiated_once():
    model, _ = tiny_diffusion()
    tokens, noised, masked, times = noisy_batch()
    loss = diffusion_loss(model, tokens, noised, masked, times).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


def test_without_gradients_none_are_computed(monkeypatch):
    model, _ = tiny_diffusion()
    batch, asked, zeros_like = noisy_batch(), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda like, **how: asked.append(like) or zeros_like(like, **how))
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        quiet = diffusion_loss(model, *batch).loss
    assert not any(like is weight for like in asked)
    loud = diffusion_loss(model, *batch).loss
    assert any(like is weight for like in asked) and quiet == loud  # the buffer of the head's gradient


# -- the NELBO is the any-order autoregressive likelihood ----------------------------------------------------
N, DATA, BEGIN, MASK = 4, 3, 3, 4  # four tokens from a vocabulary of three


def enumerable_model(shift):
    model = tiny_model(vocab=5).double()
    model.config.mask_token_id, model.config.shift, model.config.is_causal = MASK, shift, False
    return model


def all_masks():
    return torch.tensor([(0, *bits) for bits in itertools.product((0, 1), repeat=N) if any(bits)], dtype=torch.bool)


@pytest.mark.parametrize("shift", [True, False])
def test_nelbo_is_the_expected_any_order_likelihood(shift):
    """Both sides enumerated: all masks (with an exact integral over t), and all N! orders (arXiv 2406.03736)."""
    model = enumerable_model(shift)
    x = torch.tensor([[BEGIN, 2, 0, 1, 1]])

    def nll(masked):  # -log p of each masked token given the others, from the model's own logits
        noised = torch.where(masked, MASK, x)
        logits = model(noised, position_ids=torch.arange(N + 1)[None]).logits[0].detach()
        logits[:, MASK] = -math.inf
        return {
            i: -logits[i - 1 if shift else i].log_softmax(-1)[x[0, i]].item() for i in range(1, N + 1) if masked[0, i]
        }

    any_order = 0.0
    for order in itertools.permutations(range(1, N + 1)):
        for step, position in enumerate(order):
            masked = torch.zeros(1, N + 1, dtype=torch.bool)
            masked[0, list(order[step:])] = True
            any_order += nll(masked)[position] / math.factorial(N) / N

    # E over t and masks of diffusion_loss: a polynomial in t of degree 3, exact with 4 Gauss-Legendre nodes
    nodes = [(0.0694318442, 0.1739274226), (0.3300094782, 0.3260725774)]
    nodes += [(1 - node, weight) for node, weight in nodes]
    bound = 0.0
    for t, weight in nodes:
        for masked in all_masks():
            size = int(masked.sum())
            chance = t**size * (1 - t) ** (N - size)
            noised = torch.where(masked[None], MASK, x)
            times = torch.tensor([t], dtype=torch.float64)
            bound += weight * chance * diffusion_loss(model, x, noised, masked[None], times, shift=shift).loss.item()
    assert bound == pytest.approx(any_order, abs=1e-6)


# -- times and corruption ------------------------------------------------------------------------------------
def test_stratified_times_fill_every_stratum_and_uniform_ones_do_not_have_to():
    generator = torch.Generator().manual_seed(0)
    times = sample_times(1000, generator=generator)
    assert sorted(((times - 1e-3) / (1 - 1e-3) * 1000).clamp(max=999.5).long().tolist()) == list(range(1000))
    uniform = sample_times(100_000, method="uniform", generator=generator)
    assert uniform.min() >= 1e-3 and uniform.max() <= 1
    assert uniform.mean() == pytest.approx(0.5005, abs=4 * 0.2887 / 100_000**0.5)


def test_each_stratified_time_is_uniform_whatever_its_place():
    first = torch.stack([sample_times(4, generator=torch.Generator().manual_seed(s)) for s in range(4000)])[:, 0]
    assert first.mean() == pytest.approx(0.5005, abs=0.02) and first.std() == pytest.approx(0.2887, abs=0.01)


def test_corruption_hides_each_token_with_probability_t_and_never_the_begin_token():
    tokens = torch.arange(1, 4001).repeat(3, 1)
    times = torch.tensor([0.1, 0.5, 1.0])
    noised, masked = corrupt(tokens, times, 0, generator=torch.Generator().manual_seed(0))
    assert not masked[:, 0].any() and masked[2, 1:].all()
    assert torch.equal(noised == 0, masked) and torch.equal(noised[~masked], tokens[~masked])
    assert masked[0].float().mean() == pytest.approx(0.1, abs=0.02)
    assert masked[1].float().mean() == pytest.approx(0.5, abs=0.03)


def test_only_maskable_tokens_are_hidden():
    tokens = torch.ones(2, 50, dtype=torch.long)
    maskable = torch.zeros(2, 50, dtype=torch.bool)
    maskable[:, 10:20] = True
    _, masked = corrupt(tokens, torch.ones(2), 0, maskable=maskable)
    assert torch.equal(masked, maskable)


def test_a_masked_begin_token_is_refused_under_the_shift():
    model, _ = tiny_diffusion()
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="begin token"):
        diffusion_loss(model, tokens, tokens, torch.ones(1, 4, dtype=torch.bool), torch.ones(1), shift=True)


@pytest.mark.parametrize("bad", [dict(batch=0), dict(batch=2, eps=0.0), dict(batch=2, method="cosine")])
def test_times_refuse_nonsense(bad):
    with pytest.raises(ValueError):
        sample_times(**bad)


@pytest.mark.parametrize("size, time", [(1e-4, 1.0), (100.0, 1e-3)])
def test_float16_gradients_of_the_head_are_close_although_the_loss_scale_comes_later(size, time):
    """Small inputs would make products underflow if the softmax were not taken in float32; large ones at a small time
    would make sums overflow if they were not kept small."""
    generator = torch.Generator().manual_seed(0)
    hidden = size * torch.randn(64, 8, generator=generator)
    weight = torch.randn(500, 8, generator=generator) / max(1.0, size)
    targets, weights = torch.randint(500, (64,), generator=generator), torch.full((64,), 1 / time)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, _ = _WeightedNLL.apply(*inputs, None, targets, weights, None, dtype, True, None)
        gradients.append(torch.autograd.grad(total, inputs))
    for ours, exact in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().mean()))
