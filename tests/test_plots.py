import html
import re
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch

from dalm_utils import annealed_mask, generate, plots
from dalm_utils.config import RunConfig
from dalm_utils.evaluation import Restored
from dalm_utils.history import History
from tests.helpers import tiny_diffusion


class Shown(list):
    """Stands in for IPython's display."""

    def __call__(self, thing, display_id=None):
        self.append(thing)
        return self

    def update(self, thing):
        self.append(thing)


@pytest.fixture
def shown(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(plots, "display", shown)
    return shown


def history(steps=40):
    records = [
        {"step": s, "tokens": 100 * s, "loss": 9 / s, "ratio": min(1, s / 20), "tokens_per_second": 7}
        for s in range(5, steps, 5)
    ]
    records[3] |= {"nelbo": 4.0, "nelbo_stderr": 0.1, "sample": "costs $5\nand $6"}
    records[-1] |= {"nelbo": 3.0, "nelbo_stderr": 0.1}
    return History(records=records)


def test_mask_heatmaps_show_what_is_open(shown):
    plots.mask_heatmaps({0.0: annealed_mask(6, 0.0), 1.0: None}, length=6)
    closed, opened = (axis.images[0].get_array() for axis in shown[0].axes)
    assert closed.sum() == 21 and opened.sum() == 36


def test_the_shift_diagram_draws_an_arrow_for_each_masked_token_in_both_panels(shown):
    plots.shift_diagram(["begin", "a", "b", "c"], [False, True, False, True])
    tops = [[text for text in axis.texts if getattr(text, "arrow_patch", None)] for axis in shown[0].axes]
    sources = [[arrow.get_position()[0] for arrow in arrows] for arrows in tops]
    assert sources == [[0, 2], [1, 3]]  # with the shift from the left neighbor, without it from the place itself


def test_curves_hold_the_recorded_points(shown):
    plots.curves({"run": history()}, ar_nll=2.5, ratio_of="run")
    left, right, *_ = shown[0].axes
    assert list(left.lines[0].get_ydata()) == history().series("loss")[1]
    assert any(2.5 in line.get_ydata() for line in right.lines) and list(right.lines[0].get_ydata()) == [4.0, 3.0]
    assert left.get_xlabel() == right.get_xlabel() == "optimizer step (100 tokens each)"


def test_the_live_curve_redraws_and_closes_its_figures(shown):
    live = plots.Live(fraction=1.0)
    for end in (10, 20, 40):
        live(history(40) if end == 40 else History(records=history().records[: end // 5]), RunConfig(name="run"))
    assert len(shown) == 3 and not matplotlib.pyplot.get_fignums()
    assert "sample: costs" in shown[-1].texts[0].get_text()


def test_drawing_takes_a_fraction_of_the_time_but_an_evaluation_is_always_drawn(shown):
    live = plots.Live(fraction=1e-6)
    record = {"step": 1, "tokens": 100, "loss": 5.0}
    for changes in ({}, {}, {"nelbo": 5.0, "nelbo_stderr": 0.1}, {}):
        live(History(records=[record | changes]), RunConfig(name="run"))
    assert len(shown) == 2


def test_quality_panels(shown):
    rows = [
        dict(order=order, passes=passes, perplexity=100 / passes, entropy=3.0, distinct_2=0.9, repetition=0.2,
             stderr=dict(perplexity=2.0, entropy=0.1, distinct_2=0.1, repetition=0.1))
        for order in ("random", "confidence") for passes in (8, 4)
    ]  # fmt: skip
    figures = dict(perplexity=20, entropy=3.5, distinct_2=1, repetition=0.1)
    plots.quality_vs_passes(rows, {"passes": 95, **figures, "stderr": dict.fromkeys(figures, 0.5)}, figures)
    for axis in shown[0].axes:
        assert axis.get_legend_handles_labels()[1].count("random") == 1 and len(axis.containers) == 3
    drawn = shown[0].axes[0].containers[0]
    assert list(drawn.lines[0].get_xdata()) == pytest.approx([4, 8], rel=0.05)  # by passes, whatever the rows' order
    assert [list(bar[:, 1]) for bar in drawn.lines[2][0].get_segments()] == [[23.0, 27.0], [10.5, 14.5]]


def test_a_logarithmic_axis_leaves_out_the_score_before_the_first_step(shown):
    plots.nelbo_against_tokens({"run": History(records=[{"step": 0, "tokens": 0, "nelbo": 7.0}, *history().records])})
    assert 0 not in shown[0].axes[0].containers[0].lines[0].get_xdata()


def test_nelbo_against_tokens_puts_runs_of_any_length_on_one_axis(shown):
    plots.nelbo_against_tokens({"short": history(25), "long": history()}, ar_nll=2.5)
    (axis,) = shown[0].axes
    assert axis.get_xscale() == "log"
    assert list(axis.containers[1].lines[0].get_xdata()) == history().series("nelbo", x="tokens")[0]


def test_corrupted_text_is_escaped_and_gaps_are_visible(shown):
    plots.corrupted({"t = 0.5": ["a<b", None, " c"]})
    assert "a&lt;b" in shown[0].data and shown[0].data.count("░░░") == 1


@pytest.mark.parametrize("order", ["random", "remasking"])
def test_the_viewer_holds_the_whole_text_and_each_tokens_birth(shown, order):
    model, tokenizer = tiny_diffusion()
    options = dict(prompt="Return", length=10, steps=8, order=order, remask=0.5)
    samples = generate(model, tokenizer, **options, return_history=True)
    plots.viewer(samples, tokenizer)
    page = shown[0].data
    spans = re.findall(r"<span data-born='(-?\d+)'[^>]*>([^<]*)</span>", page)
    assert "".join(html.unescape(text) for _, text in spans) == "".join(
        tokenizer.decode([t]) for t in samples.tokens[0, 1:]
    )
    births = [int(born) for born, _ in spans]
    final = {position: index for index, reveal in enumerate(samples.history) for position in reveal.positions}
    assert births == [final.get(position, -1) for position in range(1, len(births) + 1)]
    assert births.count(-1) == len(births) - 10 and "<script" not in page and "type='range'" in page


def test_the_viewer_leaves_padding_out(shown):
    model, tokenizer = tiny_diffusion()
    prompts = ["Return", "Return the sum of an array along the given axis."]
    samples = generate(model, tokenizer, prompt=prompts, length=4, return_history=True)
    plots.viewer(samples, tokenizer, row=0)
    assert shown[0].data.count("data-born='") == samples.shown[0].sum() - 1 < samples.tokens.shape[1] - 1


def test_a_score_of_a_single_block_is_drawn_without_an_error(shown):
    run = History(records=[{"step": 10, "tokens": 100, "nelbo": 5.0, "nelbo_stderr": None}])
    plots.nelbo_against_tokens({"run": run})
    assert list(shown[0].axes[0].lines[0].get_ydata()) == [5.0]


def test_live_draws_all_arms_in_colors_of_their_own(shown):
    live = plots.Live(fraction=1.0)
    live({"one": history(), "two": history()})
    axis = shown[0].axes[0]
    labels = axis.get_legend_handles_labels()[1]
    assert labels == [f"{arm}: {what}" for arm in ("one", "two") for what in ("training loss", "held-out NELBO")]
    assert axis.lines[1].get_color() == axis.lines[2].get_color() != axis.lines[4].get_color()


def test_arms_show_each_seed_and_the_mean_with_its_error(shown):
    plots.arms({"with": [4.0, 4.2, 4.4], "without": [5.0, 5.0, 5.3]})
    axis = shown[0].axes[0]
    assert list(axis.lines[0].get_xdata()) == [4.0, 4.2, 4.4]
    means = [container.lines[0].get_xdata()[0] for container in axis.containers]
    assert means == pytest.approx([4.2, 5.1])
    low, high = axis.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(0.2 / 3**0.5)


def test_the_forest_shows_each_effect_with_its_seeds_and_error(shown):
    plots.forest({"large": [1.0, 1.2, 1.4], "small": [0.01, 0.02, 0.03]})
    axis = shown[0].axes[0]
    assert list(axis.lines[0].get_xdata()) == [1.0, 1.2, 1.4]
    assert [container.lines[0].get_xdata()[0] for container in axis.containers] == pytest.approx([1.2, 0.02])
    low, high = axis.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(0.2 / 3**0.5)
    assert [text.get_text() for text in axis.texts] == ["+1.200 ± 0.115", "+0.020 ± 0.006"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["large", "small"]


def test_the_worth_of_a_choice_is_drawn_against_its_budget(shown):
    plots.worth_against_budget({2_000_000: [0.1], 500_000: [0.5, 0.7]}, "worth")
    axis = shown[0].axes[0]
    assert list(axis.lines[0].get_xdata()) == [500_000, 2_000_000]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.6, 0.1])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.50 M", "2.0 M"]


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_stability_panel_marks_where_a_run_went_back(shown, scale):
    records = [
        {"step": s, "skipped": s // 10, "largest_norm": 2.0 if s != 15 else None, "saturated": 0.0, "norm_limit": 20.0}
        | ({"loss_scale": scale} if scale else {})
        for s in range(5, 30, 5)
    ]
    back = {
        "step": 20,
        "event": "at step 22 (5 steps in a row were skipped): rolled back to step 20, learning rate x 0.5",
    }
    plots.stability(History(records=[*records, back, {"step": 25, "event": "finished: no better NELBO"}]))
    axes = shown[0].axes
    titles = ["largest gradient norm in each record", "skipped steps so far", *(["loss scale"] if scale else [])]
    assert [axis.get_title() for axis in axes] == titles  # no panel of zeros: nothing was saturated
    assert list(axes[0].lines[0].get_xdata()) == [5, 10, 20, 25]
    assert list(axes[1].lines[0].get_ydata()) == [0, 1, 1, 2, 2]
    assert all([list(line.get_xdata()) for line in axis.lines[1:2]] == [[20, 20]] for axis in axes)
    assert sum(line.get_label() == "rolled back to here" for line in axes[0].lines) == 1


def test_the_smoothed_loss_is_centred_and_ends_where_its_window_does():
    x, y = plots._smooth(list(range(9)), [0.0, 0, 0, 7, 0, 0, 0, 0, 0])
    assert x == [2, 3, 4, 5, 6] and y == pytest.approx([7 / 5, 7 / 5, 7 / 5, 7 / 5, 0])
    x, y = plots._smooth(list(range(9)), [2.0 * i for i in range(9)])
    assert y == pytest.approx([2.0 * i for i in x])  # a trailing mean would lag behind a falling loss
    assert plots._smooth([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_the_strip_draws_each_token_masked_then_new_then_old(shown):
    model, tokenizer = tiny_diffusion()
    samples = generate(model, tokenizer, prompt="Return", length=10, steps=5, return_history=True)
    plots.strip(samples, tokenizer, frames=3)
    first, middle, last = (texts_of(axis) for axis in shown[0].axes)
    hidden = "#c9ced6"
    assert first[hidden].count(plots.EDGE) == 10 and "Return" in first["#111111"]
    assert 0 < middle[hidden].count(plots.EDGE) < 10 and hidden not in last
    assert plots.ORANGE in last and plots.ORANGE not in first
    assert f"after 0 of {len(samples.history)} passes" in shown[0].axes[0].get_title(loc="left")


def texts_of(axis) -> dict[str, str]:
    """What is drawn in each color, all lines together."""
    drawn: dict[str, str] = {}
    for text in axis.texts:
        drawn[text.get_color()] = drawn.get(text.get_color(), "") + text.get_text()
    return drawn


def test_restored_text_colors_right_and_wrong_tokens_in_their_columns(shown):
    texts = ["the mean of", " an", " old", "\n", " array\nof $x$"]
    tokenizer = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    truth, restored = torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 3, 4])
    plots.restored_text(tokenizer, truth, restored, torch.tensor([False, True, True, False]), width=30)
    drawn = [(text.get_text(), text.get_color()) for text in shown[0].axes[0].texts]
    assert drawn == [
        ("the mean of           array", "#111111"),
        ("            an", plots.GREEN),
        ("              ⏎", plots.RED),
        ("               [␣old]", plots.GREY),
        ("of $x$", "#111111"),
    ]


def test_a_word_is_moved_to_the_next_line_whole_unless_it_is_wider_than_a_line(shown):
    texts = ["hetero", "gen", "eous data", " ", "and unbreakable"]
    tokenizer = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    tokens = torch.arange(len(texts))
    plots.restored_text(tokenizer, tokens, tokens, torch.zeros(len(texts), dtype=torch.bool), width=9)
    lines = [text.get_text() for text in shown[0].axes[0].texts]
    assert lines == ["heterogen", "eous data", "and", "unbreakab", "le"]


def test_the_figure_by_time_shows_both_models_and_the_paired_gain(shown):
    rng = np.random.default_rng(0)
    base = Restored((0.1, 0.5), rng.random((2, 30)), rng.random((2, 30)))
    better = Restored((0.1, 0.5), base.nll - 0.1, base.accuracy + 0.2)
    plots.by_time({"diffusion": better, "AR base": base})
    left, middle, right = shown[0].axes
    assert len(left.containers) == len(middle.containers) == 2 and len(right.containers) == 1
    gain = right.containers[0]
    assert list(gain.lines[0].get_ydata()) == pytest.approx([20.0, 20.0])
    spread = [segment[1][1] - segment[0][1] for segment in gain.lines[2][0].get_segments()]
    assert max(spread) < 1e-9  # the same blocks differ by the same amount: a paired error of zero
