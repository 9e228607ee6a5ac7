import math

import pytest
import torch

from dalm_utils.distillation import choose_distill, unigram_nll


def test_unigram_nll_is_that_of_smoothed_frequencies():
    nll = unigram_nll(torch.tensor([[0, 0, 1], [0, 2, 0]]), torch.tensor([[0, 3]]), vocab_size=4)
    assert nll.tolist() == [pytest.approx([-math.log(5 / 10), -math.log(1 / 10)])]


def nlls(seed=0, tokens=2000):
    draws = torch.Generator().manual_seed(seed)
    unigram = torch.rand(tokens, generator=draws) * 8 + 2
    return unigram + torch.randn(tokens, generator=draws) * 4, unigram  # a teacher as often better as worse


@pytest.mark.slow
def test_the_weight_maximises_the_likelihood_of_held_out_tokens():
    teacher, unigram = nlls()
    weight = choose_distill(teacher, unigram, 16.0)
    fractions = torch.linspace(0, 16 / 17, 20_001, dtype=torch.float64)
    mixed = torch.logaddexp(
        fractions[:, None].log() - teacher.double(), (1 - fractions)[:, None].log() - unigram.double()
    ).mean(1)
    assert 0 < weight < 16
    assert weight / (1 + weight) == pytest.approx(fractions[mixed.argmax()].item(), abs=1e-4)


def test_a_known_mixture_is_recovered():
    """A token drawn from the teacher three times in four, else from frequencies, gives a weight of 3 to 1."""
    draws = torch.Generator().manual_seed(0)
    vocab, contexts, tokens = 50, 20, 200_000
    teacher = (torch.randn(contexts, vocab, generator=draws) * 2).softmax(-1)
    unigram = torch.randn(vocab, generator=draws).softmax(-1)
    where = torch.randint(contexts, (tokens,), generator=draws)
    token = torch.multinomial((0.75 * teacher + 0.25 * unigram)[where], 1, generator=draws)[:, 0]
    weight = choose_distill(-teacher[where, token].log(), -unigram[token].log(), 16.0)
    assert weight == pytest.approx(3.0, rel=0.05)


def test_a_teacher_that_is_always_better_gets_all_that_is_allowed_and_one_that_is_never_better_nothing():
    unigram = torch.linspace(4.0, 10.0, 100)
    assert choose_distill(unigram - 3, unigram, 16.0) == 16.0
    assert choose_distill(unigram + 3, unigram, 16.0) == 0.0


def test_the_weight_never_exceeds_the_largest_and_grows_with_it_until_the_optimum():
    teacher, unigram = nlls()
    weights = [choose_distill(teacher, unigram, largest) for largest in (0.0, 0.1, 1.0, 4.0, 16.0, 1e6)]
    best = weights[-1]
    assert weights == [pytest.approx(min(largest, best)) for largest in (0.0, 0.1, 1.0, 4.0, 16.0, 1e6)]


def test_a_better_teacher_gets_a_larger_weight():
    teacher, unigram = nlls()
    weights = [choose_distill(teacher + worse, unigram, 16.0) for worse in (-1.0, 0.0, 1.0, 2.0)]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 4


def test_hopeless_and_certain_predictions_do_not_overflow():
    teacher, unigram = torch.tensor([1e4, 0.0, 0.0]), torch.tensor([0.0, 1e4, 1e4])
    assert choose_distill(teacher, unigram, 16.0) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    "teacher, unigram, largest, message",
    [
        ([1.0, 2.0], [1.0], 16.0, r"shapes \(2,\) and \(1,\)"),
        ([], [], 16.0, "at least one"),
        ([float("nan")], [1.0], 16.0, "infinite or NaN"),
        ([float("inf")], [1.0], 16.0, "infinite or NaN"),
        ([1.0], [float("nan")], 16.0, "infinite or NaN"),
        ([1.0], [float("inf")], 16.0, "infinite or NaN"),
        ([1.0], [1.0], -1.0, r"got -1\.0"),
        ([1.0], [1.0], float("inf"), "got inf"),
    ],
)
def test_what_cannot_be_compared_is_an_error(teacher, unigram, largest, message):
    with pytest.raises(ValueError, match=message):
        choose_distill(torch.tensor(teacher), torch.tensor(unigram), largest)
