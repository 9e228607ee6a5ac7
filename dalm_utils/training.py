"""The one training loop, for every objective: one run, or several in turns."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import torch
from accelerate.tracking import GeneralTracker
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import RunConfig
from .history import History
from .processes import any_process, leave_group_at_exit, make_accelerator
from .run import Run, build
from .stability import Unstable
from .terminal import despite_lost_output, first_line, stop_signals, warn

PAIRED = (  # what the arms of an ablation must have in common, to see the same batches and noise
    "objective", "text", "field", "train_blocks", "length", "batch", "accumulate", "seed", "times", "eps", "device",
    "precision",
)  # fmt: skip


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    resume: str = "auto",
    on_log: Callable[[History, RunConfig], None] | None = None,
) -> History:
    """Train `model` in place and return its history; the run's folder holds checkpoints, `best` and history.

    Interrupting (Ctrl-C, the stop button, SIGTERM, a closed terminal) finishes the step, writes a checkpoint and
    returns, with the signal in `History.stopped_by`; a second Ctrl-C does not wait. Called again with the same config,
    training resumes there, as if it had not been interrupted: on a CPU bit for bit, on a GPU to rounding. A finished
    run continues when it is given more steps: the cosine then ends at the new last step. A diffusion model whose mask
    has opened is trained further without closing it.
    Under `accelerate launch` the same call is one of many processes.

    With `lora_rank` the model has adapters while it is trained. At the end, however that comes, they are merged, and it
    is a stock model again, as in `best`. Checkpoints hold the adapters alone: to resume, pass the base again.

    Args:
        model: from `as_diffusion` or `load_diffusion` (or a plain AR model if the objective is "ar" or "finetune-ar").
        resume: "auto" continues from the newest whole checkpoint, if there is one; "never" starts over and
            moves an earlier run of that name aside.
        on_log: called with (history, config) after each record, to draw it.

    Raises:
        ValueError: the earlier run of that name had another config (the difference is spelled out), the
            model does not fit, or the text has too few tokens.
        RuntimeError: another process is writing to the same run, another process of this run has died, the last
            checkpoint could not be written, or the run is unstable (`Unstable`) and rolling back did not help.
    """
    with _opened({config.name: (model, tokenizer, config)}, resume) as runs:
        run = runs[config.name]
        _drive(runs, None if on_log is None else lambda: on_log(run.history, config))
        return run.history


def train_arms(
    configs: dict[str, RunConfig], *, resume: str = "auto", on_log: Callable[[dict[str, History]], None] | None = None
) -> dict[str, History]:
    """Train several arms step by step in turn, in one process: same batches, times, masks and annealing draws.

    Each arm builds its own model with `build` and keeps its own folder, `<config.name>-<arm>`.

    Raises:
        ValueError: arms that would not be paired, because they differ in one of `PAIRED` or in their tokenizer.
    """
    if not configs:
        raise ValueError("no arm to train: configs is empty")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        for field in PAIRED:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"the arms differ in {field} ({getattr(first, field)!r}, and {getattr(config, field)!r} in "
                    f"{name!r}), so they would not see the same batches and noise; make it the same in all"
                )
    arms = {
        name: (*build(config, device="cpu"), config.replace(name=f"{config.name}-{name}"))
        for name, config in configs.items()
    }
    with _opened(arms, resume) as runs:
        _drive(runs, None if on_log is None else lambda: on_log(_histories(runs)))
        return _histories(runs)


@contextlib.contextmanager
def _opened(arms: dict[str, tuple], resume: str) -> Iterator[dict[str, Run]]:
    """The runs, their folders claimed; released at the end, whatever happens."""
    with leave_group_at_exit(), contextlib.ExitStack() as stack:
        runs = {}
        for name, (model, tokenizer, config) in arms.items():
            runs[name] = Run(model, tokenizer, config, make_accelerator(config), resume)  # each has its own loss scale
            stack.callback(runs[name].close)
        first = next(iter(runs.values()))
        if first.config.trackers:
            first.accelerator.init_trackers("trackers")
            for tracker in first.accelerator.trackers:
                stack.callback(_finish, tracker)
        for name, run in runs.items():
            run.accelerator.trackers = first.accelerator.trackers
            if run.task.digest != first.task.digest:
                raise ValueError(
                    f"arm {name!r} (base {run.config.base!r}) reads the text as other tokens than the first arm (base "
                    f"{first.config.base!r}), so they would not see the same batches; use bases with one tokenizer"
                )
        yield runs


def _finish(tracker: GeneralTracker) -> None:
    """Close a tracker; one that fails must not make a finished run look like a failed one."""
    try:
        tracker.finish()
    except Exception as error:
        warn(f"the tracker {tracker.name!r} could not be closed: {first_line(error)}")


def _drive(runs: dict[str, Run], report: Callable[[], None] | None) -> None:
    """Advance all runs step by step in turn, until they are done or the user stops them."""
    first = next(iter(runs.values()))
    report = report if first.is_main and report is not None else lambda: None
    with _stop_at_step_end() as asked, _progress_bar(runs) as show, _naming_the_checkpoint(first):
        if all(run.is_done for run in runs.values()):
            report()  # a finished run shows its curve again
        rounds, stopped = 0, False
        while not stopped and (active := [run for run in runs.values() if not run.is_done]):
            recorded = _advance(active)
            rounds += 1
            try:
                if recorded:
                    with despite_lost_output():
                        report()
                show()
            except Exception:  # a figure that cannot be drawn, or a pipe that is closed, must not cost the steps taken
                if first.accelerator.num_processes == 1:  # several would have to agree to write a checkpoint
                    _save(runs)
                raise
            # Agreeing takes communication, so several processes do it every few rounds, all of them in the same.
            if first.accelerator.num_processes == 1 or rounds % first.config.log_every == 0:
                stopped = any_process(first.accelerator, bool(asked))
        _save(runs)
    if stopped and not all(run.is_done for run in runs.values()):
        for run in runs.values():
            run.history.stopped_by = asked[0] if asked else signal.SIGTERM  # or another process was asked
        last = next(run for run in runs.values() if not run.is_done)
        if last.is_main:
            warn(f"stopped at step {last.step} of {last.total}; run it again to resume there")


def _save(runs: dict[str, Run]) -> None:
    """Write a checkpoint of each run, and say where that was not possible.

    Raises:
        RuntimeError: the disk refused.
    """
    for run, trouble in [(run, run.save()) for run in runs.values()]:
        if trouble is not None and run.is_main:
            warn(
                f"step {run.step} of {run.config.name!r} was not saved, since its weights are unusable: {trouble}; "
                f"{_what_is_saved(run)}"
            )
        elif trouble is None and run.saved_step != run.step:
            raise RuntimeError(
                f"the last checkpoint of {run.config.name!r}, at step {run.step}, could not be written. Make room: "
                f"{_what_is_saved(run)}. (A model that was passed to `train` still holds step {run.step}.)"
            )


def _advance(runs: list[Run]) -> bool:
    """Take a step of each run; returns whether any of them recorded something.

    Raises:
        Unstable: one of them cannot go on; the others are saved first.
    """
    recorded = False
    for run in runs:
        try:
            recorded |= run.advance()
        except Unstable:
            for other in runs:
                if other is not run:
                    other.save()
            raise
    return recorded


class _Bar(tqdm):
    """A bar that stays undrawn where that is refused: an error of `display` would leave tqdm's lock held for good."""

    def display(self, *arguments, **options):
        with despite_lost_output():
            super().display(*arguments, **options)


@contextlib.contextmanager
def _progress_bar(runs: dict[str, Run]) -> Iterator[Callable[[], None]]:
    """A bar on the main process for the longest run, and the function that brings it up to date."""
    first = max(runs.values(), key=lambda run: run.total)
    # Drawn once a second: a notebook's viewer may keep a thousand messages of a cell and lose the rest.
    bar = _Bar(
        total=first.total, initial=first.step, desc=" + ".join(runs), unit="step", mininterval=1,
        disable=not first.is_main,
    )  # fmt: skip

    def show() -> None:
        bar.update(first.step - bar.n)  # backwards, when the run rolls back
        latest = {key: first.history.last(key) for key in ("loss", first.task.metric)}
        figures = {key: f"{value:.3f}" for key, value in latest.items() if value is not None}
        bar.set_postfix(figures, refresh=False)

    try:
        yield show
    finally:
        with despite_lost_output():
            bar.close()


@contextlib.contextmanager
def _stop_at_step_end() -> Iterator[list]:
    """A list that is empty until a signal asks to stop, see `stop_signals`. A step is never cut in two."""
    asked: list = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread receives signals
        return
    old = {kind: signal.signal(kind, ask) for kind in stop_signals()}
    try:
        yield asked
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _naming_the_checkpoint(run: Run) -> Iterator[None]:
    """When one of several processes dies, the others fail in the middle of a step: say what that means."""
    try:
        yield
    except RuntimeError as error:
        if run.accelerator.num_processes == 1 or isinstance(error, (Unstable, torch.OutOfMemoryError)):
            raise
        raise RuntimeError(
            f"process {run.accelerator.process_index} stopped in step {run.step + 1}, probably because another one "
            f"died ({first_line(error)}); {_what_is_saved(run)}."
        ) from error


def _what_is_saved(run: Run) -> str:
    if run.saved_step < 0:
        return "there is no checkpoint yet, so the same command starts over"
    return f"the checkpoint of step {run.saved_step} is whole, and the same command resumes there"


def _histories(runs: dict[str, Run]) -> dict[str, History]:
    """The histories of runs as they are now: one that rolls back takes an earlier history."""
    return {name: run.history for name, run in runs.items()}
