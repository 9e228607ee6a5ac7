"""Sampling against cached keys and values: where it is exact, what it computes, and which models cannot."""

import pytest
import torch

from dalm_utils import block_cache, generate
from dalm_utils.backbone import hidden_states
from dalm_utils.block_cache import check_cache
from dalm_utils.orders import ORDERS
from dalm_utils.tokens import encode
from tests.helpers import FAMILIES, tiny_diffusion

BATCH = ["Return", "Return the sum of an array along the given axis.", "a : array_like"]
REQUESTS = {
    "one text": dict(length=20, block_length=6),
    "a batch of different lengths": dict(prompt=BATCH, length=10, block_length=4, num_samples=2),
    "a gap between texts": dict(prompt="Return the sum", suffix="of an array.", length=9, block_length=4),
    "several gaps": dict(parts=[["Return the", 3, "of an array", 4, "axis", 2], ["a", 7, "b", 2]], block_length=4),
    "texts that end": dict(length=12, block_length=4, num_samples=8, stop_at_end=True, temperature=1.5),
    "fewer steps, and filters": dict(length=20, block_length=7, steps=9, top_p=0.9, repetition_penalty=1.3),
}


def assert_equal_with_a_refresh_at_every_pass(pair, **options):
    plain, cached = (
        generate(*pair, **options, **how, return_history=True, precision="fp32")
        for how in ({}, dict(cache=True, refresh=1))
    )
    assert torch.equal(plain.tokens, cached.tokens) and torch.equal(plain.shown, cached.shown)
    assert plain.history == cached.history and plain.forward_passes == cached.forward_passes


@pytest.mark.slow
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("order", ORDERS)
def test_refreshed_at_every_pass_the_cache_changes_nothing(order, request_):
    options = REQUESTS[request_]
    if order == "remasking":
        options = {name: value for name, value in options.items() if name != "stop_at_end"}
    assert_equal_with_a_refresh_at_every_pass(tiny_diffusion(), order=order, **options)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_refreshed_at_every_pass_the_states_are_those_of_no_cache_bit_for_bit(family, shift):
    model, tokenizer = tiny_diffusion(family, shift=shift)
    canvas = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
    blocks = ((torch.arange(20) - 5) // 5).clamp(min=-1).expand(3, -1)
    padding = torch.zeros(3, 1, 1, 20)
    padding[1, ..., 17:] = -torch.inf
    for mask in (None, padding):
        cached = block_cache.BlockPass(model, canvas, mask, blocks, refresh=1)
        plain = block_cache.FullPass(model, canvas, mask)
        for block in (0, 0, 1):
            places = (blocks == block).nonzero(as_tuple=True)
            assert torch.equal(cached.states(*places), plain.states(*places))
    assert_equal_with_a_refresh_at_every_pass((model, tokenizer), prompt=BATCH, length=6, block_length=4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("request_", ["a batch of different lengths", "several gaps"])
def test_with_a_single_layer_the_cache_is_exact(family, request_):
    """Its keys and values depend on one token each: those outside the block are what they were at the refresh."""
    pair = tiny_diffusion(family, layers=1)
    options = dict(**REQUESTS[request_], order="confidence", temperature=0, precision="fp32")
    assert torch.equal(generate(*pair, **options, cache=True).tokens, generate(*pair, **options).tokens)


def test_with_several_layers_it_is_an_approximation():
    options = dict(length=40, block_length=20, order="confidence", temperature=0, precision="fp32", num_samples=2)
    pair = tiny_diffusion(layers=4)
    assert not torch.equal(generate(*pair, **options, cache=True).tokens, generate(*pair, **options).tokens)


@pytest.fixture
def computed(monkeypatch):
    """The sizes `[sequences, positions]` of all that the trunk is asked for."""
    sizes = []

    def counted(model, tokens, *rest):
        sizes.append(tuple(tokens.shape))
        return hidden_states(model, tokens, *rest)

    monkeypatch.setattr(block_cache, "hidden_states", counted)
    return sizes


@pytest.mark.parametrize("refresh, full", [(None, [0, 4, 8]), (3, [0, 3, 4, 7, 8, 11]), (1, range(12))])
def test_every_position_is_computed_when_a_block_begins_and_at_a_refresh(computed, refresh, full):
    pair = tiny_diffusion()
    check_cache(pair[0])
    computed.clear()
    samples = generate(*pair, length=12, block_length=4, order="confidence", cache=True, refresh=refresh)
    assert computed == [(1, 13 if i in full else 5) for i in range(12)]  # a block and the position that predicts it
    assert samples.forward_passes == 12


def test_what_is_sampled_for_a_sequence_does_not_depend_on_the_others(computed):
    pair = tiny_diffusion()
    options = dict(length=10, block_length=5, order="threshold", threshold=0.06, temperature=0, precision="fp32")
    batch = generate(*pair, prompt=BATCH, **options, cache=True)
    assert any(rows == 1 for rows, _ in computed) and any(rows == 2 for rows, _ in computed)  # they do not go in step
    alone = [generate(*pair, prompt=prompt, **options, cache=True).text[0] for prompt in BATCH]
    assert batch.text == alone


def test_given_text_is_kept():
    model, tokenizer = tiny_diffusion()
    parts = ["Return the sum", 9, "of an array."]
    samples = generate(model, tokenizer, parts=parts, block_length=4, cache=True, order="remasking", remask=0.5)
    before, after = encode(tokenizer, ["Return the sum", "of an array."])
    assert samples.tokens[0, 1 : 1 + len(before)].tolist() == before
    assert samples.tokens[0, -len(after) :].tolist() == after
    assert not (samples.tokens == model.config.mask_token_id).any()


def test_a_model_in_training_is_sampled_without_its_dropout():
    model, tokenizer = tiny_diffusion()
    options = dict(length=12, block_length=4, cache=True, precision="fp32")
    plain = generate(model, tokenizer, **options)
    block_cache._PROVEN.discard(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert torch.equal(generate(model.train(), tokenizer, **options).tokens, plain.tokens) and model.training


# --------------------------------------------------------------------------------------------------- refusals
def test_a_model_that_ignores_the_cache_is_refused():
    model, tokenizer = tiny_diffusion()
    forward = model.base_model.forward
    model.base_model.forward = lambda *inputs, past_key_values=None, **named: forward(*inputs, **named)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot use cache=True"):
        generate(model, tokenizer, length=8, block_length=4, cache=True)
    assert generate(model, tokenizer, length=8, block_length=4).forward_passes


def test_a_model_that_fails_with_the_cache_is_refused():
    model, tokenizer = tiny_diffusion()

    def broken(*inputs, past_key_values=None, **named):
        raise TypeError("no such argument")

    model.base_model.forward = broken
    with pytest.raises(ValueError, match=r"cannot use cache=True \(no such argument\); use cache=False"):
        generate(model, tokenizer, length=8, block_length=4, cache=True)


def test_the_cache_needs_blocks():
    with pytest.raises(ValueError, match="give block_length"):
        generate(*tiny_diffusion(), length=8, cache=True)
    with pytest.raises(ValueError, match="refresh=2 is about the cache"):
        generate(*tiny_diffusion(), length=8, block_length=4, refresh=2)
    with pytest.raises(ValueError, match="refresh must be at least 1"):
        generate(*tiny_diffusion(), length=8, block_length=4, cache=True, refresh=0)
