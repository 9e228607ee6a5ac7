"""Runs that are killed, starved of disk or damaged: what they end with is what an undisturbed run ends with.

`python -m tests.test_reliability --kills 100` injects more faults than the suite and prints the figures.
"""

import argparse
import errno
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from jupyter_client import KernelManager
from safetensors.torch import load_file

from dalm_utils import checkpoint, train
from dalm_utils.checkpoint import RunFolder, is_whole, write_whole
from dalm_utils.config import PROJECT
from dalm_utils.history import History
from dalm_utils.terminal import warn
from tests.helpers import PATIENCE, comparable, tiny_base, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer
from tests.processes import Gate, Strike, exit_codes, last_step, start

LONG = dict(steps=60, save_every=3, log_every=2, eval_every=10, anneal_steps=30, dropout=0.1)
CALLS = 100_000  # and returns of Python and C functions: three steps of it with the checkpoint, which is half of them


def outcome(folder: Path) -> tuple:
    """The history, but for its clock, and the weights that a finished run left."""
    records = comparable(History.load(folder / "history.jsonl"))
    last = RunFolder(folder).checkpoints()[-1]
    assert is_whole(last)
    return records, load_file(last / "model.safetensors"), load_file(folder / "best" / "model.safetensors")


def assert_same(ours: tuple, expected: tuple) -> None:
    assert ours[0] == expected[0]
    for mine, theirs in zip(ours[1:], expected[1:], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def interrupt_again_and_again(
    folder: Path, times: int, settings: dict, seed: int, kind=signal.SIGKILL, environment: dict | None = None
) -> dict:
    """Signal a run `times` times, each time some steps further and at any moment of a step; then let it end.

    Every fourth SIGKILL hits while the run is being opened and its checkpoint read.
    """
    draw = random.Random(seed)
    run = tiny_config(folder, **settings).folder
    targets = sorted(draw.randint(1, settings["steps"] - 20) for _ in range(times))
    figures = {"times": 0, "while writing a checkpoint": 0, "steps repeated": 0}
    for number, target in enumerate(targets):
        at_start = kind == signal.SIGKILL and number % 4 == 3
        strike = Strike(0 if at_start else target, draw.randint(1, CALLS), kind)
        codes = exit_codes(start(folder, settings, environment, on_log=strike))
        assert codes == [-signal.SIGKILL if kind == signal.SIGKILL else 0], (folder / "messages-0").read_text()[-4000:]
        whole = [checkpoint.step_of(path) for path in RunFolder(run).checkpoints() if is_whole(path)]
        figures["times"] += 1
        figures["while writing a checkpoint"] += any(path.is_dir() for path in run.glob("*.unfinished"))
        figures["steps repeated"] += max(0, last_step(run) - max(whole, default=0))
    assert exit_codes(start(folder, settings, environment)) == [0]
    return figures


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def undisturbed(request, tmp_path_factory):
    """The settings of a run, and what it ends with when it is left alone."""
    folder, settings = tmp_path_factory.mktemp("undisturbed"), {**LONG, "precision": request.param}
    assert exit_codes(start(folder, settings)) == [0]
    return settings, outcome(tiny_config(folder).folder)


def write_the_users_files(folder: Path) -> dict[Path, str]:
    """Files of the user's in a run's folder and beside it, and what is in each."""
    run = tiny_config(folder).folder
    names = ("notes.md", "plots/loss.png", "best.md", "step-000006.txt", "best.old/notes.md", ".hidden")
    written = {place / name: f"the user's {name}" for place in (run, run.parent) for name in names}
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return written


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    settings, expected = undisturbed
    times = 10 if settings["precision"] == "fp32" else 3
    users = write_the_users_files(tmp_path)
    figures = interrupt_again_and_again(tmp_path, times, settings, seed=times)
    assert figures["times"] == times and figures["while writing a checkpoint"] > 0
    assert_same(outcome(tiny_config(tmp_path).folder), expected)
    assert {path: path.read_text() for path in users} == users


@pytest.mark.slow
def test_a_run_that_writes_in_the_background_and_is_killed_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    settings, expected = undisturbed
    figures = interrupt_again_and_again(tmp_path, 4, settings, seed=1, environment={"WRITE_IN_BACKGROUND": "1"})
    assert figures["times"] == 4
    assert_same(outcome(tiny_config(tmp_path).folder), expected)


@pytest.mark.slow
def test_a_run_terminated_at_random_moments_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    settings, expected = undisturbed
    figures = interrupt_again_and_again(tmp_path, 3, settings, seed=0, kind=signal.SIGTERM)
    assert figures == {"times": 3, "while writing a checkpoint": 0, "steps repeated": 0}
    assert_same(outcome(tiny_config(tmp_path).folder), expected)


class PowerCut(BaseException):
    """Not an Exception: no handler of the program runs, as if the machine had stopped."""


def test_power_may_fail_at_any_operation_of_writing_a_checkpoint(tmp_path, monkeypatch):
    """Cut the power before the 1st, 2nd, ... operation on the disk: the old or the new is there, whole."""

    def write(text):
        write_whole(tmp_path / "best", lambda folder: (folder / "weights").write_text(text))

    left = 0

    def counted(operation):
        def run(*inputs, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise PowerCut
            return operation(*inputs, **options)

        return run

    for owner, name in [(Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"), (os, "fsync"),
                        (shutil, "rmtree")]:  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    left = 10**6
    write("old")
    for survived in range(100):
        left = survived
        try:
            write("new")
            break
        except PowerCut:
            left = 10**6
            RunFolder(tmp_path)._recover()
            assert is_whole(tmp_path / "best") and sorted(p.name for p in tmp_path.iterdir()) == ["best"]
            assert (tmp_path / "best" / "weights").read_text() in ("old", "new")
            write("old")
    assert survived >= 8 and (tmp_path / "best" / "weights").read_text() == "new"


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """A move may reach the disk before the data does, unless file by file and folder these were synced first."""
    synced, moved, fsync, rename = set(), [], os.fsync, Path.rename

    def watched_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(source, target):
        if source.name == ".best.unfinished":
            moved.append({path.stat().st_ino for path in (source, *source.iterdir())} <= synced)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    for _ in ("new", "once more"):
        write_whole(tmp_path / "best", lambda folder: (folder / "weights").write_text("of a model"))
        assert tmp_path.stat().st_ino in synced  # and that it moved is on the disk too
        synced.clear()
    assert moved == [True, True]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an undisturbed short run ends with."""
    config = tiny_config(tmp_path_factory.mktemp("expected"), dropout=0.1)
    train(*tiny_diffusion(), config)
    return outcome(config.folder)


def stopped_at(step, config):
    """Train until a step, as if the run had died there: after an Exception a checkpoint would be written."""

    class Stop(BaseException):
        pass

    def stop(history, config):
        if history.records[-1]["step"] >= step + 2:
            raise Stop

    with pytest.raises(Stop):
        train(*tiny_diffusion(), config, on_log=stop)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_checkpoint_with_one_changed_byte_is_passed_over(tmp_path, expected, capsys, seed):
    config = tiny_config(tmp_path, dropout=0.1)
    stopped_at(8, config)
    draw = random.Random(seed)
    victim = draw.choice(sorted((config.folder / "step-000008").iterdir()))
    data = bytearray(victim.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    victim.write_bytes(data)
    train(*tiny_diffusion(), config)
    assert "checkpoint step-000008 is damaged; moved to step-000008.damaged" in capsys.readouterr().err
    assert_same(outcome(config.folder), expected)


def test_with_no_whole_checkpoint_left_the_run_begins_again_and_ends_the_same(tmp_path, expected, capsys):
    config = tiny_config(tmp_path, dropout=0.1)
    stopped_at(8, config)
    for folder in RunFolder(config.folder).checkpoints():
        (folder / "model.safetensors").unlink()
    train(*tiny_diffusion(), config)
    assert capsys.readouterr().err.count("is damaged") == 2
    assert_same(outcome(config.folder), expected)


def test_pruning_never_counts_on_a_damaged_checkpoint(tmp_path):
    config = tiny_config(tmp_path, keep=1)
    stopped_at(8, config)
    (config.folder / "step-000012").mkdir()  # a later one, of which nothing was written
    stopped_at(8, config.replace(keep=1))
    assert [path.name for path in RunFolder(config.folder).checkpoints()] == ["step-000008"]


def test_a_full_disk_is_survived(tmp_path, expected, capsys):
    """The kernel refuses files beyond a size from step 3 to step 9: checkpoints fail, and the run goes on."""
    config = tiny_config(tmp_path, dropout=0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(history, config):
        step = history.records[-1]["step"]
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        if step == 8:
            assert not RunFolder(config.folder).checkpoints() and not list(config.folder.glob("*.unfinished"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        train(*tiny_diffusion(), config, on_log=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert re.search(r"step-000004 could not be written \(.*\); training goes on", told)
    assert "history.jsonl could not be written (File too large)" in told
    assert "best could not be written" in told
    assert_same(outcome(config.folder), expected)


class FullDisk:
    """An `on_log` that prints, on a disk that takes nothing from step 2 to step 8."""

    def __call__(self, history: History, config) -> None:
        step = history.records[-1]["step"]
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step in (2, 8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if step == 2 else hard, hard))
        print(f"step {step}", flush=True)


@pytest.mark.slow
def test_a_run_whose_messages_go_to_a_full_disk_ends_as_an_undisturbed_one(tmp_path, expected):
    settings = dict(dropout=0.1)
    codes = exit_codes(start(tmp_path, settings, on_log=FullDisk()))
    told = (tmp_path / "messages-0").read_text()
    assert codes == [0], told
    assert "step 12\n" in told
    assert_same(outcome(tiny_config(tmp_path, **settings).folder), expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_progress_bar_that_cannot_be_drawn_costs_nothing(tmp_path, expected, monkeypatch, number):
    class Stream(io.StringIO):
        refuses = False

        def write(self, text):
            if self.refuses:
                raise OSError(number, os.strerror(number))

    config = tiny_config(tmp_path, dropout=0.1)
    clock = itertools.count(0, 2)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))  # seconds: it is drawn at each step
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, Stream())

    def report(*_):
        Stream.refuses = True
        print("a record")

    train(*tiny_diffusion(), config, on_log=report)
    assert_same(outcome(config.folder), expected)
    other = threading.Thread(target=warn, args=("the lock of the bar is free",), daemon=True)
    other.start()
    other.join(PATIENCE)
    assert not other.is_alive()


def test_a_last_checkpoint_that_could_not_be_written_is_an_error(tmp_path, capsys):
    config = tiny_config(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(history, config):
        if history.records[-1]["step"] == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    model, tokenizer = tiny_diffusion()
    try:
        with pytest.raises(RuntimeError, match=r"at step 12, could not be written.*the checkpoint of step 8 is"):
            train(model, tokenizer, config, on_log=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again, _ = tiny_diffusion()
    train(again, tokenizer, config)  # there is room: steps 9 to 12 are taken again
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_run_that_cannot_be_begun_says_why_at_once(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="runs"):
        train(*tiny_diffusion(), tiny_config(tmp_path))


@pytest.mark.slow
def test_only_one_process_writes_to_a_run(tmp_path):
    config, gate = tiny_config(tmp_path, **LONG), Gate(step=4)
    first = start(tmp_path, LONG, on_log=gate.hold)
    gate.wait(first)
    with pytest.raises(RuntimeError, match="another process is writing to the run 'tiny'; wait for it or stop it"):
        train(*tiny_diffusion(), config, on_log=lambda *_: pytest.fail("two processes write to one run"))
    first.terminate()  # SIGTERM: it ends its step and writes a checkpoint
    gate.open()
    assert exit_codes(first) == [0] and "run it again to resume" in (tmp_path / "messages-0").read_text()
    assert checkpoint.step_of(RunFolder(config.folder).checkpoints()[-1]) == last_step(config.folder) == 4
    stopped_at(4, config)  # the folder is free again


TRAINING_CELL = """
import time
from pathlib import Path
from dalm_utils import train
from tests.helpers import tiny_config, tiny_diffusion
folder = Path({folder!r})
def hold(history, config):
    if history.last("step") == {step}:
        print("held", flush=True)
        while not (folder / "pressed at {step}").exists():
            time.sleep(0.01)
history = train(*tiny_diffusion(), tiny_config(folder, steps=100, log_every=1), on_log=hold)
print("the curve has", len(history.records), "records")
"""


@pytest.mark.slow
def test_the_stop_button_ends_a_cell_cleanly_and_it_goes_on_when_run_again(tmp_path):
    """A real kernel, interrupted twice in the same cell."""
    config = tiny_config(tmp_path, steps=100, log_every=1)
    sockets = tempfile.TemporaryDirectory()  # files, not ports, which another program may take first; short paths
    manager = KernelManager(transport="ipc", ip=f"{sockets.name}/kernel")
    manager.start_kernel(cwd=str(PROJECT))
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        for step in (5, 9):
            said = ""  # on two streams, in any order

            def heard(*words):
                nonlocal said
                while not all(part in said for part in words):
                    said += client.get_iopub_msg(timeout=PATIENCE)["content"].get("text", "")

            client.execute(TRAINING_CELL.format(folder=str(tmp_path), step=step))
            heard("held")
            manager.interrupt_kernel()
            (tmp_path / f"pressed at {step}").touch()
            assert client.get_shell_msg(timeout=PATIENCE)["content"]["status"] == "ok"
            heard(f"stopped at step {step} of 100; run it again to resume", f"curve has {step + 1} records")
            assert last_step(config.folder) == step and is_whole(config.folder / f"step-{step:06d}")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        sockets.cleanup()


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_loading_a_checkpoint_never_executes_anything(tmp_path):
    config = tiny_config(tmp_path)
    stopped_at(8, config)
    newest = config.folder / "step-000008"
    (newest / "optimizer.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["optimizer.pt"] = checkpoint._digest(newest / "optimizer.pt")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        train(*tiny_diffusion(), config)
    assert not (tmp_path / "executed").exists()


def test_another_model_or_text_is_refused_with_the_difference(tmp_path):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config)
    with pytest.raises(ValueError, match=r"model: 'GPT2LMHeadModel with \d+ parameters' then, 'OPTForCausalLM with"):
        train(*tiny_diffusion("opt"), config)
    text = (tmp_path / "texts" / "000.txt").read_text()
    (tmp_path / "texts" / "000.txt").write_text("another text " * 9)
    with pytest.raises(ValueError, match=r"corpus: '\w+' then, '\w+' now.*packages are upgraded"):
        train(*tiny_diffusion(), config)
    (tmp_path / "texts" / "000.txt").write_text(text)
    with pytest.raises(ValueError, match=r"global_batch: 4 then, 8 now.*`batch` x `accumulate` x processes stays"):
        train(*tiny_diffusion(), config.replace(accumulate=2))
    with pytest.raises(ValueError, match=r"precision: 'fp32' then, 'bf16' now.*pass that of then"):
        train(*tiny_diffusion(), config.replace(precision="bf16"))


def test_another_teacher_is_refused(tmp_path):
    config = tiny_config(tmp_path, base=tiny_base(tmp_path), distill=4.0)
    train(*tiny_diffusion(), config)
    tiny_model(vocab=len(tiny_tokenizer()), seed=1).save_pretrained(config.base)
    with pytest.raises(ValueError, match=r"teacher: '\w+' then, '\w+' now"):
        train(*tiny_diffusion(), config)


def test_nan_weights_are_refused(tmp_path):
    model, tokenizer = tiny_diffusion()
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight of the model are not finite"):
        train(model, tokenizer, tiny_config(tmp_path))


def test_a_run_of_an_earlier_version_resumes(tmp_path, expected):
    """Its settings lack what is compared since, and have what no longer exists; so has the state of its checkpoints."""
    config = tiny_config(tmp_path, dropout=0.1)
    stopped_at(8, config)
    settings = json.loads((config.folder / "config.json").read_text())
    for name in ("mask_id", "tokenizer", "distill", "distill_steps", "teacher", "max_skips"):
        settings.pop(name, None)
    (config.folder / "config.json").write_text(json.dumps(settings | {"attention": "sdpa", "weight_decay": 0.01}))
    newest = config.folder / "step-000008"
    state = json.loads((newest / "state.json").read_text())
    for name in set(state) - {
        "step",
        "seconds",
        "best",
        "window_steps",
        "rollbacks",
        "stale",
        "window_loss",
        "watch",
        "scaler",
    }:
        del state[name]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = checkpoint._digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    train(*tiny_diffusion(), config)
    assert_same(outcome(config.folder), expected)
    with pytest.raises(ValueError, match=r"\(learning_rate: 0\.003 then, 0\.004 now\)"):
        train(*tiny_diffusion(), config.replace(learning_rate=0.004))


def test_a_run_rolls_back_on_a_full_disk(tmp_path, capsys):
    """The head breaks and the disk fills after step 6; there is room again once the run has rolled back to step 4."""
    config = tiny_config(tmp_path, steps=16)
    model, tokenizer = tiny_diffusion()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disturb(history, config):
        if history.records[-1]["step"] == 6 and not history.last("event"):
            model.get_output_embeddings().weight.data.mul_(1e3)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        elif history.last("event"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        history = train(model, tokenizer, config, on_log=disturb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000004 could not be written (File too large)" in capsys.readouterr().err
    assert "rolled back to step 4" in history.last("event")
    assert History.load(config.folder / "history.jsonl").records == history.records
    assert [record["step"] for record in history.records] == [0, 2, 4, 4, 6, 8, 10, 12, 14, 16]


def test_a_run_that_is_killed_after_it_rolled_back_on_a_full_disk_ends(tmp_path, capsys):
    """Of the rollback nothing could be written: the run resumes from the checkpoint before the fault."""
    config = tiny_config(tmp_path, steps=16)
    model, tokenizer = tiny_diffusion()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disturb(history, config):
        if history.last("event"):
            raise PowerCut
        if history.records[-1]["step"] == 6:
            model.get_output_embeddings().weight.data.mul_(1e3)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    try:
        with pytest.raises(PowerCut):
            train(model, tokenizer, config, on_log=disturb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000004 could not be written (File too large)" in capsys.readouterr().err
    undisturbed = train(*tiny_diffusion(), config.replace(name="undisturbed"))
    assert comparable(train(*tiny_diffusion(), config)) == comparable(undisturbed)
    assert_same(outcome(config.folder), outcome(tiny_config(tmp_path, name="undisturbed").folder))


def main() -> None:
    """Many more kills than the suite has time for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    kills = parser.parse_args().kills
    settings = {**LONG, "steps": 6 * kills, "anneal_steps": 3 * kills}
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        for path in (alone, killed):
            path.mkdir()
        start(alone, settings).join()
        figures = interrupt_again_and_again(killed, kills, settings, seed=0)
        assert_same(*(outcome(tiny_config(path).folder) for path in (killed, alone)))
    print(f"{settings['steps']} steps: {figures}; history and weights equal the undisturbed run's")


if __name__ == "__main__":
    main()
