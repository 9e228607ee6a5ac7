"""One run on several processes: gloo on the CPU, DDP, and accelerate's FSDP."""

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dalm_utils import load_diffusion, train
from dalm_utils.checkpoint import RunFolder, is_whole
from dalm_utils.config import PROJECT
from dalm_utils.history import History
from dalm_utils.objective import Batch
from dalm_utils.processes import _portable, on_main
from tests.helpers import PATIENCE, opened, tiny_base, tiny_config, tiny_diffusion
from tests.processes import Gate, Meeting, exit_codes, last_step, start_many

pytestmark = pytest.mark.slow

STEPS = dict(steps=24, log_every=2, eval_every=6, save_every=4, sample_every=12)
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as a launcher has it
}  # fmt: skip
WAYS = {"DDP": {}, "FSDP": FSDP}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process, with a batch of 4, taught by its base."""
    folder = tmp_path_factory.mktemp("alone")
    config = tiny_config(folder, batch=4, base=tiny_base(folder), distill=4.0, **STEPS)
    train(*tiny_diffusion(), config)
    return config.folder


def assert_same_curve(folder, alone):
    ours, theirs = (History.load(path / "history.jsonl") for path in (folder, alone))
    assert [record["step"] for record in ours.records] == [record["step"] for record in theirs.records]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("nelbo", 1e-5), ("lr", 1e-9)):
        assert ours.series(key)[1] == pytest.approx(theirs.series(key)[1], rel=tolerance)
    assert ours.series("sample") == theirs.series("sample")
    tokens = torch.arange(40).view(4, 10)
    with torch.no_grad():  # not the weights: those that change nothing (biases of keys) follow rounding errors
        logits, others = (load_diffusion(path / "step-000024")[0](tokens).logits for path in (folder, alone))
    torch.testing.assert_close(logits, others, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_with_the_same_global_batch_follow_the_curve_of_one(tmp_path, alone, way):
    changes = dict(batch=2, base=tiny_base(tmp_path), distill=4.0, **STEPS)
    config = tiny_config(tmp_path, **changes)
    processes = start_many(2, tmp_path, changes, WAYS[way])
    assert exit_codes(*processes) == [0, 0], (tmp_path / "messages-0").read_text()
    assert_same_curve(config.folder, alone)
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(path.name for path in alone.iterdir())
    load_diffusion(config.folder / "best")
    assert "step/s" not in (tmp_path / "messages-1").read_text()  # one progress bar


def test_sharded_weights_in_bf16_keep_sums_and_times_in_fp32(tmp_path):
    """Losses and gradients differ from those of one process by the rounding of a matrix product, not of a sum."""
    changes = dict(precision="bf16", base=tiny_base(tmp_path), distill=4.0, **STEPS)
    config = tiny_config(tmp_path / "one", batch=4, **changes)
    alone = train(*tiny_diffusion(), config)
    processes = start_many(2, tmp_path, dict(batch=2, **changes), FSDP)
    assert exit_codes(*processes) == [0, 0], (tmp_path / "messages-0").read_text()
    ours = History.load(tiny_config(tmp_path).folder / "history.jsonl")
    for key, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2), ("nelbo", 1e-3)):
        assert ours.series(key)[1] == pytest.approx(alone.series(key)[1], rel=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_an_unstable_run_goes_back_on_all_processes_and_tells_why_it_ends(tmp_path, way):
    shaky = dict(steps=24, log_every=1, eval_every=24, save_every=12, spike=1.4, max_skips=1)  # step 19 is a spike
    alone, together = tiny_config(tmp_path / "alone", batch=4, **shaky), tiny_config(tmp_path, batch=2, **shaky)
    with pytest.raises(RuntimeError, match="unstable: at step 19, after 3 rollbacks") as told:
        train(*tiny_diffusion(), alone)
    processes = start_many(2, tmp_path, dict(batch=2, **shaky), WAYS[way])
    assert exit_codes(*processes) == [1, 1]
    assert all(str(told.value) in (tmp_path / f"messages-{rank}").read_text() for rank in (0, 1))
    assert [path.name for path in together.folder.glob("step-*")] == ["step-000012"]  # whole, after three returns
    expected, ours = (History.load(config.folder / "history.jsonl") for config in (alone, together))
    assert ours.series("event") == expected.series("event")
    assert ours.series("loss")[1] == pytest.approx(expected.series("loss")[1], rel=1e-5)  # steps 13 to 18: taken again


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, way):
    changes = dict(batch=2, base=tiny_base(tmp_path), distill=4.0, **STEPS)
    config, gate = tiny_config(tmp_path, **changes), Gate(step=6)
    processes = start_many(2, tmp_path, changes, WAYS[way], on_log=gate.hold)
    gate.wait(*processes)
    for process in processes:
        process.terminate()  # as a launcher does when it is stopped: they agree on a step, and save it
    gate.open()
    assert exit_codes(*processes) == [0, 0], (tmp_path / "messages-0").read_text()
    assert last_step(config.folder) == 6 and is_whole(config.folder / "step-000006")
    train(*tiny_diffusion(), config.replace(batch=4))  # one process, the same global batch
    assert_same_curve(config.folder, alone)


class Odd(Exception):
    """Can be pickled, but not read back."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Local(Exception):
    def __init__(self):
        super().__init__("with something that cannot be pickled")
        self.held = lambda: None


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (ValueError("plain"), ValueError, "^plain$"),
        (Odd("this", "that"), RuntimeError, "^Odd: this and that$"),
        (Local(), RuntimeError, "^Local: with something"),
    ],
)
@pytest.mark.parametrize("is_main", [True, False])
def test_an_error_of_the_main_process_reaches_the_others(monkeypatch, error, kind, words, is_main):
    def fail():
        raise error

    def broadcast(outcome):  # the main process sends, the others receive
        sent = outcome if is_main else [None, _portable(error)]
        outcome[:] = pickle.loads(pickle.dumps(sent))

    monkeypatch.setattr("dalm_utils.processes.broadcast_object_list", broadcast)
    accelerator = SimpleNamespace(is_main_process=is_main, num_processes=2)
    with pytest.raises(kind, match=words):
        on_main(accelerator, fail)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_worker_is_killed_the_other_says_so_and_leaves_a_whole_checkpoint(tmp_path, alone, killed):
    changes = dict(batch=2, base=tiny_base(tmp_path), distill=4.0, **STEPS)
    config, gate = tiny_config(tmp_path, **changes), Gate(step=6)
    processes = start_many(2, tmp_path, changes, on_log=gate.hold)
    gate.wait(*processes)
    processes[killed].kill()
    gate.open()
    assert exit_codes(*processes) == [-9 if rank == killed else 1 for rank in (0, 1)]
    told = (tmp_path / f"messages-{1 - killed}").read_text()
    assert "probably because another one died" in told and "the same command resumes there" in told
    assert is_whole(RunFolder(config.folder).checkpoints()[-1])
    train(*tiny_diffusion(), config.replace(batch=4))
    assert_same_curve(config.folder, alone)


def test_the_command_trains_on_two_processes_under_a_launcher(tmp_path):
    """torchrun, which `accelerate launch` calls too: on CPUs without MPI it is the one that starts several."""
    small = vars(tiny_config(tmp_path, base=tiny_base(tmp_path), name="launched", batch=2))
    names = ("base", "runs", "text", "length", "eval_blocks", "device", "precision")
    environment = {f"DALM_{name.upper()}": str(small[name]) for name in names} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dalm_utils", "train", "gpt2", "name=launched", "batch=2", "steps=4", "log_every=2"]
    result = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    settings = json.loads((tmp_path / "runs" / "launched" / "config.json").read_text())
    assert settings["global_batch"] == 4 and settings["total_steps"] == 4
    assert result.stdout.count("checkpoints  ") == 1  # one process reports


SCRIPT = """
import atexit, os, signal, sys, weakref
from pathlib import Path

@atexit.register  # the first to be registered, the last to run
def tell():
    print("at exit the group is", "gone" if group() is None else "there", file=sys.stderr)

from torch import distributed
from dalm_utils import train
from tests.helpers import tiny_config, tiny_diffusion
folder, ending, group = Path(sys.argv[1]), sys.argv[2], lambda: None

def watch(history, config):
    global group
    group = weakref.ref(distributed.group.WORLD)
    if config.name == "second" and ending == "error" and history.last("step") == 4:
        raise OSError("nothing can be drawn here")
    if config.name == "second" and ending == "Ctrl-C" and history.last("step") == 4:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

def train_one(name):
    train(*tiny_diffusion(), tiny_config(folder, name=name, batch=2, steps=6), on_log=watch)
    distributed.barrier()

train_one("first")
group = weakref.ref(distributed.group.WORLD)
train_one("second")
"""


@pytest.mark.parametrize("ending, codes", [("success", [0, 0]), ("error", [1, 1]), ("Ctrl-C", [-2, 1])])
def test_a_script_may_train_again_and_its_processes_exit_in_order(tmp_path, ending, codes):
    """The group serves the whole script; at the end nobody aborts, and nobody waits for one that has failed."""
    tiny_config(tmp_path)  # writes the text
    meeting = Meeting(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), ending],
            cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1", **meeting.environment(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, told
    assert all("at exit the group is gone" in words for words in told), told
    assert ("probably because another one died" in told[1]) == (ending != "success")


@pytest.mark.parametrize("processes, accumulate", [(1, 2), (2, 1), (3, 2)])
def test_every_row_of_the_batch_is_the_part_of_one_process(tmp_path, processes, accumulate):
    rows, seen = 2 * processes * accumulate, []
    with opened(*tiny_diffusion(), tiny_config(tmp_path, batch=2, accumulate=accumulate)) as run:
        tokens = torch.arange(rows)[:, None].expand(rows, 3)
        batch = Batch.of(tokens, tokens, tokens % 2 == 0, torch.ones(rows), torch.tensor(1))
        for index in range(processes):
            run.train_step.accelerator = SimpleNamespace(num_processes=processes, process_index=index)
            for part in run.train_step._local_parts(batch):
                seen.append(part.tokens[:, 0])
                assert part.count == 3 * (part.tokens[:, 0] % 2 == 0).sum()
    assert sorted(torch.cat(seen).tolist()) == list(range(rows))
