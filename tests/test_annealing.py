import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dalm_utils import anneal_ratio, annealed_mask
from dalm_utils.annealing import annealed_block_mask, open_edges
from dalm_utils.objective import diffusion_loss, hidden_states
from dalm_utils.run import _attending
from tests.helpers import FAMILIES, tiny_diffusion


def test_ratio_opens_from_the_first_step_and_stays_open():
    assert [anneal_ratio(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("step, anneal_steps", [(-1, 10), (0, 0), (3, -5)])
def test_ratio_refuses_nonsense(step, anneal_steps):
    with pytest.raises(ValueError, match="anneal_steps"):
        anneal_ratio(step, anneal_steps)


def test_closed_mask_is_causal_and_open_mask_is_none():
    mask = annealed_mask(5, 0.0)
    assert mask.shape == (1, 1, 5, 5)
    expected = torch.full((5, 5), float("-inf")).triu(1)
    assert torch.equal(mask[0, 0], expected)
    assert annealed_mask(5, 1.0) is None


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_look_ahead_edges_open_independently_with_the_ratio(ratio):
    generator = torch.Generator().manual_seed(0)
    opened = torch.stack([annealed_mask(20, ratio, generator=generator)[0, 0] == 0 for _ in range(400)]).float()
    above = torch.ones(20, 20, dtype=torch.bool).triu(1)
    assert opened[:, ~above].min() == 1  # causal edges are always open
    edges = opened[:, above]  # [400, 190]
    error = (ratio * (1 - ratio) / edges.numel()) ** 0.5
    assert abs(edges.mean() - ratio) < 4 * error
    per_mask = edges.mean(1)  # independent edges: the share of one mask varies as a binomial does
    assert per_mask.std() == pytest.approx((ratio * (1 - ratio) / 190) ** 0.5, rel=0.15)


def test_same_generator_state_same_mask_and_dtype_as_asked():
    first, second = (
        annealed_mask(9, 0.4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)


@pytest.mark.parametrize("length, ratio", [(0, 0.5), (4, -0.1), (4, 1.1), (4, float("nan"))])
def test_mask_refuses_nonsense(length, ratio):
    with pytest.raises(ValueError, match="ratio"):
        annealed_mask(length, ratio)


# ---------------------------------------------------------------------------------------------- flex attention
def dense(ratio, seed, length):
    """The mask that `open_edges` describes, edge by edge: `[L, L]` bool."""
    place = torch.arange(length)
    return open_edges(ratio, seed)(None, None, place[:, None], place[None])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9])
def test_hashed_edges_are_open_as_often_and_as_independently_as_drawn_ones(ratio):
    length = 256
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = torch.stack([dense(ratio, seed, length) for seed in range(8)])
    assert masks[:, ~above].all() and torch.equal(masks[3], dense(ratio, 3, length))
    drawn = masks[:, above].double()  # [8, edges]
    spread = (ratio * (1 - ratio) / drawn.numel()) ** 0.5
    assert drawn.mean().item() == pytest.approx(ratio, abs=4 * spread)
    if ratio:
        seeds = torch.corrcoef(drawn).fill_diagonal_(0).abs().max()
        assert seeds < 5 / drawn.shape[1] ** 0.5
        far = masks[0, :64, 128:].double()  # wholly above the diagonal
        for step in (1, 2, 16):  # an edge says nothing about its neighbours
            for one, other in ((far[step:], far[:-step]), (far[:, step:], far[:, :-step])):
                pair = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs()
                assert pair < 5 / one.numel() ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
@torch.no_grad()
def test_flex_attention_under_the_block_mask_equals_the_dense_one(family):
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    closed = torch.zeros(24, 24).masked_fill_(~dense(0.3, 77, 24), -torch.inf)[None, None]
    model, _ = tiny_diffusion(family)
    expected = hidden_states(model, tokens, closed)
    masked = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[:, 0] = False
    noised, times = tokens.masked_fill(masked, model.config.mask_token_id), torch.tensor([0.4, 0.6])
    loss = diffusion_loss(model, tokens, noised, masked, times, attention_mask=closed).loss
    model.config._attn_implementation = "flex_attention"
    blocks = annealed_block_mask(24, 0.3, seed=77, block=16)
    torch.testing.assert_close(hidden_states(model, tokens, blocks), expected, rtol=1e-4, atol=1e-5)
    ours = diffusion_loss(model, tokens, noised, masked, times, attention_mask=blocks).loss
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert annealed_block_mask(24, 1.0, seed=77) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has a backward pass on CUDA only")
def test_flex_attention_has_the_gradients_of_the_dense_mask():
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).cuda()
    tokens = torch.randint(64, (2, 200), device="cuda")
    closed = torch.zeros(200, 200).masked_fill_(~dense(0.3, 77, 200), -torch.inf)[None, None].cuda()
    grads = []
    for mask in (closed, annealed_block_mask(200, 0.3, seed=77, device="cuda")):
        model.zero_grad()
        with _attending(model, mask):
            hidden_states(model, tokens, mask).square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))


def test_flex_attention_serves_its_own_masks_alone():
    model, _ = tiny_diffusion("llama")
    for mask, name in ((annealed_block_mask(8, 0.5, seed=0), "flex_attention"), (annealed_mask(8, 0.5), "sdpa")):
        with _attending(model, mask):
            assert model.config._attn_implementation == name
        assert model.config._attn_implementation == "sdpa"
