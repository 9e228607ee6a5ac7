import pytest

from dalm_utils.checkpoint import History, is_whole, newest, prune, write_whole


def write(folder, text="x"):
    return write_whole(folder, lambda path: (path / "weights").write_text(text))


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    write(tmp_path / "step-000001")

    def fails(path):
        (path / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "step-000002", fails)
    assert newest(tmp_path).name == "step-000001"
    assert is_whole(write(tmp_path / "step-000002"))
    assert newest(tmp_path).name == "step-000002"


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    for step in (1, 2, 3):
        write(tmp_path / f"step-00000{step}")
    (tmp_path / "step-000003" / "weights").write_text("y")
    (tmp_path / "step-000002" / "manifest.json").unlink()
    assert newest(tmp_path).name == "step-000001"
    assert "step-000003 is damaged" in capsys.readouterr().err


def test_replacing_keeps_one_and_pruning_spares_best(tmp_path):
    write(tmp_path / "best", "old")
    write(tmp_path / "best", "new")
    assert (tmp_path / "best" / "weights").read_text() == "new"
    for step in (1, 2, 3):
        write(tmp_path / f"step-00000{step}")
    prune(tmp_path, keep=2)
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
    assert [r["step"] for r in History.load(history.path, until=20).records] == [10, 20]
