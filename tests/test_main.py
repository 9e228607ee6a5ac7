import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from dalm_utils import load_corpus, nelbo, sampling, save_diffusion
from dalm_utils.__main__ import main
from dalm_utils.checkpoint import History, RunFolder
from dalm_utils.config import PROJECT
from dalm_utils.quality import infilling
from tests.helpers import PATIENCE, TEXTS, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer


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
    sample = ["sample", best, "--prompt", "Return", "--length", "5", "--steps", "5", "--num", "2"]
    assert main(sample) == 0
    texts = capsys.readouterr().out
    assert texts.count("Return") == 2
    assert main([*sample, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "\n\n---\n\n".join(record["texts"]) == texts.removesuffix("\n") and 1 <= record["forward_passes"] <= 5


def table_of(shown):
    """The figures of a printed table, and their standard errors, under the names that the JSON object gives them."""
    figures = {}
    for name, value, _, error in re.findall(r"^ +(\w+)  (\S+)( \+- (\S+))?$", shown, re.MULTILINE):
        figures |= {name: value} | ({f"{name}_stderr": error} if error else {})
    return figures


def test_evaluate_as_a_table_and_as_json(workplace, capsys):
    best, base, words = str(workplace / "best"), str(workplace / "base"), str(workplace / "texts")
    model, tokenizer = tiny_diffusion()
    save_diffusion(model, tokenizer, best)
    options = ["--text", words, "--length", "16", "--split", "validation", "--infill", "4"]
    asked = ["evaluate", best, *options, "--blocks", "1", "--quality", "2", "--judge", base]
    told = []
    for form in ([], ["--json"]):
        assert main([*asked, *form]) == 0
        told.append(capsys.readouterr())
        assert all(word in told[-1].err for word in ("scoring", "infilling", "writing"))  # the progress bars
    table, record = table_of(told[0].out), json.loads(told[1].out)
    assert set(table) == set(record) - {"model", "text", "split", "length", "blocks", "likelihood"}
    for name, shown in table.items():
        value = record[name]
        assert shown == ("undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))
    blocks = load_corpus(words, tokenizer).blocks("validation", 16, 1)
    assert record["nats_per_token"] == nelbo(model, tokenizer, blocks).mean and record["likelihood"] == "NELBO"
    assert record["nats_per_token_stderr"] is None and record["blocks"] == 1  # a single block has no spread
    assert record["infill_token_match"] == infilling(model, tokenizer, blocks, gap=4).mean["token_match"]
    assert record["judge"] == base and record["written_perplexity"] > 1

    assert main(["evaluate", base, *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["likelihood"] == "AR NLL" and record["nats_per_token_stderr"] > 0
    assert main(["evaluate", base, *options, "--quality"]) == 1
    assert "is an AR model" in capsys.readouterr().err
    assert main(["evaluate", best, *options, "--quality", "--judge", "tiny-gpt2"]) == 1
    assert "an AR model with the same tokenizer" in capsys.readouterr().err


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
    monkeypatch.setenv("DALM_RUNS", str(run.parent))
    assert main(["status", run.name]) == 0
    assert main(["status", "nothing"]) == 1
    assert main(["status", str(run / "best")]) == 1  # a model
    assert "no run 'nothing'" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 1
    assert "is the folder of a run; its model is" in capsys.readouterr().err


def test_every_option_of_sample_reaches_the_sampler(tmp_path, monkeypatch, capsys):
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    asked = []
    monkeypatch.setattr(
        sampling, "generate", lambda model, tokenizer, **options: asked.append(options) or SimpleNamespace(text=["a"])
    )
    options = dict(
        prompt="Return", suffix="of", length=5, steps=4, order="threshold", threshold=0.7, block_length=2,
        temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.2, seed=8,
    )  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["sample", str(tmp_path / "model"), *words, "--stop-at-end", "--num", "2"]) == 0
    assert asked == [options | dict(stop_at_end=True, num_samples=2, progress=True)]
    assert capsys.readouterr().out == "a\n"


def test_a_damaged_model_is_one_line(tmp_path, capsys):
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["sample", str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_that_ran_out_of_patience_and_then_went_on_is_not_finished(workplace, capsys):
    run = RunFolder(workplace / "runs" / "cli")
    run.open({"total_steps": 12})
    run.close()
    history = History(run.path / "history.jsonl")
    history.append({"step": 6, "tokens": 6, "event": "finished: no better NELBO in 3 evaluations"})
    assert main(["status", str(run.path)]) == 0 and "step 6 of 12, finished" in capsys.readouterr().out
    history.append({"step": 8, "tokens": 8, "loss": 5.0})
    assert main(["status", str(run.path)]) == 0 and "step 8 of 12, not running" in capsys.readouterr().out


def test_data_says_what_is_in_a_text_and_what_was_left_out(workplace, capsys):
    records = [{"article": f"{text} {'z' * n}"} for n, text in enumerate(TEXTS * 5)]
    lines = [*map(json.dumps, records), json.dumps(records[3]), "{", '{"title": "x"}']
    path = workplace / "arxiv_train-1.jsonl"
    path.write_text("\n".join(lines))
    asked = ["data", str(path), "--tokenizer", str(workplace / "base")]
    assert main(asked) == 0
    told = capsys.readouterr()
    assert re.search(r"tokenising: .*B/s", told.err)
    splits = re.findall(r"^(train|validation|test) +(\d+) +([\d,]+) +0\.\d$", told.out, re.MULTILINE)
    assert len(splits) == 3 and sum(int(documents) for _, documents, _ in splits) == len(records)
    assert "copies dropped: 1; skipped: 1 not JSON, 1 no field 'text'" in told.out
    assert f"arxiv_train-1.jsonl:{len(lines) - 1}: not JSON" in told.out
    assert f"DALM_TEXT={path} DALM_FIELD=text" in told.out
    assert main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [f"{facts['tokens'][split]:,}" for split, _, _ in splits] == [tokens for _, _, tokens in splits]


def test_data_smollm2_fetches_a_model_and_names_the_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dalm_utils.hubs.fetch_smollm2", lambda: tmp_path / "small.gguf")
    assert main(["data", "smollm2"]) == 0
    assert "small.gguf; DALM_PROFILE=real uses it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "gpt2", "stepz=3"], "did you mean 'steps'"),
        (["train", "gpt2", "steps"], "not of the form field=value"),
        (["train", "gpt2", "--profile", "desktop"], "choose one of laptop, real, full"),
        (["train", "gpt2", "steps=3", "--profile", "laptop", "stepz=3", "--fresh"], "did you mean 'steps'"),
        (["sample", "nowhere"], "no model 'nowhere'"),
        (["data", "nowhere.jsonl"], "no text at"),
        (["data", "arxiv:99"], "1 to 15 shards, not '99'"),
        (["data", "docstrings", "--hub", "modelscope"], "'docstrings' does not come from a hub"),
    ],
)
def test_mistakes_get_one_line_and_no_traceback(workplace, capsys, arguments, message):
    extra = ["--tokenizer", str(workplace / "base")] if arguments[0] == "data" else []
    assert main([*arguments, *extra]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("arguments", [["train", "gpt2", "--profil", "x", "--fersh"], ["status", "a", "steps=3"]])
def test_an_unknown_argument_is_refused(capsys, arguments):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_settings_may_stand_behind_an_option(workplace):
    before, behind = ["log_every=2", "sample_every=0"], ["name=behind", "steps=4"]
    assert main(["train", "gpt2", *before, "--profile", "laptop", *behind, "--fresh"]) == 0
    config = json.loads((workplace / "runs" / "behind" / "config.json").read_text())
    assert (config["log_every"], config["steps"]) == (2, 4)


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


STOPPED = """
import signal, time
from pathlib import Path
asked = []
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *which: asked.append(which))
Path("begun").touch()
end = time.monotonic() + 1800
while not asked and time.monotonic() < end:
    time.sleep(0.1)
time.sleep(6)  # the step in hand, longer than a kernel gets by default
Path("checkpoint").write_text(f"{len(asked)} signal")
"""


def test_a_notebook_that_is_stopped_ends_its_step_and_says_how_to_go_on(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(STOPPED)]), tmp_path / "long.ipynb")
    command = [sys.executable, "-m", "dalm_utils", "notebook", str(tmp_path / "long.ipynb"), "--in-place"]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1 and "error: stopped; the same command continues" in told and "Traceback" not in told
    assert (tmp_path / "checkpoint").read_text() == "1 signal"


def test_a_failing_notebook_says_which_line_and_keeps_the_stored_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dalm_utils.__main__.PROJECT", tmp_path)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "bad.ipynb")
    assert main(["notebook", str(tmp_path / "bad.ipynb")]) == 1
    error = capsys.readouterr().err
    assert "bad.ipynb failed" in error and "1 / 0" in error
    stored = (tmp_path / "bad.ipynb").read_bytes()
    assert main(["notebook", "--in-place", str(tmp_path / "bad.ipynb")]) == 1
    assert (tmp_path / "bad.ipynb").read_bytes() == stored
