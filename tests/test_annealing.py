import pytest
import torch

from dalm_utils import anneal_ratio, annealed_mask


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
