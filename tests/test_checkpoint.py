import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from dalm_utils.checkpoint import RunFolder, is_whole, write_whole
from dalm_utils.history import History


def write(folder, text="x"):
    return write_whole(folder, lambda path: (path / "weights").write_text(text))


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    write(tmp_path / "step-000001")

    def fails(path):
        (path / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "step-000002", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert is_whole(write(tmp_path / "step-000002"))


def opened(path, **settings):
    folder = RunFolder(path)
    return folder, folder.open(settings)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (9, 99, 1_000_000, 999_999):
        write(run / f"step-{step:06d}")
    (run / "step-1000000" / "weights").write_text("y")
    (run / "step-999999" / "manifest.json").unlink()
    folder, newest = opened(run)
    assert newest.name == "step-000099"
    told = capsys.readouterr().err
    assert "step-1000000 is damaged" in told and "step-999999 is damaged" in told
    assert [path.name for path in folder.checkpoints()] == ["step-000009", "step-000099"]
    folder.close()


def test_what_a_killed_process_left_is_put_right(tmp_path):
    run = tmp_path / "run"
    write(run / "best").rename(run / "best.old")  # it was being replaced
    (run / "best.unfinished").mkdir()
    (run / "history.jsonl.unfinished").write_text("half")
    folder, newest = opened(run)
    assert newest is None and sorted(p.name for p in run.iterdir()) == ["best", "config.json"]
    folder.close()


def test_where_the_text_is_may_change_but_not_its_tokens(tmp_path):
    write(tmp_path / "run" / "step-000001")
    for text in ("there", "here"):
        folder, _ = opened(tmp_path / "run", text=text, corpus="1f")
        folder.close()
        assert json.loads((tmp_path / "run" / "config.json").read_text())["text"] == text
    with pytest.raises(ValueError, match="text: 'here' then, 'away' now; corpus: '1f' then, '2f' now"):
        opened(tmp_path / "run", text="away", corpus="2f")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"text": "here", "corpus": "1f"}


def test_a_folder_belongs_to_one_writer_and_one_config(tmp_path):
    first, _ = opened(tmp_path / "run", seed=0)
    with pytest.raises(RuntimeError, match="another process is writing to the run 'run'"):
        RunFolder(tmp_path / "run").open({"seed": 0})
    assert RunFolder(tmp_path / "run").is_claimed()
    first.close()
    first, _ = opened(tmp_path / "run", seed=1)  # nothing was learned yet with another one
    first.close()
    write(tmp_path / "run" / "step-000001")
    with pytest.raises(ValueError, match="seed: 1 then, 2 now"):
        RunFolder(tmp_path / "run").open({"seed": 2})
    with pytest.raises(ValueError, match=r"\(distill: 0\.0 then, 16\.0 now\)"):
        RunFolder(tmp_path / "run").open({"seed": 1, "distill": 16.0, "teacher": "abc"})  # it began without these
    with pytest.raises(ValueError, match="resume must be auto or never"):
        RunFolder(tmp_path / "run").open({"seed": 1}, "always")
    second, _ = opened(tmp_path / "run", seed=1)  # a refusal keeps nothing claimed
    second.close()
    assert not second.is_claimed()
    RunFolder(tmp_path / "run").open({"seed": 2}, "never")
    assert (tmp_path / "run.old1" / "config.json").exists()


def test_replacing_keeps_one_and_pruning_spares_best(tmp_path):
    write(tmp_path / "best", "old")
    write(tmp_path / "best", "new")
    assert (tmp_path / "best" / "weights").read_text() == "new"
    for step in (1, 2, 3):
        write(tmp_path / f"step-00000{step}")
    RunFolder(tmp_path).prune(keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-000002", "step-000003"]


def test_history_reads_back_what_was_written_and_drops_a_torn_line(tmp_path):
    history = History(tmp_path / "history.jsonl")
    for step in (10, 20, 30):
        history.append({"step": step, "loss": 1 / step, **({"nelbo": 5.0} if step == 20 else {})})
    with history.path.open("a") as file:
        file.write('{"step": 40, "lo')
    again = History.load(history.path)
    assert again.records == history.records
    assert again.series("nelbo") == ([20], [5.0]) and again.last("nelbo") == 5.0 and again.last("none") is None
    assert again.window("loss", 10, 30) == pytest.approx((1 / 10 + 1 / 20) / 2)
    with pytest.raises(ValueError, match="no record of 'loss'"):
        again.window("loss", 50, 60)


def test_a_history_that_the_disk_refuses_waits_in_memory(tmp_path, capsys):
    history = History(tmp_path / "gone" / "history.jsonl")
    for step in (1, 2):
        history.append({"step": step})
    assert capsys.readouterr().err.count("could not be written (No such file or directory)") == 1
    (tmp_path / "gone").mkdir()
    history.append({"step": 3})
    assert [record["step"] for record in History.load(history.path).records] == [1, 2, 3]


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "PytorchStreamWriter"),
        (SafetensorError("Error while serializing: I/O error"), "Error while serializing"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_disk_that_refuses_is_told_and_the_last_good_checkpoint_stays(tmp_path, capsys, error, reason):
    write(tmp_path / "step-000001")

    def fill(folder):
        (folder / "weights").write_text("half")
        raise error

    assert RunFolder(tmp_path).write("step-000002", fill) is False
    told = capsys.readouterr().err
    assert f"step-000002 could not be written ({reason}" in told
    assert "training goes on. The newest whole checkpoint: step-000001" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"] and is_whole(tmp_path / "step-000001")


def test_a_mistake_in_the_program_is_no_full_disk(tmp_path):
    with pytest.raises(TypeError):
        RunFolder(tmp_path).write("step-000001", lambda folder: len(3))
    assert not list(tmp_path.iterdir())


def test_memory_that_is_full_is_no_disk_that_refuses(tmp_path):
    def fill(folder):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        RunFolder(tmp_path).write("step-000002", fill)
