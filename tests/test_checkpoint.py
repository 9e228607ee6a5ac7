import contextlib
import errno
import fcntl
import itertools
import json
import mmap
import os
import resource
import shutil
import stat
import subprocess
import tempfile
import threading
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dalm_utils import checkpoint, load_corpus, run, train
from dalm_utils.checkpoint import RunFolder, is_whole, sync, write_whole
from dalm_utils.history import History
from tests.helpers import PATIENCE, comparable, stop_after, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer
from tests.processes import CONTEXT, exit_codes, start, train_tiny

SETTINGS = {"model": "tiny", "corpus": "abc", "total_steps": 12}


def write(folder, text="x"):
    return write_whole(folder, lambda path: (path / "weights").write_text(text))


def content(folder) -> dict:
    """Every file in a folder, and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_users(files: dict) -> dict:
    """Those files of `content` that say whose they are."""
    return {path: text for path, text in files.items() if b"the user's" in text}


def refusing_to_sync(number, folders):
    """An os.fsync that fails for folders, or else for files, as some network disks do."""
    fsync = os.fsync

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return sync


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
    return folder, folder.open(SETTINGS | settings)


def begun(path, *steps, **settings):
    """A run's folder with a checkpoint at each of some steps."""
    folder, _ = opened(path, **settings)
    for step in steps:
        write(path / f"step-{step:06d}")
    folder.close()
    return path


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    run = begun(tmp_path / "run", 9, 99, 999_998, 999_999, 1_000_000)
    (run / "step-1000000" / "weights").write_text("y")
    (run / "step-999999" / "manifest.json").write_text("[1]")
    (run / "step-999998" / "weights").unlink()
    write(run / "step-999998.damaged1", "of an earlier time")
    folder, newest = opened(run)
    assert newest.name == "step-000099"
    told = capsys.readouterr().err
    for aside in ("step-1000000.damaged1", "step-999999.damaged1", "step-999998.damaged2"):
        assert f"is damaged; moved to {aside} and passed over" in told
    assert [path.name for path in folder.checkpoints()] == ["step-000009", "step-000099"]
    assert (run / "step-999998.damaged1" / "weights").read_text() == "of an earlier time"
    folder.close()


def test_what_a_killed_process_left_is_put_right(tmp_path):
    run = begun(tmp_path / "run")
    write(run / "best").rename(run / ".best.old")  # it was being replaced
    write(run / ".step-000007.unfinished")
    (run / ".best.unfinished").mkdir()
    (run / ".history.jsonl.unfinished").write_text("half")
    whole = write(run / "step-000004")
    folder, newest = opened(run)
    assert newest == whole and sorted(p.name for p in run.iterdir()) == ["best", "config.json", "step-000004"]
    write(run / ".best.old", "older")  # it had been replaced
    (run / ".best.old" / "manifest.json").write_text((run / "best" / "manifest.json").read_text())
    folder._recover()
    assert sorted(p.name for p in run.iterdir()) == ["best", "config.json", "step-000004"]
    folder.close()


def test_where_the_text_is_may_change_but_not_its_tokens(tmp_path):
    for text in ("elsewhere", "there", "here"):
        folder, _ = opened(tmp_path / "run", text=text, corpus="1f")
        folder.close()
        write(tmp_path / "run" / "step-000001")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["text"] == text
    with pytest.raises(ValueError, match="corpus: '1f' then, '2f' now; text: 'here' then, 'away' now"):
        opened(tmp_path / "run", text="away", corpus="2f")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["text"], settings["corpus"]) == ("here", "1f")


def test_a_folder_belongs_to_one_writer_and_one_config(tmp_path):
    first, _ = opened(tmp_path / "run", seed=0)
    with pytest.raises(RuntimeError, match="another process is writing to the run 'run'"):
        opened(tmp_path / "run", seed=0)
    assert RunFolder(tmp_path / "run").is_claimed()
    first.close()
    first, _ = opened(tmp_path / "run", seed=1)  # nothing was learned yet with another one
    first.close()
    write(tmp_path / "run" / "step-000001")
    with pytest.raises(ValueError, match="seed: 1 then, 2 now"):
        opened(tmp_path / "run", seed=2)
    with pytest.raises(ValueError, match=r"\(distill: 0\.0 then, 16\.0 now\)"):
        opened(tmp_path / "run", seed=1, distill=16.0, teacher="abc")  # it began without these
    with pytest.raises(ValueError, match="resume must be auto or never"):
        RunFolder(tmp_path / "run").open(SETTINGS, "always")
    second, _ = opened(tmp_path / "run", seed=1)  # a refusal keeps nothing claimed
    second.close()
    assert not second.is_claimed()
    RunFolder(tmp_path / "run").open(SETTINGS | {"seed": 2}, "never")
    assert (tmp_path / "run.old1" / "config.json").exists()


def test_a_run_behind_a_link_has_one_writer_whatever_path_leads_to_it(tmp_path):
    (tmp_path / "big" / "run").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    link = tmp_path / "runs" / "run"
    link.symlink_to(tmp_path / "big" / "run")
    first, _ = opened(link)
    assert RunFolder(link.resolve()).is_claimed()
    with pytest.raises(RuntimeError, match="another process is writing to the run 'run'"):
        opened(link.resolve())
    first.close()
    assert not RunFolder(link).is_claimed() and not RunFolder(link.resolve()).is_claimed()


def test_a_disk_without_locks_is_named_and_holds_no_running_run(tmp_path, monkeypatch):
    run = begun(tmp_path / "run", 4)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not RunFolder(run).is_claimed()
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be locked \(No locks available\); `runs`, or DALM_RUNS"):
        opened(run)
    with pytest.raises(OSError, match=r"cache cannot be locked \(No locks available\); DALM_CACHE names another"):
        load_corpus(tiny_config(tmp_path).text, tiny_tokenizer(), cache=tmp_path / "cache")


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write in a folder; root, who may always, becomes another user for as long."""
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_reading_a_run_needs_no_permission_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to other users
    begun(Path("run"), 4)
    write(Path("runs") / "copied" / "step-000004")  # nobody ever claimed this one
    with read_only(tmp_path):
        with pytest.raises(PermissionError):
            Path("written").touch()
        folder = RunFolder(Path("run"))
        assert not folder.is_claimed() and folder.settings() == SETTINGS
        assert [path.name for path in folder.checkpoints()] == ["step-000004"] and is_whole(folder.checkpoints()[0])
        assert not RunFolder(Path("runs/copied")).is_claimed()
    assert not list(Path("runs").glob(".*"))


def close_to_writers(monkeypatch, closed):
    """Nobody may create a file in a folder (root, who may always, does not notice its permissions)."""
    create = tempfile.TemporaryFile

    def refuses(dir):
        if dir == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return create(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)


@pytest.mark.parametrize("closed, remedy", [("runs", "`runs`, or DALM_RUNS"), ("runs/run", "another `name`")])
def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch, closed, remedy):
    begun(tmp_path / "runs" / "run", 4)
    close_to_writers(monkeypatch, tmp_path / closed)
    with pytest.raises(OSError, match=rf"{closed} cannot be written \(Permission denied\); .*{remedy}"):
        RunFolder(tmp_path / "runs" / "run").open(SETTINGS)
    assert not RunFolder(tmp_path / "runs" / "run").is_claimed()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    close_to_writers(monkeypatch, tmp_path / "cache")
    with pytest.raises(OSError, match=r"cache cannot be written \(Permission denied\).*DALM_CACHE names another"):
        load_corpus(tiny_config(tmp_path).text, tiny_tokenizer(), cache=tmp_path / "cache")


def test_looking_at_a_run_keeps_nobody_from_starting_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOCK_WAIT", 60)
    run = begun(tmp_path / "run")
    with (tmp_path / ".run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # somebody is looking
        assert not RunFolder(run).is_claimed()  # and sees no writer in another who looks
        looked = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        looked.start()
        folder, _ = opened(run)
        looked.join()
    assert RunFolder(run).is_claimed()
    folder.close()


def test_replacing_keeps_one_and_pruning_spares_best(tmp_path):
    write(tmp_path / "best", "old")
    write(tmp_path / "best", "new")
    assert (tmp_path / "best" / "weights").read_text() == "new"
    for step in (1, 2, 3):
        write(tmp_path / f"step-00000{step}")
    RunFolder(tmp_path).prune(keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-000002", "step-000003"]


def test_checkpoints_may_hold_folders(tmp_path):
    """As a tokenizer with several chat templates writes them."""

    def fill(folder):
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text("{{ messages }}")

    write_whole(tmp_path / "best", fill)
    write_whole(tmp_path / "best", fill)
    assert is_whole(tmp_path / "best") and [path.name for path in tmp_path.iterdir()] == ["best"]
    (tmp_path / "best" / "templates" / "tool.jinja").write_text("{{ other }}")
    assert not is_whole(tmp_path / "best")


# ------------------------------------------------------------------------------------- what is not ours
USERS = (  # names like those that runs write
    "best.old/notes.md", "best.unfinished/notes.md", "notes.unfinished", "history.jsonl.unfinished", "step-4.md",
    "step-000002/notes.md", "step-000004.damaged/notes.md", "step-last9/notes.md", "longer.old/best/notes.md",
)  # fmt: skip


def test_a_run_leaves_all_files_of_the_user_where_they_are(tmp_path, capsys):
    """In the run's folder and beside it."""
    config = tiny_config(tmp_path, keep=1)
    for folder in (config.folder, config.folder.parent):
        for name in USERS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"the user's {name}")
    before = the_users(content(config.folder.parent))
    assert len(before) == 2 * len(USERS)
    train(*tiny_diffusion(), config)
    capsys.readouterr()
    train(*tiny_diffusion(), config)
    assert "step-000002" not in capsys.readouterr().err  # named only where it would have been resumed from
    assert the_users(content(config.folder.parent)) == before
    train(*tiny_diffusion(), config.replace(learning_rate=1e-3), resume="never")
    after = the_users(content(config.folder.parent))
    assert sorted(after.values()) == sorted(before.values()) and is_whole(config.folder / "step-000012")


@pytest.mark.parametrize("lost", ["deleted", "damaged"])
def test_a_run_without_checkpoints_keeps_its_best_model(tmp_path, capsys, lost):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config)
    best, curve = content(config.folder / "best"), (config.folder / "history.jsonl").read_text()
    for folder in config.folder.glob("step-*"):
        if lost == "deleted":
            shutil.rmtree(folder)
        else:
            (folder / "optimizer.pt").write_bytes(b"")
    capsys.readouterr()
    train(*tiny_diffusion(seed=9), config)
    assert "starts over; what it had is now config.json.old1, best.old1, history.jsonl.old1" in capsys.readouterr().err
    assert content(config.folder / "best.old1") == best
    assert (config.folder / "history.jsonl.old1").read_text() == curve
    assert is_whole(config.folder / "step-000012")


def test_what_a_run_had_is_set_aside_once_however_often_it_starts_over(tmp_path, capsys):
    train(*tiny_diffusion(), (config := tiny_config(tmp_path)))
    for folder in config.folder.glob("step-*"):
        (folder / "optimizer.pt").write_bytes(b"")
    for _ in range(3):  # stopped by an error before its first checkpoint
        with pytest.raises(OverflowError):
            train(*tiny_diffusion(), config, on_log=lambda *_: (_ for _ in ()).throw(OverflowError))
        shutil.rmtree(next(iter(config.folder.glob("step-0000??")), tmp_path / "none"), ignore_errors=True)
    assert sorted(path.name for path in config.folder.glob("*.old*")) == [
        "best.old1", "config.json.old1", "history.jsonl.old1",
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 1e-3, "steps": 14}], ids=["same", "others"])
def test_a_finished_run_whose_weights_were_archived_keeps_its_curve_and_settings(tmp_path, capsys, changes):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config)
    for folder in (config.folder / "best", *config.folder.glob("step-*")):
        shutil.rmtree(folder)
    before = content(config.folder)
    capsys.readouterr()
    train(*tiny_diffusion(), config.replace(**changes))
    told = capsys.readouterr().err
    assert told.count("starts over; what it had is now config.json.old1, history.jsonl.old1") == 1
    assert {
        Path(path.name.removesuffix(".old1")): (config.folder / path).read_bytes()
        for path in content(config.folder)
        if path.name.endswith(".old1")
    } == before


def test_a_run_that_never_had_a_checkpoint_makes_its_best_model_again(tmp_path):
    config = tiny_config(tmp_path, save_every=100)
    train(*tiny_diffusion(), config, on_log=stop_after(8))
    shutil.rmtree(config.folder / "step-000008")  # as if it had been killed
    train(*tiny_diffusion(), config)
    assert sorted(path.name for path in config.folder.iterdir()) == [
        "best",
        "config.json",
        "history.jsonl",
        "step-000012",
    ]


def test_a_checkpoint_never_replaces_a_folder_of_the_user(tmp_path, capsys):
    config = tiny_config(tmp_path)
    notes = config.folder / "step-000008" / "notes.md"
    notes.parent.mkdir(parents=True)
    notes.write_text("the user's")
    train(*tiny_diffusion(), config)
    told = capsys.readouterr().err
    assert "step-000008 is damaged or not a checkpoint: it has no manifest.json; left alone" in told
    assert "step-000008 could not be written" in told and "move it elsewhere" in told
    assert [path.name for path in RunFolder(config.folder).checkpoints()] == ["step-000004", "step-000012"]
    assert content(notes.parent) == {notes.relative_to(notes.parent): b"the user's"}


def test_files_that_the_user_adds_to_a_checkpoint_outlive_it(tmp_path, capsys):
    write(tmp_path / "best")
    (tmp_path / "best" / "README.md").write_text("the user's model card")
    write(tmp_path / "best", "new")
    assert "the earlier best was kept as best.old1" in capsys.readouterr().err
    assert is_whole(tmp_path / "best") and not (tmp_path / "best" / "README.md").exists()
    assert (tmp_path / "best.old1" / "README.md").read_text() == "the user's model card"
    for step in (1, 2, 3):
        write(tmp_path / f"step-00000{step}")
    (tmp_path / "step-000001" / "README.md").write_text("the user's model card")
    RunFolder(tmp_path).prune(keep=1)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["step-000001", "step-000003"]
    write(tmp_path / "step-000001", "again").rename(tmp_path / ".step-000001.old")  # and a crash right then
    (tmp_path / ".step-000001.old" / "README.md").write_text("the user's other card")
    write(tmp_path / "step-000001")
    assert sorted(path.read_text() for path in tmp_path.glob("step-000001.old*/README.md")) == [
        "the user's model card", "the user's other card",
    ]  # fmt: skip


def test_a_checkpoint_whose_files_the_user_changed_outlives_it(tmp_path, capsys):
    for number, change in enumerate([lambda card: card.write_text("the user's model card"), Path.touch], 1):
        write(tmp_path / "best")
        manifest, weights = (tmp_path / "best" / name for name in ("manifest.json", "weights"))
        change(weights)
        while weights.stat().st_ctime_ns <= manifest.stat().st_ctime_ns:  # until the clock of the disk has moved
            os.utime(weights, ns=(0, 0))
        write(tmp_path / "best", "new")
        assert ("was kept as best.old1" in capsys.readouterr().err) == (number == 1)
    assert (tmp_path / "best.old1" / "weights").read_text() == "the user's model card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.old1"]


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "{}", '{"model_type": "gpt2", "dropout": 0.1}', "\xff\xfe{", "[" * 9]
)
def test_a_config_that_is_not_a_runs_is_never_replaced(tmp_path, resume, text):
    file = tmp_path / "run" / "config.json"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is (damaged|not the config\.json of a run).*another `name`"):
        RunFolder(tmp_path / "run").open(SETTINGS, resume)
    assert content(tmp_path / "run") == {file.relative_to(file.parent): text.encode("latin-1")}


@pytest.mark.parametrize("text", [None, "", "[]", '{"model_type": "gpt2"}'])
def test_a_run_whose_settings_are_lost_is_kept_and_can_be_moved_aside(tmp_path, text):
    run = begun(tmp_path / "run", 4)
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    before = content(run)
    error = FileNotFoundError if text is None else ValueError
    with pytest.raises(error, match="put the right one back, or move the run aside: pass resume='never'"):
        opened(run)
    assert content(run) == before
    folder = RunFolder(run)
    assert folder.open(SETTINGS, "never") is None
    folder.close()
    assert content(tmp_path / "run.old1") == before


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", ["history.jsonl", "best/weights", "best"])
def test_what_a_run_would_replace_must_be_a_runs(tmp_path, resume, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("the user's")
    with pytest.raises(FileExistsError, match=r"would be replaced, but no run wrote it; .*move"):
        RunFolder(tmp_path / "run").open(SETTINGS, resume)
    assert content(tmp_path / "run") == {file.relative_to(tmp_path / "run"): b"the user's"}


def test_a_model_of_the_user_is_no_run(tmp_path):
    """The folder of a model has a config.json, too."""
    config = tiny_config(tmp_path)
    tiny_model().save_pretrained(config.folder)
    before = content(config.folder)
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match="it lacks model, corpus, total_steps"):
            train(*tiny_diffusion(), config, resume=resume)
    assert content(config.folder) == before and not list(tmp_path.glob("runs/*.old*"))


# ------------------------------------------------------------------------------------------- the history
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
    "damage",
    [
        b'{"step": 20, "lo', b"\xff\xfe\x00", b"[20]", b"20", b"null", b'{"loss": 1.0}', b"",
        b'{"step": "20"}', b'{"step": 20, "loss": "5"}', b'{"step": 20, "loss": NaN}', b'{"step": 20, "loss": 1e400}',
        b'{"step": 20, "event": 5}', b'{"step": 20, "sample": ["a"]}',
    ],
)  # fmt: skip
def test_a_damaged_line_of_a_history_costs_that_line_alone(tmp_path, capsys, damage):
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'{"step": 10}\n' + damage + b'\n{"step": 30}\n' + damage + b'\n{"step": 50}\n{"step": 6')
    assert [record["step"] for record in History.load(file).records] == [10, 30, 50]
    assert f"{file}: line 2, 4 is damaged and was skipped" in capsys.readouterr().err
    file.write_bytes(b'{"step": 10}\n' + damage)  # cut short by a crash: nothing to say
    assert [record["step"] for record in History.load(file).records] == [10] and not capsys.readouterr().err


def test_a_history_that_cannot_be_replaced_is_reported_and_made_up_for(tmp_path, monkeypatch, capsys):
    """As a rollback replaces it: with fewer records than the file has."""
    history = History(tmp_path / "history.jsonl", [{"step": 10}])
    history.path.write_text('{"step": 10}\n{"step": 20}\n')
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing_to_sync(errno.ENOSPC, folders=False))
        history.save()
    assert "history.jsonl could not be written (No space left on device)" in capsys.readouterr().err
    assert [record["step"] for record in History.load(history.path).records] == [10, 20]
    history.append({"step": 15})
    assert [record["step"] for record in History.load(history.path).records] == [10, 15]


# ------------------------------------------------------------------------------------- a disk that refuses
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_told_and_the_last_good_checkpoint_stays(tmp_path, capsys, number):
    write(tmp_path / "step-000001")

    def fill(folder):
        (folder / "weights").write_text("half")
        raise OSError(number, os.strerror(number))

    assert RunFolder(tmp_path).write("step-000002", fill) is False
    told = capsys.readouterr().err
    assert f"step-000002 could not be written ({os.strerror(number)})" in told
    assert "training goes on. The newest whole checkpoint: step-000001" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"] and is_whole(tmp_path / "step-000001")


class LibraryError(Exception):
    """Of a library that does not say what happened."""


def tells_nothing(folder):
    with contextlib.suppress(OSError):
        (folder / "weights").write_bytes(bytes(10_000))
    raise LibraryError


@pytest.mark.parametrize(
    "fill",
    [
        lambda folder: (folder / "weights").write_bytes(bytes(10_000)),
        lambda folder: save_file({"weight": torch.zeros(10_000)}, folder / "weights.safetensors"),
        lambda folder: torch.save(torch.zeros(10_000), folder / "weights.pt"),
        lambda folder: tiny_tokenizer().save_pretrained(folder),
        lambda folder: tiny_model().save_pretrained(folder),
        tells_nothing,
    ],
    ids=["python", "safetensors", "torch", "tokenizers", "transformers", "unknown"],
)
def test_a_full_disk_is_recognised_whatever_the_library_makes_of_it(tmp_path, capsys, fill):
    """The kernel refuses to let a file grow beyond 4,000 bytes."""
    write(tmp_path / "step-000001")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        assert RunFolder(tmp_path).write("step-000002", fill) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000002 could not be written (File too large); training goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty disk of some bytes; only root can."""
    place = tmp_path / "disk"
    place.mkdir()

    @contextlib.contextmanager
    def mounted(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)

    return mounted


@pytest.mark.slow
def test_a_disk_may_fill_in_any_file_of_a_checkpoint(tmp_path, monkeypatch, capsys, small_disk):
    """Disks of one more page each, until the checkpoint of a run fits."""
    fills = {}
    monkeypatch.setattr(RunFolder, "write", lambda folder, name, fill: not fills.update({name: fill}))
    train(*tiny_diffusion(), tiny_config(tmp_path))
    monkeypatch.undo()
    for pages in itertools.count(2):
        with small_disk(pages * mmap.PAGESIZE) as disk:
            if RunFolder(disk).write("step-000012", fills["step-000012"]):
                files = content(disk / "step-000012")
                break
            assert not list(disk.iterdir())
            assert "step-000012 could not be written (No space left on device)" in capsys.readouterr().err
    assert pages >= sum(-(-len(data) // mmap.PAGESIZE) for data in files.values()) >= len(files) >= 8


@pytest.mark.parametrize(
    "error",
    [
        TypeError("object of type 'int' has no len()"),
        RuntimeError(),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError("Error while serializing: invalid shape"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_mistake_in_the_program_is_no_full_disk(tmp_path, error):
    def fill(folder):
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(type(error)) as raised:
        RunFolder(tmp_path).write("step-000001", fill)
    assert raised.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_sync_folders_takes_checkpoints(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing_to_sync(number, folders=True))
    for _ in range(2):
        assert RunFolder(tmp_path).write("step-000001", lambda folder: (folder / "weights").write_text("x"))
    assert is_whole(tmp_path / "step-000001")


@pytest.mark.parametrize("number, folders", [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_other_refusals_to_sync_are_told(tmp_path, monkeypatch, capsys, number, folders):
    monkeypatch.setattr(os, "fsync", refusing_to_sync(number, folders))
    assert not RunFolder(tmp_path).write("step-000001", lambda folder: (folder / "weights").write_text("x"))
    assert f"could not be written ({os.strerror(number)})" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_windows_is_not_asked_to_sync_a_folder(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_text("x")
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "open", lambda path, flags, open=os.open: opened.append((path, flags)) or open(path, flags))
        sync(file, tmp_path)
    assert opened == [(file, os.O_RDWR)]  # Windows flushes only what was opened for writing


# ------------------------------------------------------------------------------------ in the background
def test_writes_in_the_background_keep_their_order_and_never_overlap(tmp_path):
    folder, done, disk = RunFolder(tmp_path), [], threading.Event()

    def fill(place):
        done.append(f"{place.name} begun")
        assert disk.wait(PATIENCE)
        done.append(f"{place.name} filled")

    for name in ("best", "step-000004", "step-000008"):
        folder.write_later(name, fill, then=lambda name=name: done.append(name))
    assert not done[1:] and not is_whole(tmp_path / "best")  # the caller was not kept waiting
    disk.set()
    folder.wait()
    assert done == [
        text
        for name in ("best", "step-000004", "step-000008")
        for text in (f".{name}.unfinished begun", f".{name}.unfinished filled", name)
    ]
    assert is_whole(tmp_path / "best") and [path.name for path in folder.checkpoints()] == [
        "step-000004",
        "step-000008",
    ]


def test_what_goes_wrong_in_the_background_is_told_as_in_the_foreground(tmp_path, capsys):
    folder, done = RunFolder(tmp_path), []

    def refused(place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.write_later("step-000004", refused, then=lambda: done.append("refused"))
    folder.wait()
    assert "step-000004 could not be written (No space left on device)" in capsys.readouterr().err
    folder.write_later("step-000008", lambda place: len(3), then=lambda: done.append("wrong"))
    with pytest.raises(TypeError):
        folder.wait()
    folder.wait()  # it is raised once
    assert not done and not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_folder_is_released_when_it_is_written_even_if_the_wait_is_interrupted(tmp_path, monkeypatch, interrupted):
    folder, _ = opened(tmp_path / "run")
    disk, closing = threading.Event(), threading.Event()
    folder.write_later("best", lambda place: disk.wait(PATIENCE), then=lambda: None)
    wait = folder.wait

    def waits():
        closing.set()
        if interrupted:
            raise KeyboardInterrupt
        wait()

    monkeypatch.setattr(folder, "wait", waits)

    def close():
        with contextlib.suppress(KeyboardInterrupt):
            folder.close()

    closes = threading.Thread(target=close)
    closes.start()
    assert closing.wait(PATIENCE) and folder.is_claimed() and not is_whole(tmp_path / "run" / "best")
    disk.set()
    closes.join()
    wait()
    assert not folder.is_claimed() and is_whole(tmp_path / "run" / "best")


@pytest.fixture
def lazy_disk(monkeypatch):
    """Runs write in the background, to a disk that does nothing until somebody waits for it."""
    waited, wait, write = threading.Event(), RunFolder.wait, checkpoint.write_whole

    def waits(folder):
        waited.set()
        wait(folder)
        waited.clear()

    def writes(folder, fill):
        assert waited.wait(PATIENCE), "nobody waits for what is being written"
        return write(folder, fill)

    monkeypatch.setattr(RunFolder, "wait", waits)
    monkeypatch.setattr(checkpoint, "write_whole", writes)
    monkeypatch.setattr(run, "saves_in_background", lambda accelerator: True)


def saved(folder):
    """What a run left, but for its clock: every file of its checkpoints, and the state and the optimizer as values."""
    left = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        assert is_whole(place)
        for path in place.iterdir():
            left[place.name, path.name] = path.read_bytes()
        if place.name == "best":
            continue
        state = json.loads(left.pop((place.name, "state.json")))
        optimizer = torch.load(place / "optimizer.pt", weights_only=True)
        left[place.name, "state.json"] = {name: value for name, value in state.items() if name != "seconds"}
        left[place.name, "optimizer.pt"] = (
            json.dumps(optimizer["param_groups"]),
            [
                (name, key, value.tolist())
                for name, values in optimizer["state"].items()
                for key, value in values.items()
            ],
        )
        left[place.name, "history.jsonl"] = comparable(History.load(place / "history.jsonl"))
        del left[place.name, "manifest.json"]
    return left, comparable(History.load(folder / "history.jsonl"))


RUN = dict(dropout=0.1, keep=9, log_every=1, eval_every=3, steps=14)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_run_leaves_the_same_files_whether_it_writes_in_the_background_or_not(tmp_path, request, family):
    """Weights, optimizer and history are those of the step, though the run has gone on when they are written."""
    config = tiny_config(tmp_path, **RUN)
    train(*tiny_diffusion(family), config)
    request.getfixturevalue("lazy_disk")
    train(*tiny_diffusion(family), config.replace(name="background"))
    assert saved(tmp_path / "runs" / "background") == saved(config.folder)


@pytest.mark.slow
def test_a_run_that_writes_in_the_background_stops_and_resumes(tmp_path, request):
    config = tiny_config(tmp_path, **RUN)
    train(*tiny_diffusion(), config.replace(name="whole"))
    request.getfixturevalue("lazy_disk")
    train(*tiny_diffusion(), config, on_log=stop_after(5))
    assert is_whole(config.folder / "step-000004") and is_whole(config.folder / "step-000005")
    train(*tiny_diffusion(), config)
    shutil.rmtree(config.folder / "step-000005")
    assert saved(config.folder) == saved(tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_a_run_that_writes_in_the_background_rolls_back_to_what_it_wrote(tmp_path, request):
    """The head breaks right after the checkpoint of step 4 was handed over."""

    def disturb(history, config):
        if history.records[-1]["step"] == 4 and not history.last("event"):
            model.get_output_embeddings().weight.data.mul_(1e3)

    for name in ("foreground", "background"):
        model, tokenizer = tiny_diffusion()
        history = train(model, tokenizer, tiny_config(tmp_path, **RUN, name=name), on_log=disturb)
        assert "rolled back to step 4" in history.last("event")
        if name == "foreground":
            request.getfixturevalue("lazy_disk")
    assert saved(tmp_path / "runs" / "background") == saved(tmp_path / "runs" / "foreground")


def test_a_disk_that_refuses_in_the_background_does_not_stop_the_run(tmp_path, lazy_disk, monkeypatch, capsys):
    """All but the last checkpoint are refused; then the last one as well, which is an error."""
    config = tiny_config(tmp_path)
    write, refused = checkpoint.write_whole, {"best", "step-000004", "step-000008"}

    def writes(folder, fill):
        if folder.name in refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, fill)

    monkeypatch.setattr(checkpoint, "write_whole", writes)
    train(*tiny_diffusion(), config)
    assert capsys.readouterr().err.count("could not be written (No space left on device)") == 4  # `best` twice
    assert [path.name for path in config.folder.iterdir() if path.is_dir()] == ["step-000012"]
    assert json.loads((config.folder / "step-000012" / "state.json").read_text())["best"] == float("inf")
    refused |= {"step-000016"}
    with pytest.raises(RuntimeError, match=r"at step 16, could not be written.*the checkpoint of step 12 is"):
        train(*tiny_diffusion(), config.replace(steps=16))
    assert not RunFolder(config.folder).is_claimed()


def train_with_a_stuck_disk(folder, settings, step, pipe):
    """What a process does: train, write in the background, never finish the checkpoint of `step`, and tell when the
    run is three steps further.
    """
    begun, sync_now = threading.Event(), checkpoint.sync

    def sync(*paths):
        if paths[0].parent.name == f".step-{step:06d}.unfinished":
            begun.set()
            threading.Event().wait()
        sync_now(*paths)

    def tell(history, config):
        if history.records[-1]["step"] == step + 3:
            begun.wait()
            pipe.send("stuck")

    checkpoint.sync = sync
    run.saves_in_background = lambda accelerator: True
    train_tiny(folder, settings, None, tell)


@pytest.mark.slow
def test_a_run_killed_while_it_writes_in_the_background_keeps_the_checkpoint_before(tmp_path):
    settings = RUN | dict(eval_every=14)
    assert exit_codes(start(tmp_path, settings | {"name": "whole"})) == [0]
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=train_with_a_stuck_disk, args=(tmp_path, settings, 8, theirs), daemon=True)
    process.start()
    ready = connection.wait([ours, process.sentinel], PATIENCE)
    process.kill()
    process.join()
    assert ready == [ours]
    folder = tiny_config(tmp_path, **settings).folder
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["step-000004"]
    assert is_whole(folder / "step-000004") and (folder / ".step-000008.unfinished").exists()
    assert exit_codes(start(tmp_path, settings)) == [0]
    assert saved(folder) == saved(tmp_path / "runs" / "whole")
