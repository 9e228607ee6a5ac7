import functools
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from dalm_utils import generate, sampling
from dalm_utils.backbone import hidden_states
from dalm_utils.head import logits_of
from dalm_utils.objective import seeded
from dalm_utils.orders import ORDERS, Remasking, Settings
from dalm_utils.sampling import draw
from dalm_utils.tokens import encode, unused_ids
from tests.helpers import FAMILIES, tiny_diffusion, tiny_model, tiny_tokenizer

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
    assert len(set(revealed)) == 3 * 9
    assert len(revealed) == 3 * 9 or order == "remasking"  # each position of each sample once
    assert samples.forward_passes == len(samples.history)
    assert samples.forward_passes <= (9 if ORDERS[order].ignores_steps else steps)


@pytest.mark.parametrize("order", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("steps, sizes", [(3, [3, 3, 3]), (4, [3, 2, 2, 2]), (2, [5, 4])])
def test_greedy_orders_reveal_the_same_number_of_positions_each_step(diffusion, order, steps, sizes):
    samples = generate(*diffusion, length=9, steps=steps, order=order, num_samples=2, return_history=True)
    for sample in (0, 1):
        assert [reveal.rows.count(sample) for reveal in samples.history] == sizes


@pytest.mark.parametrize("order", ORDERS)
def test_the_history_rebuilds_the_sample(diffusion, order):
    options = dict(prompt="a", length=12, steps=5, num_samples=2, order=order, remask=0.5)
    samples = generate(*diffusion, **options, return_history=True)
    canvas = torch.full_like(samples.tokens, -1)
    for reveal in samples.history:
        canvas[reveal.rows, reveal.positions] = torch.tensor(reveal.tokens)
    assert torch.equal(canvas[canvas >= 0], samples.tokens[canvas >= 0]) and (canvas >= 0).sum() == 24


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    model, tokenizer = tiny_diffusion()
    model.transformer.ln_f.bias.data[0] = value
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        generate(model, tokenizer, length=4, temperature=temperature, precision="fp32")


def plain(model, tokenizer, length, steps, order, block_length, seed=0):
    """The orders random and confidence for a single text, without padding, filters or chunks."""
    draws = seeded(seed, 0, "generate")
    unused = unused_ids(tokenizer, model.config.vocab_size)
    canvas = torch.tensor([[tokenizer.bos_token_id] + [model.config.mask_token_id] * length])
    per_block = steps // math.ceil(length / block_length)
    plan = torch.randint(per_block, (length + 1,), generator=draws) if order == "random" else None
    for start in range(1, length + 1, block_length):
        block = range(start, min(start + block_length, length + 1))
        for step in range(per_block):
            holes = [i for i in block if canvas[0, i] == model.config.mask_token_id]
            with torch.no_grad():
                logits = model(canvas).logits[0]
            logits[:, [model.config.mask_token_id, *unused]] = -math.inf
            if order == "random":
                chosen = [i for i in holes if plan[i] == step]
            else:
                surest = sorted(holes, key=lambda i: -float(logits[i - 1].softmax(-1).max()))
                chosen = surest[: math.ceil(len(holes) / (per_block - step))]
            p = logits[[i - 1 for i in chosen]].double().softmax(-1).cumsum(-1)
            chance = torch.rand(len(chosen), 1, generator=draws, dtype=torch.float64) if chosen else torch.empty(0, 1)
            for i, cumulative, u in zip(chosen, p, chance, strict=True):
                canvas[0, i] = int((cumulative <= u * cumulative[-1]).sum())
    return canvas


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("steps, block_length", [(6, 20), (20, 20), (9, 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_orders_give_the_text_of_a_plain_implementation(diffusion, order, steps, block_length, seed):
    options = dict(length=20, steps=steps, order=order, block_length=block_length, seed=seed)
    ours = generate(*diffusion, **options, precision="fp32").tokens
    assert torch.equal(ours, plain(*diffusion, **options))


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
    tokens = draw(logits.expand(count, 8), temperature, None, None, torch.Generator().manual_seed(0))
    seen = torch.bincount(tokens, minlength=8).double()
    assert ((seen - count * intended) ** 2 / (count * intended)).sum() < CHI2_7_1E4


def test_filters_keep_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(draw(logits, 1.0, 0.8, None, generator).tolist()) == {0, 1}
    assert set(draw(logits, 1.0, 0.81, None, generator).tolist()) == {0, 1, 2}
    assert set(draw(logits, 1.0, None, 1, generator).tolist()) == {0}
    assert set(draw(logits, 1.0, 1.0, None, generator).tolist()) == {0, 1, 2, 3}


def test_what_is_asked_of_a_text_is_asked_of_each_of_its_tokens(diffusion):
    def tokens(**options):
        return generate(*diffusion, length=12, order="first_hitting", **options).tokens

    greedy = tokens(temperature=0)
    assert torch.equal(tokens(top_k=1), greedy) and torch.equal(tokens(top_p=1e-9), greedy)
    assert torch.equal(tokens(temperature=1e-6), greedy) and not torch.equal(tokens(), greedy)
    assert torch.equal(tokens(temperature=5e-324), greedy)


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0]).expand(20_000, 3)
    assert 1 not in draw(logits, 1.0, None, None, torch.Generator().manual_seed(0))


# ------------------------------------------------------------- which distribution an order samples, enumerated
WORDS, PLACES = (1, 2, 3), 4


@pytest.fixture(scope="module")
def small():
    """A diffusion model that knows three words, and its conditionals for every partly masked text of four."""
    model, tokenizer = tiny_diffusion(seed=3)
    forbid = torch.full((len(tokenizer),), -math.inf)
    forbid[list(WORDS)] = 0
    model.get_output_embeddings().bias = torch.nn.Parameter(forbid)
    mask = model.config.mask_token_id
    states = list(itertools.product((mask, *WORDS), repeat=PLACES))
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([[0, *state] for state in states]))
        p = logits_of(model, hidden[:, :-1])[..., list(WORDS)].softmax(-1).double()
    return model, tokenizer, {state: p[i].numpy() for i, state in enumerate(states)}


def distribution(small, chances, block_length=PLACES):
    """The probability of each text if the next place is chosen with `chances(p of the open places)`."""
    model, _, conditionals = small
    mask, mass, final = model.config.mask_token_id, {}, Counter()
    mass[(mask,) * PLACES] = 1.0
    for _ in range(PLACES):
        following = Counter()
        for state, weight in mass.items():
            holes = [i for i in range(PLACES) if state[i] == mask]
            holes = [i for i in holes if i // block_length == holes[0] // block_length]
            for place, chance in zip(holes, chances(conditionals[state][holes]), strict=True):
                for word, q in zip(WORDS, conditionals[state][place], strict=True):
                    following[(*state[:place], word, *state[place + 1 :])] += weight * chance * q
        mass = following
    final.update(mass)
    assert sum(final.values()) == pytest.approx(1)
    return final


def any_order(p):
    return np.full(len(p), 1 / len(p))


def surest(score):
    return lambda p: np.eye(len(p))[np.argmax([score(q) for q in p])]


GREEDY = {
    "confidence": surest(max),
    "entropy": surest(lambda q: float((q * np.log(q)).sum())),
    "margin": surest(lambda q: float(np.diff(np.sort(q)[-2:])[0])),
    "threshold": surest(max),
}


def distance(small, intended, **options):
    """Total variation between samples and `intended`, in units of what a perfect sampler would show."""
    count = 6000
    samples = generate(*small[:2], length=PLACES, num_samples=count, precision="fp32", seed=1, **options)
    seen = Counter(map(tuple, samples.tokens[:, 1:].tolist()))
    texts = list(itertools.product(WORDS, repeat=PLACES))
    variation = 0.5 * sum(abs(seen[text] / count - intended[text]) for text in texts)
    return variation / (0.5 * sum((2 / math.pi * intended[t] * (1 - intended[t]) / count) ** 0.5 for t in texts))


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("order, steps", [("random", 300), ("first_hitting", None), ("first_hitting", 2)])
def test_planned_orders_sample_the_any_order_distribution(small, order, steps, block_length):
    intended = distribution(small, any_order, block_length or PLACES)
    assert distance(small, intended, order=order, steps=steps, block_length=block_length) < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("order", GREEDY)
def test_greedy_orders_sample_what_they_say_and_it_is_another_distribution(small, order, block_length):
    options = dict(order=order, threshold=1.0, block_length=block_length)
    assert distance(small, distribution(small, GREEDY[order], block_length or PLACES), **options) < 1.4
    assert distance(small, distribution(small, any_order, block_length or PLACES), **options) > 2


def test_few_steps_are_not_the_any_order_distribution(small):
    """The price of revealing tokens together, which the docstring states: this test would notice a free lunch."""
    assert distance(small, distribution(small, any_order), order="random", steps=1) > 2


def remasked(conditionals, mask, steps, remask):
    """The distribution of the texts at the end of the chain that `Remasking` states, by enumeration."""
    mass = {state: float(set(state) == {mask}) for state in conditionals}
    for k in range(1, steps + 1):
        before, after = (k - 1) / steps, k / steps
        hide = min(remask, (1 - after) / before) if before else 0.0
        reveal = (after - (1 - hide) * before) / (1 - before)
        following = 0.0
        for state, weight in mass.items():
            moves = [  # of each place: the probabilities of [MASK] and of the words
                [1 - reveal, *(reveal * q for q in p)]
                if token == mask
                else [hide, *((1 - hide) * (token == word) for word in WORDS)]
                for token, p in zip(state, conditionals[state], strict=True)
            ]
            following = following + weight * functools.reduce(np.multiply.outer, moves)
        mass = dict(zip(itertools.product((mask, *WORDS), repeat=following.ndim), following.flat, strict=True))
    return mass


@pytest.mark.slow
def test_remasking_samples_the_chain_that_it_states(small):
    model, _, conditionals = small
    intended, random = (remasked(conditionals, model.config.mask_token_id, 4, remask) for remask in (1.0, 0.0))
    assert distance(small, intended, order="remasking", steps=4, remask=1.0) < 1.4
    assert distance(small, random, order="remasking", steps=4, remask=1.0) > 2


def test_remasking_in_blocks_samples_the_chain_in_each_block(small):
    model, _, conditionals = small
    mask, steps, remask = model.config.mask_token_id, 3, 0.5
    intended = Counter()
    first = {state[:2]: p[:2] for state, p in conditionals.items() if state[2:] == (mask, mask)}
    for left, weight in remasked(first, mask, steps, remask).items():
        second = {state[2:]: p[2:] for state, p in conditionals.items() if state[:2] == left}
        for right, chance in remasked(second, mask, steps, remask).items():
            intended[left + right] += weight * chance
    assert distance(small, intended, order="remasking", steps=2 * steps, remask=remask, block_length=2) < 1.4


def perfect(joint, mask=0):
    """The conditionals of a denoiser that knows the distribution of the texts, `{text: probability}`."""
    conditionals = {}
    for state in itertools.product((mask, *WORDS), repeat=len(next(iter(joint)))):
        posterior = {x: p for x, p in joint.items() if all(a in (mask, b) for a, b in zip(state, x, strict=True))}
        conditionals[state] = [
            [sum(p for x, p in posterior.items() if x[i] == word) / sum(posterior.values()) for word in WORDS]
            for i in range(len(state))
        ]
    return conditionals


def variation(p, q):
    return 0.5 * sum(abs(p[text] - q[text]) for text in q)


def test_remasking_with_a_perfect_denoiser_is_exact_for_independent_tokens():
    a, b = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    joint = {(v, w): a[v - 1] * b[w - 1] for v in WORDS for w in WORDS}
    for steps, remask in ((2, 0.5), (5, 0.3), (5, 1.0)):
        assert variation(remasked(perfect(joint), 0, steps, remask), joint) < 1e-12


def test_remasking_with_a_perfect_denoiser_is_exact_in_the_limit_of_many_steps():
    chances = np.random.default_rng(0).dirichlet(np.full(9, 0.3))
    joint = dict(zip(itertools.product(WORDS, repeat=2), chances, strict=True))
    errors = [variation(remasked(perfect(joint), 0, steps, 4 / steps), joint) for steps in (16, 32, 64, 128)]
    assert all(half < 0.6 * error for error, half in itertools.pairwise(errors)) and errors[-1] < 0.01


def test_remasking_hides_tokens_as_the_forward_process_does(diffusion):
    """After k of `steps` steps a fraction 1 - k / steps of the positions is masked, however much is hidden again."""
    steps, turns = 8, {}
    chooser = Remasking(
        Settings(torch.zeros(500, 40, dtype=torch.long), steps, 0.9, 0.4, torch.Generator().manual_seed(0))
    )
    holes = torch.ones(500, 40, dtype=torch.bool)
    while (turn := chooser.turn(holes)) is not None:
        turns[chooser.step - 1] = turn.holes
        holes = turn.holes & ~turn.candidates
    assert not holes.any()
    for step, masked in turns.items():
        assert masked.float().mean() == pytest.approx(1 - step / steps, abs=0.015)


# ----------------------------------------------------------------------------------------- what can be asked for
@pytest.mark.parametrize("order", ORDERS)
def test_several_gaps_are_filled_and_what_is_given_stays(diffusion, order):
    model, tokenizer = diffusion
    parts = ["Return the", 3, "of an array", 4, "along the axis", 2]
    samples = generate(model, tokenizer, parts=parts, order=order, num_samples=2, return_history=True)
    for text, tokens in zip(samples.text, samples.tokens, strict=True):
        assert re.fullmatch(r"Return the.*of an array.*along the axis.*", text, re.DOTALL)
        given = [len(encode(tokenizer, [part])[0]) if isinstance(part, str) else part for part in parts]
        assert len(tokens) == 1 + sum(given)
    seen = {place for reveal in samples.history for place in zip(reveal.rows, reveal.positions, strict=True)}
    assert len(seen) == 2 * (3 + 4 + 2)  # what is given is never masked


def test_token_ids_stand_for_the_text_they_spell(diffusion):
    model, tokenizer = diffusion
    prompt, suffix = (torch.tensor(ids) for ids in encode(tokenizer, ["Return the sum", "of an array."]))
    by_ids = generate(model, tokenizer, parts=[[prompt, 5, suffix], [prompt[:0], 5]])
    assert torch.equal(
        by_ids.tokens, generate(model, tokenizer, parts=[["Return the sum", 5, "of an array."], [5]]).tokens
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_in_a_batch_of_prompts_changes_nothing(family):
    """What is written for each prompt of a batch is what is written for it alone."""
    model, tokenizer = tiny_diffusion(family)
    prompts = ["Return", "Return the sum of an array along the given axis.", "a : array_like"]
    assert len(set(map(len, encode(tokenizer, prompts)))) == 3
    options = dict(length=5, order="confidence", temperature=0, precision="fp32")  # nothing in it is drawn
    batch = generate(model, tokenizer, prompt=prompts, **options)
    alone = [generate(model, tokenizer, prompt=prompt, **options).text[0] for prompt in prompts]
    assert batch.text == alone and all(text.startswith(p) for text, p in zip(alone, prompts, strict=True))
    lengths = [1 + len(ids) + 5 for ids in encode(tokenizer, prompts)]
    assert batch.shown.sum(1).tolist() == lengths  # the begin token, the prompt, what was written; no padding
    assert all(row[:length].all() for row, length in zip(batch.shown, lengths, strict=True))


def test_blocks_are_filled_from_left_to_right(diffusion):
    for order in ORDERS:
        samples = generate(*diffusion, prompt="a", length=12, order=order, block_length=4, return_history=True)
        seen = [p for reveal in samples.history for p in reveal.positions]
        blocks = [(position - min(seen)) // 4 for position in seen]
        assert blocks == sorted(blocks) and set(seen) == set(range(min(seen), min(seen) + 12))


def only(model, tokenizer, token_id):
    """The same model, now sure of one token."""
    bias = torch.full((len(tokenizer),), -30.0)
    bias[token_id] = 30.0
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    return model


def test_nothing_is_computed_after_the_end():
    model, tokenizer = tiny_diffusion()
    model = only(model, tokenizer, tokenizer.eos_token_id)
    options = dict(prompt="Return", length=12, block_length=4, order="first_hitting")
    ended = generate(model, tokenizer, **options, stop_at_end=True)
    assert ended.text == ["Return"] and ended.forward_passes == 4
    assert ended.shown.sum() == 1 + len(encode(tokenizer, ["Return"])[0])
    assert generate(model, tokenizer, **options).forward_passes == 12
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)  # of a chat, say: documents end with the begin token
    assert generate(model, tokenizer, **options, stop_at_end=True).tokens.tolist() == ended.tokens.tolist()


def test_a_text_without_an_end_is_written_to_its_last_block():
    model, tokenizer = tiny_diffusion()
    model = only(model, tokenizer, 7)
    whole = generate(model, tokenizer, length=12, block_length=4, order="first_hitting", stop_at_end=True)
    assert whole.forward_passes == 12 and whole.shown.all() and whole.tokens[0, 1:].tolist() == [7] * 12


def test_an_end_before_given_text_is_refused():
    with pytest.raises(ValueError, match="given text follows one"):
        generate(*tiny_diffusion(), prompt="Return", suffix="of an array.", length=4, stop_at_end=True)


def test_by_default_each_token_has_a_step_of_its_own_in_blocks_too():
    model, tokenizer = tiny_diffusion()
    assert generate(model, tokenizer, length=9, block_length=8, order="confidence").forward_passes == 9
    options = dict(length=9, block_length=1, steps=4)
    assert generate(model, tokenizer, **options, order="first_hitting").forward_passes == 9  # steps play no part
    assert generate(model, tokenizer, **options, order="threshold").forward_passes == 9
    with pytest.raises(ValueError, match="4 steps are too few for 9 blocks"):
        generate(model, tokenizer, **options, order="confidence")


def test_a_model_without_a_mask_token_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"no \[MASK\] token; make it a diffusion model first: as_diffusion"):
        generate(tiny_model(vocab=len(tiny_tokenizer())), tiny_tokenizer(), length=4)


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_no_more_logits_are_held_than_a_chunk_and_the_text_is_the_same(order, penalty, monkeypatch):
    model, tokenizer = tiny_diffusion()
    options = dict(length=20, steps=2, num_samples=3, order=order, repetition_penalty=penalty, precision="fp32")
    whole = generate(model, tokenizer, **options)
    most = []

    def watched(logits, *rest):
        most.append(len(logits))
        return draw(logits, *rest)

    monkeypatch.setattr(sampling, "chunk_rows", lambda weight: 7)
    monkeypatch.setattr(sampling, "draw", watched)
    in_chunks = generate(model, tokenizer, **options)
    assert torch.equal(in_chunks.tokens, whole.tokens) and max(most) == 7 and sum(most) == 60


@pytest.mark.parametrize("logits", [(3.0, 2.0), (-2.0, -3.0)])
def test_a_repetition_penalty_makes_shown_tokens_rarer(logits):
    model, tokenizer = tiny_diffusion()
    bias = torch.full((len(tokenizer),), -torch.inf)
    bias[[5, 6]] = torch.tensor(logits)
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)  # also the embedding: the bias alone decides
    plain, punished = (
        generate(model, tokenizer, length=2, temperature=0, order="first_hitting", repetition_penalty=penalty).tokens
        for penalty in (1.0, 2.0)
    )
    assert plain[0, 1:].tolist() == [5, 5] and sorted(punished[0, 1:].tolist()) == [5, 6]


def test_threshold_reveals_all_that_is_sure_at_once():
    model, tokenizer = tiny_diffusion()
    model = only(model, tokenizer, 7)
    assert generate(model, tokenizer, length=20, order="threshold", threshold=0.9).forward_passes == 1
    assert generate(model, tokenizer, length=20, order="first_hitting").forward_passes == 20


def test_steps_that_reveal_nothing_cost_nothing(diffusion):
    samples = generate(*diffusion, length=3, steps=1000)
    assert samples.forward_passes <= 3


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(length=0), "length"),
        (dict(steps=0), "steps"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty"),
        (dict(order="left"), "random, first_hitting"),
        (dict(length=None), "or parts"),
        (dict(parts=["a", 3]), "either parts, or prompt"),
        (dict(length=None, parts=["a"]), "at least one gap"),
        (dict(length=None, parts=["a", 0]), "at least one gap"),
        (dict(threshold=1.5), "threshold"),
        (dict(block_length=1, length=9, steps=4), "too few for 9 blocks"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(remask=0), "remask must be above 0"),
        (dict(order="remasking", stop_at_end=True), "leave stop_at_end and expected out"),
        (dict(order="remasking", expected=[[0, 1, 2, 3, 4]]), "leave stop_at_end and expected out"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=0), "top_k"),
        (dict(length=100), "length 101 is more than the model's 64 positions"),
    ],
)
def test_bad_requests_are_refused(diffusion, bad, message):
    with pytest.raises(ValueError, match=message):
        generate(*diffusion, **{**dict(length=4, steps=4), **bad})


def test_the_end_token_is_exempt_from_the_repetition_penalty_where_a_text_may_end(monkeypatch):
    model, tokenizer = tiny_diffusion()
    shown = []
    monkeypatch.setattr(sampling, "_penalize", lambda logits, seen, penalty: shown.append(seen) or logits)
    for stops in (True, False):
        generate(model, tokenizer, prompt="Return", length=6, stop_at_end=stops, repetition_penalty=1.2)
        counted = torch.cat(shown)
        assert bool((counted == tokenizer.bos_token_id).any()) is not stops  # it begins every sequence
        assert (counted == tokenizer.encode("Return")[0]).any(1).all()
        shown.clear()


@pytest.mark.parametrize("request_", [dict(parts=("a", 2, "b")), dict(prompt=("a", None), suffix="b", length=2)])
def test_a_tuple_is_as_good_as_a_list(diffusion, request_):
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in request_.items()}
    tuples, lists = (generate(*diffusion, **options, seed=1) for options in (request_, as_lists))
    assert tuples.text == lists.text


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(prompt=[], length=4), "prompt is empty; give at least one text"),
        (dict(parts=[torch.tensor([5, -1]), 3]), r"token ids are a row of integers from 0 on, got \[5, -1\]"),
        (dict(parts=[torch.tensor([[5, 1]]), 3]), r"token ids are a row of integers from 0 on, got \[\[5, 1\]\]"),
        (dict(parts=[torch.tensor([5.0]), 3]), r"token ids are a row of integers from 0 on, got \[5.0\]"),
        (dict(parts=[torch.tensor([5, 99999]), 3]), "there is no token 99999: the model has 321"),
        (dict(parts=[[5, 1], 3]), r"parts are texts, tensors of token ids and gap sizes"),
        (dict(parts=[torch.tensor([True]), 3]), r"token ids are a row of integers from 0 on, got \[True\]"),
        (dict(prompt=0, length=3), r"prompt and suffix are texts \(token ids go into parts\), got 0"),
        (dict(prompt=torch.tensor([1, 2]), length=3), r"prompt and suffix are texts .*, got tensor"),
        (dict(prompt="a", suffix=["b"], length=3), r"prompt and suffix are texts .*, got \['b'\]"),
    ],
)
def test_requests_without_a_sequence_or_with_impossible_ids_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny_diffusion(), **request_)
