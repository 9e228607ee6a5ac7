"""Every figure of the notebooks, one call each. They take records and arrays, never a model."""

from __future__ import annotations

import html
import math
import textwrap
import time
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from .config import RunConfig
from .evaluation import Restored, mean_and_error
from .history import History
from .sampling import Samples

COLORS = BLUE, ORANGE, GREEN, GREY, RED = "#2563a8", "#d9822b", "#3a8f5c", "#8a8f98", "#b23b3b"
plt.rcParams |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


# ----------------------------------------------------------------------------------------------- the ideas
def mask_heatmaps(masks: dict[float, Tensor | None], length: int) -> None:
    """Attention masks `[1, 1, L, L]` (None is fully open) side by side; dark squares are open."""
    figure, axes = plt.subplots(1, len(masks), figsize=(2.7 * len(masks), 3.1))
    for axis, (ratio, mask) in zip(axes, masks.items(), strict=True):
        open_edges = np.ones((length, length)) if mask is None else (mask[0, 0] == 0).float().numpy()
        axis.imshow(open_edges, cmap="Blues", vmin=0, vmax=1.3)
        axis.set(title=f"ratio {ratio:g}", xlabel="key position", xticks=[], yticks=[])
    axes[0].set_ylabel("query position (dark: it sees the key)")
    _show(figure)


def shift_diagram(pieces: list[str], masked: list[bool]) -> None:
    """How predictions line up with tokens: the hidden state at i-1 predicts token i (or the one at i does)."""
    figure, axes = plt.subplots(2, 1, figsize=(1.15 * len(pieces), 4.4))
    for axis, shift in zip(axes, (True, False), strict=True):
        for i, (piece, hidden) in enumerate(zip(pieces, masked, strict=True)):
            _box(axis, i, 0, "[MASK]" if hidden else piece, GREY if hidden else BLUE)
            if hidden:
                _box(axis, i, 1, piece, ORANGE)
                source = i - 1 if shift else i
                axis.annotate("", (i, 0.78), (source, 0.22), arrowprops=dict(arrowstyle="-|>", color=ORANGE, lw=1.6))
        axis.set(xlim=(-0.6, len(pieces) - 0.4), ylim=(-0.4, 1.4), yticks=[0, 1], xticks=[])
        axis.set_yticklabels(["input", "predicted"])
        axis.set_title(
            "with the shift: the position on the left predicts" if shift else "without: each position predicts itself"
        )
        axis.grid(False)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    _show(figure)


def _box(axis, x: float, y: float, text: str, color: str) -> None:
    style = dict(boxstyle="round,pad=0.35", facecolor=color, edgecolor="none", alpha=0.9)
    axis.text(x, y, _plain(text), ha="center", va="center", color="white", fontsize=9, bbox=style)


def corrupted(rows: dict[str, list[str | None]]) -> None:
    """One text at several times: a list of pieces per row, None where a token is masked."""
    lines = []
    for label, pieces in rows.items():
        text = "".join(_GAP if piece is None else html.escape(piece) for piece in pieces)
        lines.append(f"<p style='margin:2px 0'><b>{html.escape(label)}</b></p><pre style='{_PAPER}'>{text}</pre>")
    display(HTML("".join(lines)))


def _plain(text: str) -> str:
    return text.replace("\n", "⏎").replace("$", r"\$").strip() or "␣"


# -------------------------------------------------------------------------------------------------- curves
class Live:
    """A loss curve that redraws itself while `train` or `train_arms` runs: `train(..., on_log=Live())`.

    Args:
        fraction: of the time that may be spent on drawing; evaluations and events are always drawn.
    """

    def __init__(self, fraction: float = 0.03):
        self.fraction, self.due, self.handle = fraction, -math.inf, None

    def __call__(self, history: History | dict[str, History], config: RunConfig | None = None) -> None:
        histories = history if isinstance(history, dict) else {config.name if config else "run": history}
        last = [history.records[-1] for history in histories.values()]
        must_draw = any("nelbo" in record or "event" in record for record in last)
        begun = time.monotonic()
        if begun < self.due and not must_draw:
            return
        figure, axis = plt.subplots(figsize=(8, 3.6))
        _draw_loss(axis, histories, evaluated=True)
        one = next(iter(histories.values()))
        speed = one.last("tokens_per_second") if len(histories) == 1 else None
        axis.set_title(f"step {last[0]['step']}" + (f", {speed:,} tokens/s" if speed else ""))
        axis.legend(loc="upper right")
        if sample := one.last("sample"):
            text = textwrap.shorten(f"sample: {sample}", 115, placeholder=" ...").replace("$", r"\$")
            figure.text(0.01, -0.06, text, fontsize=8, family="monospace", color=GREY)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        ended = time.monotonic()
        self.due = ended + (ended - begun) * (1 / self.fraction - 1)


def curves(histories: dict[str, History], ar_nll: float | None = None, ratio_of: str | None = None) -> None:
    """Training loss, and held-out NELBO with error bars, of one or more runs.

    Args:
        ar_nll: nats per token of the AR model on the same blocks, drawn as the line to compare with.
        ratio_of: the run whose annealing ratio is drawn over the training loss.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    _draw_loss(left, histories, evaluated=False)
    if ratio_of is not None:
        twin = left.twinx()
        twin.plot(*histories[ratio_of].series("ratio"), color=GREY, linestyle=":", label="annealing ratio")
        twin.set(ylim=(0, 1.05), ylabel="annealing ratio (dotted)")
        twin.grid(False)
        twin.spines["right"].set_visible(True)
    _draw_nelbo(right, histories, ar_nll, x="step", capsize=3)
    last = next(iter(histories.values())).records[-1]
    size = f" ({last['tokens'] / last['step']:,.0f} tokens each)" if last["step"] else ""
    for axis in (left, right):
        axis.set(xlabel=f"optimizer step{size}")
        # below the panel, where no curve runs
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    _show(figure)


def nelbo_against_tokens(histories: dict[str, History], ar_nll: float | None = None) -> None:
    """Held-out NELBO with error bars against the tokens seen, on a logarithmic axis: runs of any length compare."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    axis.set(xscale="log", xlabel="tokens seen")
    _draw_nelbo(axis, histories, ar_nll, x="tokens", ms=4, capsize=2)
    axis.legend()
    _show(figure)


def _draw_nelbo(axis, histories: dict[str, History], ar_nll: float | None, x: str, **style) -> None:
    for (name, history), color in zip(histories.items(), cycle(COLORS), strict=False):
        scored = [record for record in history.records if record.get("nelbo") is not None]
        scored = [record for record in scored if record[x] or axis.get_xscale() == "linear"]  # log 0 is nowhere
        places, means = [record[x] for record in scored], [record["nelbo"] for record in scored]
        errors = [record.get("nelbo_stderr") or 0.0 for record in scored]  # one held-out block gives no error
        axis.errorbar(places, means, yerr=errors, color=color, marker="o", label=name, **style)
    if ar_nll is not None:
        axis.axhline(ar_nll, color=RED, linestyle="--", label=f"AR model: {ar_nll:.2f}")
    axis.set(ylabel="nats per token", title="held-out NELBO (lower is better)")


def _draw_loss(axis, histories: dict[str, History], evaluated: bool = True) -> None:
    for (name, history), color in zip(histories.items(), cycle(COLORS), strict=False):
        axis.plot(*history.series("loss"), color=color, alpha=0.35, lw=1)
        axis.plot(*_smooth(*history.series("loss")), color=color, lw=2, label=f"{name}: training loss")
        if evaluated and history.series("nelbo")[0]:
            dots = ORANGE if len(histories) == 1 else color
            axis.plot(*history.series("nelbo"), "o", color=dots, label=f"{name}: held-out NELBO")
    axis.set(xlabel="optimizer step", ylabel="nats per token", title="training loss")


def _smooth(x: list, y: list, window: int = 5) -> tuple[list, np.ndarray | list]:
    """Means of `window` points around each that has as many; the points themselves while there are few."""
    if len(y) < 2 * window - 1:
        return x, y
    return x[window // 2 : -(window // 2)], np.convolve(y, np.full(window, 1 / window), "valid")


# -------------------------------------------------------------------------------------------- comparisons
def arms(scores: dict[str, list[float]]) -> None:
    """Each arm's NELBO: a dot for each seed, a bar for their mean with its standard error."""
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(scores) + 1.2))
    for row, values in enumerate(scores.values()):
        mean, error = mean_and_error(np.array(values))
        axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.45, ms=7)
        axis.errorbar(mean, row, xerr=error, color=BLUE, marker="|", ms=22, mew=2.5, capsize=4)
        axis.annotate(f"{mean:.3f}", (mean, row), (0, 15), textcoords="offset points", ha="center", color=BLUE)
    axis.set(
        yticks=range(len(scores)),
        ylim=(len(scores) - 0.5, -0.7),
        xlabel="NELBO on held-out text, nats per token (lower is better)",
    )
    axis.set_yticklabels(scores)
    axis.grid(False, axis="y")
    _show(figure)


def forest(effects: dict[str, list[float]]) -> None:
    """Paired differences, nats per token: a dot for each seed, a square for their mean with its standard error.

    The axis is linear up to 0.01 and logarithmic beyond, so that small effects are visible beside large ones.
    """
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(effects) + 1.1))
    for row, values in enumerate(effects.values()):
        mean, error = mean_and_error(np.array(values))
        axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.35, ms=5)
        axis.errorbar(mean, row, xerr=error, color=BLUE, marker="s", ms=6, capsize=4)
        label = f"{mean:+.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")
        axis.annotate(label, (1.02, row), xycoords=("axes fraction", "data"), va="center", color=BLUE)
    axis.axvline(0, color="black", lw=0.8)
    lowest, highest = (pick(value for values in effects.values() for value in values) for pick in (min, max))
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_xlim(min(-0.002, 1.5 * lowest), max(0.002, 1.5 * highest))
    axis.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axis.set(
        yticks=range(len(effects)),
        ylim=(len(effects) - 0.5, -0.5),
        xlabel="improvement of NELBO, nats per token (linear below 0.01, logarithmic above)",
    )
    axis.set_yticklabels(effects)
    axis.grid(False, axis="y")
    _show(figure)


def worth_against_budget(worth: dict[int, list[float]], what: str) -> None:
    """A difference in nats per token against the training budget, with every seed and the mean's standard error.

    A single seed has no error bar.

    Args:
        worth: tokens of training -> the difference, one value for each seed.
    """
    tokens = sorted(worth)
    means, errors = zip(*(mean_and_error(np.array(worth[n])) for n in tokens), strict=True)
    figure, axis = plt.subplots(figsize=(8, 3.8))
    axis.errorbar(tokens, means, yerr=errors, color=BLUE, marker="o", capsize=4, lw=2)
    for n in tokens:
        axis.plot([n] * len(worth[n]), worth[n], "o", color=BLUE, alpha=0.35, ms=4)
    axis.set(xscale="log", xlabel="tokens of training", ylabel="nats per token", title=what)
    axis.set_xticks(tokens, [f"{n / 1e6:.2f} M" if n < 1e6 else f"{n / 1e6:.1f} M" for n in tokens])
    axis.minorticks_off()
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    _show(figure)


# ---------------------------------------------------------------------------------------------- stability
def stability(history: History) -> None:
    """What the checks of a run saw: gradient norms, and whatever else was not zero throughout; red at a rollback."""
    panels = {
        "largest_norm": "largest gradient norm in each record",
        "skipped": "skipped steps so far",
        "saturated": "fraction of saturated predictions",
        "loss_scale": "loss scale",
    }
    panels = {key: title for key, title in panels.items() if key == "largest_norm" or any(history.series(key)[1])}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), squeeze=False)
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        axis.plot(*history.series(key), color=BLUE, lw=1.8, drawstyle="steps-post" if key == "skipped" else "default")
        for step, event in zip(*history.series("event"), strict=True):
            if "back to step" in event:
                axis.axvline(step, color=RED, linestyle="--", lw=1.4, label="rolled back to here")
        axis.set(title=title, xlabel="optimizer step")
        if key == "skipped":
            axis.locator_params(axis="y", integer=True)
    axes[0, 0].plot(*history.series("norm_limit"), color=ORANGE, linestyle=":", label="beyond this a step is a spike")
    _logarithmic(axes[0, 0])
    figure.legend(*_once(axes[0, 0]), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2)
    _show(figure)


def _logarithmic(axis) -> None:
    """A logarithmic y axis with plain numbers: 1, 3, 10, 30, ..."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _once(axis) -> tuple[list, list]:
    """Handles and labels of a legend in which each label stands once."""
    unique = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(unique.values()), list(unique)


# ------------------------------------------------------------------------------------------------- samples
def quality_vs_passes(rows: list[dict], ar: dict, real: dict) -> None:
    """Perplexity under the AR judge beside diversity, with their standard errors, against forward passes.

    Args:
        rows: dictionaries with order, passes, and the fields of `TextQuality`. Points of one number of passes are drawn
            side by side.
        ar: the same, without order, for what the AR model wrote: a star.
        real: the three figures of real text: a line.
    """
    panels = {
        "perplexity": "perplexity under the AR model",
        "entropy": "unigram entropy of a sample (nats)",
        "repetition": "fraction of tokens seen in the 16 before",
    }
    orders = list(dict.fromkeys(row["order"] for row in rows))
    ticks: list[int] = []  # at the points, but for those whose labels would overlap
    for passes in sorted({row["passes"] for row in [*rows, ar]}):
        ticks += [passes] if not ticks or passes > 1.2 * ticks[-1] else []
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for k, (order, color) in enumerate(zip(orders, cycle(COLORS), strict=False)):
            points = sorted((row["passes"], row[key], row["stderr"][key]) for row in rows if row["order"] == order)
            passes, means, errors = map(np.array, zip(*points, strict=True))
            beside = 1.03 ** (k - (len(orders) - 1) / 2)  # so that no error bar hides another
            axis.errorbar(
                beside * passes, means, yerr=errors, fmt="o-", color=color, ms=4, lw=1.2, capsize=2, label=order
            )
        axis.errorbar(
            ar["passes"],
            ar[key],
            yerr=ar["stderr"][key],
            fmt="*",
            color="black",
            ms=12,
            capsize=2,
            label="the AR model",
        )
        axis.axhline(real[key], color="black", linestyle=":", label="real text")
        axis.set(xlabel="forward passes", title=title, xscale="log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
    _logarithmic(axes[0])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    _show(figure)


_PAPER = (
    "white-space:pre-wrap;margin:0 0 8px;padding:8px;background:#f6f7f9;color:#222;border-radius:6px;line-height:1.5"
)
_GAP = "<span style='background:#c9ced6;border-radius:3px'>░░░</span>"


def viewer(samples: Samples, tokenizer, row: int = 0) -> None:
    """Step through the denoising of one sample with a slider, in plain HTML: no kernel, no widgets.

    Without scripts (on GitHub, or in a notebook that is not trusted yet) the finished text remains; `strip` shows the
    same as a picture.
    """
    born = _born(samples, row)
    last = max(1, len(samples.history) - 1)
    spans = []
    for i, token in enumerate(samples.tokens[row].tolist()[1:]):
        if not samples.shown[row, i + 1]:
            continue
        text = html.escape(tokenizer.decode([token]))
        shade = "#111" if born[i] < 0 else f"hsl(212,65%,{25 + 40 * born[i] / last:.0f}%)"
        spans.append(f"<span data-born='{born[i]}' style='color:{shade}'>{text}</span>")
    key = f"v{abs(hash((tuple(samples.tokens[row].tolist()), row))) % 10**10}"
    script = (
        f"(function(n){{document.querySelectorAll('#{key} span[data-born]').forEach(function(s){{"
        "var hide=+s.dataset.born>=n;s.style.background=hide?'#c9ced6':'';s.style.borderRadius='3px';"
        "if(s.dataset.text===undefined)s.dataset.text=s.textContent;s.textContent=hide?'░░░':s.dataset.text;});"
        f"document.getElementById('{key}-n').textContent=n;}})(+this.value)"
    )
    total = len(samples.history)
    slider = (
        f"<p style='margin:4px 0'>after <b id='{key}-n'>{total}</b> of {total} passes (the lighter, the later)</p>"
        f"<input type='range' min='0' max='{total}' value='{total}' style='width:95%' oninput=\"{script}\">"
    )
    display(HTML(f"<div>{slider}<pre id='{key}' style='{_PAPER}'>{''.join(spans)}</pre></div>"))


def _born(samples: Samples, row: int) -> list[int]:
    """For each position but the first, the pass that revealed its final token; -1 where it was given."""
    born = [-1] * (samples.tokens.shape[1] - 1)
    for index, reveal in enumerate(samples.history):
        for r, position in zip(reveal.rows, reveal.positions, strict=True):
            if r == row:
                born[position - 1] = index
    return born


def strip(samples: Samples, tokenizer, row: int = 0, frames: int = 6, width: int = 52, columns: int = 3) -> None:
    """The denoising of one sample as a picture: grey boxes are masked, orange tokens are new since the frame before.

    Args:
        samples: with `return_history`.
        frames: how many moments to draw, from the first to the last.
        width: characters per line.
        columns: frames beside each other.
    """
    born, total = _born(samples, row), len(samples.history)
    keep = [i for i in range(len(born)) if samples.shown[row, i + 1]]
    pieces = [tokenizer.decode([samples.tokens[row, i + 1].item()]) for i in keep]
    figure, axes = plt.subplots(math.ceil(frames / columns), columns, squeeze=False)
    before, lines = 0, 1
    for frame, axis in enumerate(axes.flat):
        if frame >= frames:
            axis.axis("off")
            continue
        cut = round(total * frame / (frames - 1))
        states = [
            "given" if born[i] < 0 else "masked" if born[i] >= cut else "new" if born[i] >= before else "old"
            for i in keep
        ]
        lines = _paragraph(axis, list(zip(pieces, states, strict=True)), width)
        axis.set_title(f"after {cut} of {total} passes", loc="left", fontsize=9)
        before = cut
    figure.set_size_inches(CHARACTER * (width + 3) * columns, len(axes) * (0.2 * lines + 0.4))
    _show(figure)


def restored_text(tokenizer, truth: Tensor, restored: Tensor, hidden: Tensor, width: int = 96) -> None:
    """A passage some of whose tokens were hidden and restored: right ones green; wrong ones red, the truth in brackets.

    Args:
        truth, restored: `[n]` ids of the tokens that stood there, and of those that a model put in the hidden places.
        hidden: `[n]` bool.
    """
    pieces = []
    for token, answer, is_hidden in zip(truth, restored, hidden, strict=True):
        text = tokenizer.decode([token])
        if not is_hidden or answer == token:
            pieces.append((text, "right" if is_hidden else "given"))
        else:
            pieces += [(_visible(tokenizer.decode([answer])), "wrong"), (f"[{_visible(text)}]", "missed")]
    figure, axis = plt.subplots(figsize=(CHARACTER * width, 1))
    lines = _paragraph(axis, pieces, width)
    figure.set_size_inches(CHARACTER * width, 0.2 * lines + 0.3)
    _show(figure)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣")


CHARACTER = 0.08  # inches per character of a paragraph, at its font size
INKS = {
    "given": "#111111", "old": "#111111", "masked": "#c9ced6", "new": ORANGE, "right": GREEN, "wrong": RED,
    "missed": GREY,
}  # fmt: skip
BOX, EDGE = "█", "▉"  # a masked character, and the last one of its token


def _paragraph(axis, pieces: list[tuple[str, str]], width: int) -> int:
    """Draw pieces of text in their states, in lines of `width` characters; returns the number of lines.

    Each line is drawn once per state, with spaces where the other states are, so that no character leaves its column.
    """
    lines: list[list[tuple[str, str, str]]] = [[]]  # a character, what is drawn for it, and its state
    for text, state in pieces:
        boxes = BOX * (len(text) - 1) + EDGE
        for character, box in zip(text, boxes, strict=False):  # an empty text has a box left over
            if character == "\n" or (character == " " and len(lines[-1]) == width):
                lines.append([])
                continue
            if len(lines[-1]) == width:  # the word that does not fit begins the next line
                characters = "".join(known for known, _, _ in lines[-1])
                begin = characters.rfind(" ") + 1 or width
                lines[-1:] = [lines[-1][:begin], lines[-1][begin:]]
            shown = box if state == "masked" else character if character.isprintable() else "·"
            lines[-1].append((character, shown, state))
    style = dict(family="monospace", fontsize=9, va="center", parse_math=False)
    for number, line in enumerate(lines):
        for state in dict.fromkeys(state for _, _, state in line):
            shown = "".join(drawn if its == state else " " for _, drawn, its in line).rstrip()
            axis.text(0, -number - 0.42, shown, color=INKS[state], **style)
    axis.set(xlim=(0, width), ylim=(-len(lines) - 0.1, 0.1))
    axis.axis("off")
    return len(lines)


def by_time(scores: dict[str, Restored]) -> None:
    """How well hidden tokens are restored when a fraction t of the text is hidden: accuracy, NLL, and paired gains.

    Args:
        scores: models scored on the same hidden tokens; the last one is what the others are compared with.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    *_, (reference, base) = scores.items()
    for (name, score), color in zip(scores.items(), cycle(COLORS), strict=False):
        style = dict(color="black" if name == reference else color, marker="o", ms=4, capsize=3, label=name)
        style |= dict(linestyle="--") if name == reference else {}
        for axis, what, factor in ((left, "accuracy", 100), (middle, "nll", 1)):
            mean, error = score.mean(what)
            axis.errorbar(score.times, factor * mean, yerr=factor * error, **style)
        if name != reference:
            gain, error = score.difference(base, "accuracy")
            right.errorbar(score.times, 100 * gain, yerr=100 * error, **style)
    right.axhline(0, color="black", lw=0.8)
    left.set(ylabel="exactly right, %", title="hidden tokens restored")
    middle.set(ylabel="nats per hidden token", title="negative log-likelihood")
    right.set(ylabel="percentage points", title=f"gain over {reference}, paired")
    for axis in (left, middle, right):
        axis.set(xlabel="fraction of the text that is hidden, t", ylim=(min(0, axis.get_ylim()[0]), None))
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    _show(figure)


def _show(figure) -> None:
    figure.tight_layout()
    display(figure)
    plt.close(figure)
