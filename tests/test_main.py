import json
import re
from pathlib import Path

import nbformat
import pytest

from dalm_utils.__main__ import main
from dalm_utils.checkpoint import RunFolder
from tests.helpers import TEXTS, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A tiny base, a text, and every DALM_ setting that makes a run small."""
    tiny_model(vocab=320).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    small = vars(tiny_config(tmp_path, base=str(tmp_path / "base")))
    for name in (
        "base",
        "runs",
        "text",
        "length",
        "batch",
        "steps",
        "eval_every",
        "eval_blocks",
        "device",
        "precision",
    ):
        monkeypatch.setenv(f"DALM_{name.upper()}", str(small[name]))
    return tmp_path


def test_train_evaluate_and_sample(workplace, capsys):
    assert main(["train", "gpt2", "name=cli", "log_every=2", "sample_every=0"]) == 0
    assert "nelbo" in capsys.readouterr().out
    best = str(workplace / "runs" / "cli" / "best")
    assert main(["evaluate", best, "--text", str(workplace / "texts"), "--length", "16", "--blocks", "2"]) == 0
    assert "NELBO on 2 test blocks" in capsys.readouterr().out
    assert main(["evaluate", str(workplace / "base"), "--text", str(workplace / "texts"), "--length", "16"]) == 0
    assert "AR NLL" in capsys.readouterr().out
    assert main(["sample", best, "--prompt", "Return", "--length", "5", "--steps", "5", "--num", "2"]) == 0
    assert capsys.readouterr().out.count("Return") == 2


def test_status_shows_where_a_run_stands(workplace, capsys, monkeypatch):
    assert main(["train", "gpt2", "name=cli", "log_every=2", "sample_every=0"]) == 0
    told = capsys.readouterr()
    assert re.search(
        r"step +12  loss \d\.\d+  NELBO .* ratio .* lr .* gradient .* tokens/s .* GiB  0:00:00 to go", told.out
    )
    run = workplace / "runs" / "cli"
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "cli: step 12 of 12, finished" in shown and "checkpoints: step-000012" in shown
    assert "step     12  loss" in shown and "held-out NELBO" in shown
    curve = [line for line in shown.splitlines() if "|" in line]
    assert len(curve) == 10 and sum(line.count("o") for line in curve) == 6  # one mark for each record
    with RunFolder(run)._lock:
        main(["status", str(run)])
        assert "running now" in capsys.readouterr().out
    assert main(["status", "nothing"]) == 1
    assert "no run 'nothing'" in capsys.readouterr().err


def test_data_says_what_is_in_a_text(workplace, capsys):
    lines = workplace / "papers.jsonl"
    lines.write_text("\n".join(json.dumps({"article": f"{text} {'z' * n}"}) for n, text in enumerate(TEXTS * 5)))
    assert main(["data", str(lines), "--field", "article", "--tokenizer", str(workplace / "base")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(facts["documents"].values()) == len(TEXTS) * 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "gpt2", "stepz=3"], "did you mean 'steps'"),
        (["train", "gpt2", "steps"], "not of the form field=value"),
        (["train", "gpt2", "--profile", "desktop"], "choose one of laptop, full"),
        (["sample", "nowhere"], "no model 'nowhere'"),
        (["data", "nowhere.jsonl"], "no text at"),
    ],
)
def test_mistakes_get_one_line_and_no_traceback(workplace, capsys, arguments, message):
    extra = ["--tokenizer", str(workplace / "base")] if arguments[0] == "data" else []
    assert main([*arguments, *extra]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_notebook_runs_with_progress_and_becomes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dalm_utils.__main__.PROJECT", tmp_path)
    sources = ["import sys", "print('busy', file=sys.stderr)", "print('where to look')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(notebook, tmp_path / "small.ipynb")
    assert main(["notebook", str(tmp_path / "small.ipynb")]) == 0
    captured = capsys.readouterr()
    assert "cell 3/3: print('where to look')" in captured.out and captured.out.count("where to look") == 2
    assert "busy" in captured.err
    target = Path(tmp_path / "checkpoints" / "runs" / "small.ipynb")
    executed = nbformat.read(target, as_version=4)
    assert [cell.execution_count for cell in executed.cells] == [1, 2, 3]
    assert not executed.cells[1].outputs  # progress bars and warnings stay on the terminal
    assert "where to look" in target.with_suffix(".html").read_text()


def test_a_failing_notebook_says_which_line_and_keeps_the_stored_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dalm_utils.__main__.PROJECT", tmp_path)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "bad.ipynb")
    assert main(["notebook", str(tmp_path / "bad.ipynb")]) == 1
    error = capsys.readouterr().err
    assert "bad.ipynb failed" in error and "1 / 0" in error
    stored = (tmp_path / "bad.ipynb").read_bytes()
    assert main(["notebook", "--in-place", str(tmp_path / "bad.ipynb")]) == 1
    assert (tmp_path / "bad.ipynb").read_bytes() == stored
