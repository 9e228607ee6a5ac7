import html
import re

import matplotlib

matplotlib.use("Agg")

import pytest

from dalm_utils import annealed_mask, generate, plots
from dalm_utils.checkpoint import History
from dalm_utils.config import RunConfig
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
    assert sources == [[0, 2], [1, 3]]  # with the shift from the left neighbour, without it from the place itself


def test_curves_hold_the_recorded_points(shown):
    plots.curves({"run": history()}, ar_nll=2.5, ratio_of="run")
    left, right, *_ = shown[0].axes
    assert list(left.lines[0].get_ydata()) == history().series("loss")[1]
    assert any(2.5 in line.get_ydata() for line in right.lines) and list(right.lines[0].get_ydata()) == [4.0, 3.0]


def test_the_live_curve_redraws_and_closes_its_figures(shown):
    live = plots.Live(every=0)
    for end in (10, 20, 40):
        live(history(40) if end == 40 else History(records=history().records[: end // 5]), RunConfig(name="run"))
    assert len(shown) == 3 and not matplotlib.pyplot.get_fignums()
    assert "it writes: costs" in shown[-1].texts[0].get_text()


def test_quality_panels(shown):
    rows = [
        dict(order=order, passes=passes, perplexity=100 / passes, entropy=3.0, distinct_2=0.9, repetition=0.2)
        for order in ("random", "confidence") for passes in (8, 4)
    ]  # fmt: skip
    figures = dict(perplexity=20, entropy=3.5, distinct_2=1, repetition=0.1)
    plots.quality_vs_passes(rows, {"passes": 95, **figures}, figures)
    assert [len(axis.lines) for axis in shown[0].axes] == [4, 4, 4]
    assert list(shown[0].axes[0].lines[0].get_xdata()) == [4, 8]  # by passes, whatever the order of the rows


def test_nelbo_against_tokens_puts_runs_of_any_length_on_one_axis(shown):
    plots.nelbo_against_tokens({"short": history(25), "long": history()}, ar_nll=2.5)
    (axis,) = shown[0].axes
    assert axis.get_xscale() == "log"
    assert list(axis.containers[1].lines[0].get_xdata()) == history().series("nelbo", x="tokens")[0]


def test_corrupted_text_is_escaped_and_gaps_are_visible(shown):
    plots.corrupted({"t = 0.5": ["a<b", None, " c"]})
    assert "a&lt;b" in shown[0].data and shown[0].data.count("░░░") == 1


def test_the_viewer_holds_the_whole_text_and_each_tokens_birth(shown):
    model, tokenizer = tiny_diffusion()
    samples = generate(model, tokenizer, prompt="Return", length=10, steps=4, return_history=True)
    plots.viewer(samples, tokenizer)
    page = shown[0].data
    spans = re.findall(r"<span data-born='(-?\d+)'[^>]*>([^<]*)</span>", page)
    assert "".join(html.unescape(text) for _, text in spans) == "".join(
        tokenizer.decode([t]) for t in samples.tokens[0, 1:]
    )
    births = [int(born) for born, _ in spans]
    for index, reveal in enumerate(samples.history):
        assert [position for position, born in enumerate(births, 1) if born == index] == sorted(reveal.positions)
    assert births.count(-1) == len(births) - 10 and "<script" not in page and "type='range'" in page
