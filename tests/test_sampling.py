import itertools
import math
from collections import Counter

import pytest
import torch

from dalm_utils import generate
from dalm_utils.objective import hidden_states, logits_of
from dalm_utils.sampling import ORDERS, draw
from tests.helpers import tiny_diffusion

CHI2_7_1E4 = 29.88  # a chi-squared variable with 7 degrees of freedom exceeds this once in 10,000


@pytest.fixture(scope="module")
def diffusion():
    return tiny_diffusion()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 3, 9, 40])
def test_samples_hold_no_mask_and_keep_prompt_and_suffix(order, steps, shift):
    model, tokenizer = tiny_diffusion(shift=shift)
    samples = generate(
        model, tokenizer, prompt="Return the sum", suffix="of an array.", length=9, steps=steps, order=order,
        num_samples=3, return_history=True, precision="fp32",
    )  # fmt: skip
    assert not (samples.tokens == model.config.mask_token_id).any()
    assert all(text.startswith("Return the sum") and text.endswith("of an array.") for text in samples.text)
    assert (samples.tokens[:, 0] == tokenizer.bos_token_id).all()
    revealed = [(r, p) for reveal in samples.history for r, p in zip(reveal.rows, reveal.positions, strict=True)]
    assert len(revealed) == len(set(revealed)) == 3 * 9  # each position of each sample exactly once
    assert samples.forward_passes == len(samples.history) <= steps


def test_the_history_rebuilds_the_sample(diffusion):
    model, tokenizer = diffusion
    samples = generate(model, tokenizer, prompt="a", length=12, steps=5, num_samples=2, return_history=True)
    canvas = torch.full_like(samples.tokens, -1)
    for reveal in samples.history:
        canvas[reveal.rows, reveal.positions] = torch.tensor(reveal.tokens)
    assert torch.equal(canvas[canvas >= 0], samples.tokens[canvas >= 0]) and (canvas >= 0).sum() == 24


def test_same_seed_same_sample_and_zero_temperature_ignores_the_seed_of_tokens(diffusion):
    a, b, c = (generate(*diffusion, length=8, steps=8, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    greedy = [generate(*diffusion, length=8, steps=8, order="confidence", temperature=0, seed=s).tokens for s in (1, 2)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_intended_distribution(dtype, temperature):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -4.0]).to(dtype)
    intended = (logits.double() / temperature).softmax(-1)
    count = 100_000
    tokens, probability = draw(logits.expand(count, 8), temperature, None, None, torch.Generator().manual_seed(0))
    seen = torch.bincount(tokens, minlength=8).double()
    assert ((seen - count * intended) ** 2 / (count * intended)).sum() < CHI2_7_1E4
    torch.testing.assert_close(probability, logits.double().softmax(-1)[tokens])


def test_filters_keep_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(draw(logits, 1.0, 0.8, None, generator)[0].tolist()) == {0, 1}
    assert set(draw(logits, 1.0, 0.81, None, generator)[0].tolist()) == {0, 1, 2}
    assert set(draw(logits, 1.0, None, 1, generator)[0].tolist()) == {0}
    assert set(draw(logits, 1.0, 1.0, None, generator)[0].tolist()) == {0, 1, 2, 3}


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0]).expand(20_000, 3)
    assert 1 not in draw(logits, 1.0, None, None, torch.Generator().manual_seed(0))[0]


def test_random_order_with_one_token_a_time_samples_the_any_order_distribution():
    """Enumerated: two positions, two orders, four allowed tokens."""
    model, tokenizer = tiny_diffusion(seed=3)
    allowed, mask_id, count = 4, model.config.mask_token_id, 4000
    forbid = torch.full((len(tokenizer),), -math.inf)
    forbid[1 : 1 + allowed] = 0
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(forbid)  # a head that knows four tokens

    def conditional(canvas, position):
        return logits_of(model, hidden_states(model, torch.tensor([canvas]))[0, position - 1]).softmax(-1)

    intended = Counter()
    with torch.no_grad():
        for first, second in ((1, 2), (2, 1)):
            before = conditional([0, mask_id, mask_id], first)
            for a in range(1, 1 + allowed):
                canvas = [0, mask_id, mask_id]
                canvas[first] = a
                after = conditional(canvas, second)
                for b in range(1, 1 + allowed):
                    pair = (a, b) if first == 1 else (b, a)
                    intended[pair] += 0.5 * float(before[a] * after[b])
    assert sum(intended.values()) == pytest.approx(1, abs=1e-4)

    samples = generate(model, tokenizer, length=2, steps=10_000, num_samples=count, precision="fp32", seed=1)
    seen = Counter(map(tuple, samples.tokens[:, 1:].tolist()))
    pairs = list(itertools.product(range(1, 1 + allowed), repeat=2))
    distance = 0.5 * sum(abs(seen[pair] / count - intended[pair]) for pair in pairs)
    expected = 0.5 * sum((2 / math.pi * p * (1 - p) / count) ** 0.5 for p in intended.values())  # of a perfect sampler
    assert distance < 2.5 * expected


def test_steps_that_reveal_nothing_cost_nothing(diffusion):
    samples = generate(*diffusion, length=3, steps=1000)
    assert samples.forward_passes <= 3


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(length=0), "length"),
        (dict(steps=0), "steps"),
        (dict(temperature=-1), "temperature"),
        (dict(order="left"), "random, confidence"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=0), "top_k"),
        (dict(length=100), "the model has 64"),
    ],
)
def test_bad_requests_are_refused(diffusion, bad, message):
    with pytest.raises(ValueError, match=message):
        generate(*diffusion, **{**dict(length=4, steps=4), **bad})
