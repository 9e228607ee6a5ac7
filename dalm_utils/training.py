"""The one training loop: adapts, trains from scratch, and (objective="ar") makes the AR bases too."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import pick_device, pick_precision
from .checkpoint import History, first_line
from .config import RunConfig
from .processes import leave_group_at_exit
from .run import Run, build
from .stability import Unstable


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    resume: str = "auto",
    on_log: Callable[[History, RunConfig], None] | None = None,
) -> History:
    """Train in place and return what was recorded; the run's folder holds checkpoints, `best` and history.

    Interrupting (Ctrl-C, the stop button, SIGTERM) finishes the step, writes a checkpoint and returns; a second
    Ctrl-C does not wait. Called again with the same config it continues there, and what it then does is what it
    would have done. Under `accelerate launch` the same call is one of many processes.

    Args:
        model: from `as_diffusion` (or a plain AR model if `config.objective` is "ar").
        resume: "auto" continues from the newest whole checkpoint, if there is one; "never" starts afresh and
            moves an earlier run of that name aside.
        on_log: called with (history, config) after each record, to draw it.

    Raises:
        ValueError: the earlier run of that name had another config (the difference is spelled out), the
            model does not fit, or the text has too few tokens.
        RuntimeError: another process is writing to the same run, one of this run's own has died, the last checkpoint
            could not be written, or the run is numerically unstable and going back to a checkpoint did not help.
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
        ValueError: arms that would not be paired, because they differ in one of `PAIRED`.
    """
    first = next(iter(configs.values()))
    for name, config in configs.items():
        for field in PAIRED:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"the arms differ in {field} ({getattr(first, field)!r}, and {getattr(config, field)!r} in "
                    f"{name!r}), so they would not see the same batches and noise; make it the same in all"
                )
    arms = {
        name: (*build(config.replace(device="cpu")), config.replace(name=f"{config.name}-{name}"))
        for name, config in configs.items()
    }
    with _opened(arms, resume) as runs:
        _drive(runs, None if on_log is None else lambda: on_log(_histories(runs)))
        return _histories(runs)


def _histories(runs: dict[str, Run]) -> dict[str, History]:
    """As they are now: a run that goes back takes up another one."""
    return {name: run.history for name, run in runs.items()}


KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
PAIRED = (
    "text", "field", "train_blocks", "length", "batch", "accumulate", "seed", "times", "eps", "attention", "device",
    "precision",
)  # fmt: skip


@contextlib.contextmanager
def _opened(arms: dict[str, tuple], resume: str) -> Iterator[dict[str, Run]]:
    """The runs, their folders claimed; given back at the end, whatever happens."""
    with leave_group_at_exit(), contextlib.ExitStack() as stack:
        runs = {}
        for name, (model, tokenizer, config) in arms.items():
            runs[name] = Run(model, tokenizer, config, _accelerator(config), resume)  # each has its own loss scale
            stack.callback(runs[name].close)
        first, *others = runs.values()
        if first.config.trackers:
            first.accelerator.init_trackers("trackers")
            for tracker in first.accelerator.trackers:
                stack.callback(tracker.finish)
        for run in others:
            run.accelerator.trackers = first.accelerator.trackers
        yield runs


def _drive(runs: dict[str, Run], report: Callable[[], None] | None) -> None:
    """Advance all runs by one step, again and again, until they are done or the user stops them."""
    some = next(iter(runs.values()))
    # Drawn once a second: what shows a notebook may keep a thousand messages of a cell and lose the rest.
    bar = tqdm(
        total=some.total, initial=some.step, desc=" + ".join(runs), unit="step", mininterval=1, disable=not some.is_main
    )
    report = report if some.is_main and report is not None else lambda: None
    with _stop_at_step_end() as asked, bar, _told_where_it_ended(some):
        if all(run.is_done for run in runs.values()):
            report()  # a finished run shows its curve again
        stopped = False
        while not stopped and not all(run.is_done for run in runs.values()):
            if any([run.advance() for run in runs.values() if not run.is_done]):  # a list: every arm takes its step
                report()
            bar.update(some.step - bar.n)  # backwards, when the run goes back
            figures = {key: f"{value:.3f}" for key in ("loss", "nelbo") if (value := some.history.last(key))}
            bar.set_postfix(figures, refresh=False)
            stopped = _all_agree(asked, some)
        for run in runs.values():
            run.save()
    for run in runs.values():
        if run.saved_step != run.step:
            raise RuntimeError(
                f"the last checkpoint of {run.config.name!r}, at step {run.step}, could not be written. Make room: "
                f"{_newest(run)}. (A model that was handed to `train` still holds step {run.step}.)"
            )
    if stopped and some.is_main:
        print(f"stopped at step {some.step} of {some.total}; run it again to continue from there", file=sys.stderr)


def _all_agree(asked: list, run: Run) -> bool:
    """Whether any process was asked to stop. Several compare notes when they log, which waits for all anyway."""
    if run.accelerator.num_processes == 1:
        return bool(asked)
    if run.step % run.config.log_every:
        return False
    return bool(run.accelerator.reduce(torch.tensor(float(len(asked)), device=run.accelerator.device)) > 0)


@contextlib.contextmanager
def _stop_at_step_end() -> Iterator[list]:
    """A list that is empty until Ctrl-C or SIGTERM asks for an end; a step is never cut in two."""
    asked: list = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread receives signals
        return
    old = {kind: signal.signal(kind, ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _told_where_it_ended(run: Run) -> Iterator[None]:
    """When one of several processes dies, the others fail in the middle of a step: say what that means."""
    try:
        yield
    except RuntimeError as error:
        if run.accelerator.num_processes == 1 or isinstance(error, (Unstable, torch.OutOfMemoryError)):
            raise
        raise RuntimeError(
            f"process {run.accelerator.process_index} stopped in step {run.step + 1}, probably because another one "
            f"died ({first_line(error)}); {_newest(run)}."
        ) from error


def _newest(run: Run) -> str:
    if run.saved_step < 0:
        return "there is no checkpoint yet, and the same command begins again"
    return f"the checkpoint of step {run.saved_step} is whole, and the same command continues there"


def _accelerator(config: RunConfig) -> Accelerator:
    """For one run; what a later call in the same process wants of the machine may be another thing."""
    device = pick_device(config.device)
    precision = {"fp32": "no"}.get(name := pick_precision(config.precision, device), name)
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        if (state.mixed_precision, state.device.type) != (precision, device.type):
            AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
    trackers = [name.strip() for name in config.trackers.split(",") if name.strip()]
    available = [tracker.value for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:
            raise ValueError(f"the tracker {name!r} is not installed here (pip install {name}); there are: {available}")
    accelerator = Accelerator(
        mixed_precision=precision, cpu=device.type == "cpu", log_with=trackers or None, project_dir=config.folder
    )
    kind = accelerator.distributed_type
    if kind not in KINDS or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"training under {kind.value} is not supported; launch with --multi_gpu, or --use_fsdp --fsdp_version 2"
        )
    return accelerator
