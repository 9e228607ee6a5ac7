import argparse
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dalm_utils.__main__ as cli
from dalm_utils import (
    answer_quality,
    load_corpus,
    load_diffusion,
    load_pairs,
    nelbo,
    sampling,
    save_diffusion,
    training,
)
from dalm_utils.__main__ import main
from dalm_utils.checkpoint import RunFolder
from dalm_utils.config import PROJECT
from dalm_utils.history import History
from dalm_utils.hubs import BASES, SHIPPED
from dalm_utils.quality import infilling
from tests.helpers import PATIENCE, TEXTS, stop_after, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer


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


@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_train_and_evaluate_say_what_of_a_text_they_leave_out(workplace, capsys, kind):
    text = workplace / ("texts" if kind == "documents" else "pairs.jsonl")
    if kind == "documents":
        for n in range(90):
            (text / f"cafe-{n}.txt").write_bytes(b"caf\xe9")
    else:
        lines = [json.dumps({"prompt": f"{n} + {n} =", "response": f" {2 * n}"}).encode() for n in range(192)]
        text.write_bytes(b"\n".join([*lines, *[b'{"prompt": "caf\xe9"}'] * 90]))
    settings = ["steps=2", "warmup_steps=1", "anneal_steps=1", "sample_every=0"]
    objective = "diffusion" if kind == "documents" else "finetune"
    assert main(["train", "gpt2", "name=cli", f"text={text}", f"objective={objective}", *settings]) == 0
    assert main(["evaluate", str(workplace / "runs" / "cli" / "best"), "--blocks", "2"]) == 0
    told = f"left out of {str(text)!r}: 90 of 282 {kind}: 90 not UTF-8 (convert it, as by iconv"
    assert capsys.readouterr().err.count(told) == 2


def table_of(shown):
    """A printed table: for each name the figure, and what is beside it."""
    rows = re.findall(r"^ +(\w+)  (\S+)(?: \+- \S+)?(?: +(\S.*))?$", shown, re.MULTILINE)
    return {name: (value, beside) for name, value, beside in rows}


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
        assert all(word in told[-1].err for word in ("scoring", "infilling", "sampling"))  # the progress bars
    table, record = table_of(told[0].out), json.loads(told[1].out)

    def shown(value):
        return "undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = {name for name in record if not name.endswith("_stderr") and not name.startswith("held_out_")}
    assert set(table) == lines - {"model", "text", "field", "split", "length", "blocks", "likelihood"}
    for name, (value, beside) in table.items():
        assert value == shown(record[name])
        if name.startswith("written_"):
            assert f"held-out text: {shown(record[name.replace('written', 'held_out')])}" in beside
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


def evaluation(capsys, *arguments):
    """What evaluate prints as JSON, on two blocks."""
    assert main(["evaluate", *map(str, arguments), "--blocks", "2", "--samples", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def trained(workplace):
    """The folder of a finished run on a text of its own, whose documents are not in a field `text`."""
    path = workplace / "papers.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"{text} {'z' * n}"}) for n, text in enumerate(TEXTS * 5)))
    settings = [f"text={path}", "field=body", "name=cli", "warmup_steps=1", "anneal_steps=2", "sample_every=0"]
    assert main(["train", "gpt2", *settings]) == 0
    return workplace / "runs" / "cli"


def test_evaluate_scores_the_text_that_a_run_was_trained_on(trained, capsys, monkeypatch):
    capsys.readouterr()
    text = str(trained.parent.parent / "papers.jsonl")
    for model in (trained / "best", trained / "step-000012"):
        record = evaluation(capsys, model)
        assert (record["text"], record["field"], record["length"]) == (text, "body", 16)
    monkeypatch.chdir(trained / "best")
    assert evaluation(capsys, ".")["text"] == text
    assert main(["evaluate", ".", "--blocks", "2"]) == 0
    assert f"NELBO on 2 test blocks of 16 tokens of {text!r}: ." in capsys.readouterr().out


def test_evaluate_scores_the_ar_base_beside_a_model_that_was_made_from_it(trained, workplace, capsys):
    capsys.readouterr()
    base = workplace / "base"
    text = str(workplace / "papers.jsonl")
    record = evaluation(capsys, trained / "best", "--infill", "4")
    alone = evaluation(capsys, base, "--infill", "4", "--text", text, "--field", "body", "--length", "16")
    assert record["base"] == str(base)
    for name in ("nats_per_token", "nats_per_token_stderr", "infill_token_match"):
        assert record[f"base_{name}"] == alone[name]
    assert main(["evaluate", str(trained / "best"), "--blocks", "2", "--samples", "1"]) == 0
    _, beside = table_of(capsys.readouterr().out)["nats_per_token"]
    assert beside.startswith(f"{base}: {alone['nats_per_token']:.4g} +- ")


def test_evaluate_scores_another_text_where_it_is_named(trained, workplace, capsys):
    capsys.readouterr()
    record = evaluation(capsys, trained / "best", "--text", workplace / "texts", "--length", "8")
    assert (record["text"], record["field"], record["length"]) == (str(workplace / "texts"), "text", 8)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"text": "{texts}", "field": "text", "length": 16}, 16),
        ({"text": "{texts}", "length": 512}, 64),  # no more than the model has
        ({"text": "{texts}"}, 64),
    ],
)
def test_evaluate_knows_the_text_of_a_model_that_ships(workplace, capsys, config, expected):
    config = {name: str(workplace / "texts") if name == "text" else value for name, value in config.items()}
    (workplace / "base" / "provenance.json").write_text(json.dumps({"config": config}))
    record = evaluation(capsys, workplace / "base")
    assert record["text"] == config["text"] and record["length"] == expected


@pytest.mark.parametrize("content", ["[]", '{"config": 5}', '{"source": "elsewhere"}'])
def test_evaluate_takes_docstrings_where_nothing_is_known(workplace, monkeypatch, capsys, content):
    (workplace / "base" / "provenance.json").write_text(content)
    monkeypatch.setattr("dalm_utils.corpus.load_corpus", lambda text, *_, **__: sys.exit(text))
    with pytest.raises(SystemExit, match="docstrings"):
        main(["evaluate", str(workplace / "base")])


def test_the_models_that_ship_say_what_they_were_trained_on():
    origins = {name: cli._origin(BASES / name) for name in SHIPPED}
    assert {name: origin["text"] for name, origin in origins.items()} == {
        "tiny-gpt2": "docstrings", "tiny-diffugpt": "docstrings", "tiny-galactica": "mathematics",
    }  # fmt: skip
    assert cli._ar_base(origins["tiny-diffugpt"]) == "tiny-gpt2"


def test_the_base_of_a_run_judges_what_its_model_generates(trained, workplace, capsys):
    settings = [f"base={trained / 'best'}", "name=more", "steps=2", "sample_every=0"]
    assert main(["train", "gpt2", *settings]) == 0
    capsys.readouterr()
    for model in (trained / "best", trained.with_name("more") / "best"):
        assert evaluation(capsys, model, "--quality", "2")["judge"] == str(workplace / "base")


def test_many_texts_are_generated_a_few_at_a_time_and_few_as_ever(trained, capsys, monkeypatch):
    kept, generate = [], sampling.generate

    def generate_and_keep(*given, **options):
        kept.append(generate(*given, **options).tokens)
        return SimpleNamespace(tokens=kept[-1])

    monkeypatch.setattr(sampling, "generate", generate_and_keep)
    capsys.readouterr()
    assert evaluation(capsys, trained / "best", "--quality", "33")["written_perplexity"] > 0
    model, tokenizer = load_diffusion(trained / "best")
    assert [len(tokens) for tokens in kept] == [32, 1]
    assert kept[0].equal(generate(model, tokenizer, length=15, num_samples=32).tokens)
    assert not kept[1].equal(kept[0][:1])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--infill", "14"], "--infill 14 needs --length 17, got 16"),
        (["--infill", "2", "--length", "4"], "--infill 2 needs --length 5, got 4"),
        (["--quality", "1", "--length", "2"], "--quality needs --length 3"),
    ],
)
def test_blocks_too_short_for_what_is_asked_are_found_before_scoring(trained, monkeypatch, capsys, options, message):
    monkeypatch.setattr("dalm_utils.evaluation.nelbo", None)
    assert main(["evaluate", str(trained / "best"), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_predicts_nonsense_has_no_perplexity_but_a_likelihood(trained, capsys):
    model, tokenizer = load_diffusion(trained / "best")
    model.get_output_embeddings().weight.data *= 1e4
    save_diffusion(model, tokenizer, trained / "best")
    capsys.readouterr()
    record = evaluation(capsys, trained / "best")
    assert record["nats_per_token"] > 700 and record["perplexity_bound"] is None


def test_the_base_of_a_run_that_began_with_its_own_best_model_is_not_looked_for_without_end(trained, capsys):
    config = trained / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base": str(trained / "best")}))
    assert main(["evaluate", str(trained / "best"), "--length", "16", "--blocks", "2"]) == 0
    assert "no AR model is known from which" in capsys.readouterr().err


def test_a_precision_of_the_gpu_is_not_asked_of_the_cpu_on_which_the_model_is_built(workplace, monkeypatch):
    built = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(training, "train", lambda model, *_, **__: built.append(model) or exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(["train", "gpt2", "device=cuda", "precision=fp16"])
    assert built[0].device.type == "cpu"


def test_status_passes_over_a_folder_of_that_name_that_is_no_run(workplace, capsys, monkeypatch):
    assert main(["train", "gpt2", "name=mine", "sample_every=0"]) == 0
    (workplace / "mine").mkdir()
    (workplace / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(workplace)
    capsys.readouterr()
    assert main(["status", "mine"]) == 0 and "step 12 of 12, finished" in capsys.readouterr().out


def test_the_folder_of_a_run_without_a_best_model_is_named_with_its_newest_one(workplace, capsys):
    run = workplace / "runs" / "young"
    assert main(["train", "gpt2", "name=young", "sample_every=0"]) == 0
    shutil.rmtree(run / "best")
    assert main(["sample", str(run)]) == 1
    assert f"without a best model; its newest model is {run}/step-000012" in capsys.readouterr().err
    (run / "step-000012").rename(run / "step-000012.damaged1")
    assert main(["sample", str(run)]) == 1
    assert "it has no model yet" in capsys.readouterr().err


def test_status_shows_how_far_a_run_is(workplace, capsys, monkeypatch):
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


@pytest.fixture
def asked(monkeypatch):
    """The options of each call of the sampler, which answers "a"."""
    calls = []
    monkeypatch.setattr(
        sampling, "generate", lambda model, tokenizer, **options: calls.append(options) or SimpleNamespace(text=["a"])
    )
    return calls


def test_every_option_of_sample_reaches_the_sampler(tmp_path, asked, capsys):
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    options = dict(
        prompt="Return", suffix="of", length=5, steps=4, order="threshold", threshold=0.7, block_length=2,
        temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.2, seed=8, remask=0.3, refresh=2,
    )  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["sample", str(tmp_path / "model"), *words, "--stop-at-end", "--cache", "--num", "2"]) == 0
    assert asked == [options | dict(stop_at_end=True, cache=True, num_samples=2, progress=True)]
    assert capsys.readouterr().out == "a\n"


def test_a_chat_prompt_is_rendered_by_the_template_of_the_tokenizer(tmp_path, asked):
    model, tokenizer = tiny_diffusion()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    save_diffusion(model, tokenizer, tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--chat", "--prompt", "Hello", "--length", "5"]) == 0
    prompt, gap = asked[0]["parts"]
    assert tokenizer.decode(prompt) == "user: Hello\nassistant:" and gap == 5
    assert not asked[0].keys() & {"prompt", "suffix", "length"}


@pytest.mark.parametrize(
    "words, error",
    [([], "--chat needs a --prompt"), (["--prompt", "a", "--suffix", "b"], "takes no --suffix"),
     (["--prompt", "a"], "has no chat template")],
)  # fmt: skip
def test_a_chat_without_what_it_needs_is_refused(tmp_path, capsys, words, error):
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--chat", *words]) == 1
    assert error in capsys.readouterr().err


def test_a_damaged_model_is_one_line(tmp_path, capsys):
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["sample", str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_that_ran_out_of_patience_and_then_continued_is_not_finished(workplace, capsys):
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
    assert re.search(r"tokenizing: .*B/s", told.err)
    splits = re.findall(r"^(train|validation|test) +(\d+) +([\d,]+) +0\.\d$", told.out, re.MULTILINE)
    assert len(splits) == 3 and sum(int(documents) for _, documents, _ in splits) == len(records)
    assert "copies dropped: 1; skipped: 1 not JSON, 1 no field 'text'" in told.out
    assert f"arxiv_train-1.jsonl:{len(lines) - 1}: not JSON" in told.out
    settings = {"TEXT": path, "FIELD": "text", "BASE": workplace / "base"}
    assert " ".join(f"DALM_{name}={value}" for name, value in settings.items()) in told.out
    assert main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [f"{facts['tokens'][split]:,}" for split, _, _ in splits] == [tokens for _, _, tokens in splits]


@pytest.mark.parametrize("field", ["text", "the body's"])
def test_the_last_line_of_data_trains_on_the_text(workplace, monkeypatch, capsys, field):
    path = workplace / "some papers.jsonl"
    path.write_text("\n".join(json.dumps({field: f"{text} {'z' * n}"}) for n, text in enumerate(TEXTS * 5)))
    monkeypatch.chdir(workplace)
    asked = ["data", path.name, "--tokenizer", str(workplace / "base")]
    assert main([*asked, *(["--field", field] if field != "text" else [])]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "dalm_utils"]
    monkeypatch.chdir("/")
    assert main([*command[3:], "name=pasted", "steps=2"]) == 0
    settings = json.loads((workplace / "runs" / "pasted" / "config.json").read_text())
    assert settings["corpus"] == load_corpus(str(path), tiny_tokenizer(), field=field).facts["digest"]


def test_a_text_in_the_current_folder_is_named_after_it(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace / "texts")
    assert main(["data", ".", "--tokenizer", str(workplace / "base")]) == 0
    assert "train gpt2 name=texts " in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture
def pairs(workplace):
    """A file of pairs, one of them longer than 40 tokens."""
    lines = [{"prompt": f"Return the sum of {n}", "response": f" axis {n % 3}"} for n in range(96)]
    lines += [{"prompt": "Return", "response": " axis" * 50}, {"prompt": "a", "response": ""}, lines[0]]
    path = workplace / "my pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_data_says_how_many_pairs_fit_and_its_last_line_trains_on_them(workplace, pairs, capsys):
    asked = ["data", str(pairs), "--tokenizer", str(workplace / "base"), "--length", "40"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^(train|validation|test) +(\d+) +(\d+) +[\d,]+ +[\d,]+$", told, re.MULTILINE)
    assert len(rows) == 3 and sum(int(count) for _, count, _ in rows) == 1 + sum(int(fits) for _, _, fits in rows)
    assert "pairs are longer than length=40 and left out, the first one begins 'Return axis" in told
    assert "copies dropped: 1; skipped: 1 empty 'response'" in told
    assert "in a notebook" not in told  # they read documents
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"] == {split: int(fits) for split, _, fits in rows}
    command = shlex.split(told.splitlines()[-1])
    assert main([*command[3:], "name=pasted", "steps=2", "warmup_steps=1", "anneal_steps=1"]) == 0
    settings = json.loads((workplace / "runs" / "pasted" / "config.json").read_text())
    assert settings["objective"] == "finetune" and settings["length"] == 40


def test_evaluate_scores_answers_where_the_text_is_pairs(workplace, pairs, capsys):
    settings = [f"text={pairs}", "objective=finetune", "length=40", "name=answers", "steps=2", "sample_every=0"]
    assert main(["train", "gpt2", *settings, "warmup_steps=1", "anneal_steps=1"]) == 0
    capsys.readouterr()
    best = str(workplace / "runs" / "answers" / "best")
    assert main(["evaluate", best, "--blocks", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"conditional NELBO on 4 test pairs of {str(pairs)!r}: {best}" in shown
    assert main(["evaluate", best, "--blocks", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    figures = {name for name in record if not name.endswith("_stderr")}
    assert set(table_of(shown)) == figures - {"model", "text", "field", "split", "length", "blocks", "likelihood"}
    model, tokenizer = load_diffusion(best)
    scored = load_pairs(str(pairs), tokenizer).pairs("test", 40, 4)
    assert record["nats_per_token"] == nelbo(model, tokenizer, scored).mean
    assert record["rougeL"] == answer_quality(model, tokenizer, scored).mean["rougeL"]
    assert 0 <= record["exact_match"] <= 1 and "exact_match_stderr" in record
    base = ["evaluate", str(workplace / "base"), "--text", str(pairs), "--length", "40", "--blocks", "4"]
    assert main([*base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["likelihood"] == "conditional AR NLL"
    assert main([*base, "--infill"]) == 1
    assert "--infill and --quality are for texts" in capsys.readouterr().err


def test_data_reads_no_weights(workplace, monkeypatch, capsys):
    (workplace / "base" / "model.safetensors").unlink()
    assert main(["data", str(workplace / "texts"), "--tokenizer", str(workplace / "base")]) == 0


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
        (["train", "gpt2", "learning_rate=nan"], "learning_rate must be positive, got nan"),
        (["train", "gpt2", "base=nowhere", "hub=local"], "no model 'nowhere'"),
        (["train", "gpt2", f"runs={__file__}"], "test_main.py"),
        (["status", __file__], f"no run {__file__!r}"),
        (["sample", "nowhere"], "no model 'nowhere'"),
        (["sample", __file__], f"no model {__file__!r}"),
        (["sample", "caf\udce9"], "the argument 'caf\\udce9' is not UTF-8"),
        (["sample", "tiny-diffugpt", "--prompt", "\udcff"], "the argument '\\udcff' is not UTF-8"),
        (["data", __file__], "neither a .jsonl or .parquet file nor a folder"),
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


def options_of(kind):
    """Every option of every command whose values are of this type, with what it needs before it."""
    needed = {"train": ["gpt2"], "data": [], "notebook": ["a.ipynb"]}
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in ("train", "status", "sample", "evaluate", "data", "notebook"):
        getattr(cli, f"_add_{name}")(commands)
        for action in commands.choices[name]._actions:
            if action.type is kind:
                yield [name, *needed.get(name, ["nowhere"]), action.option_strings[0]]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("arguments", list(options_of(float)), ids="".join)
def test_a_number_that_is_not_finite_is_found_first(capsys, arguments, bad):
    assert main([*arguments[:-1], f"{arguments[-1]}={bad}"]) == 1
    assert capsys.readouterr().err == f"error: {arguments[-1]} must be a finite number, got {bad}\n"


@pytest.mark.parametrize("arguments", list(options_of(int)), ids="".join)
def test_a_count_that_is_too_small_is_found_first(capsys, arguments):
    least = 0 if arguments[-1] == "--seed" else 1
    assert main([*arguments, str(least - 1)]) == 1
    assert capsys.readouterr().err == f"error: {arguments[-1]} must be at least {least}, got {least - 1}\n"


@pytest.mark.parametrize("arguments", [["train", "gpt2", "--profil", "x", "--fersh"], ["status", "a", "steps=3"]])
def test_an_unknown_argument_is_refused(capsys, arguments):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_settings_may_stand_behind_an_option(workplace):
    before, behind = ["log_every=2", "sample_every=0"], ["name=behind", "steps=4"]
    assert main(["train", "gpt2", *before, "--profile", "laptop", *behind, "--fresh"]) == 0
    config = json.loads((workplace / "runs" / "behind" / "config.json").read_text())
    assert (config["log_every"], config["total_steps"]) == (2, 4)


def test_status_prints_nothing_before_an_error(workplace, monkeypatch, capsys):
    run = RunFolder(workplace / "runs" / "cli")
    run.open({"total_steps": 12})
    run.close()
    monkeypatch.setattr(RunFolder, "is_claimed", lambda folder: os.open(run.path / "nothing", os.O_RDONLY))
    assert main(["status", str(run.path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: [Errno 2]") and shown.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"total_steps": '])
def test_status_names_a_damaged_config(tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    assert main(["status", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'config.json'} is not JSON") and error.count("\n") == 1


def test_status_reads_a_history_with_a_damaged_last_line(workplace, capsys):
    run = RunFolder(workplace / "runs" / "cli")
    run.open({"total_steps": 12})
    run.close()
    (run.path / "history.jsonl").write_bytes(b'{"step": 6, "loss": 5.0}\n{"step": \xff\x00')
    assert main(["status", str(run.path)]) == 0
    assert "step 6 of 12, not running" in capsys.readouterr().out


@pytest.mark.parametrize("seconds, shown", [(90, "0:01:30"), (10**14, "millions of years"), (10**30, "millions")])
def test_a_run_longer_than_a_calendar_is_shown(seconds, shown):
    assert shown in cli._log_line({"step": 1, "eta": seconds})


# ------------------------------------------------------------------------------------------------ the exit status
@pytest.mark.slow
@pytest.mark.usefixtures("hears_hangups")
@pytest.mark.parametrize("kind, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_run_has_its_own_exit_status_and_resumes(workplace, monkeypatch, capsys, kind, status):
    def stop(history, config):
        if history.records[-1]["step"] == 4:
            os.kill(os.getpid(), kind)

    asked = ["train", "gpt2", "name=cli", "log_every=2", "sample_every=0"]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_print_record", stop)
        assert main(asked) == status
    told = capsys.readouterr().err
    stopped = re.search(r"stopped at step (\d+) of 12; run it again to resume there", told)
    assert stopped and 4 <= int(stopped[1]) < 12 and "Traceback" not in told
    assert main(asked) == 0
    assert f"resuming from step {stopped[1]} of 12" in capsys.readouterr().err


def test_a_signal_at_the_last_step_does_not_make_a_finished_run_a_stopped_one(workplace, monkeypatch):
    monkeypatch.setattr(cli, "_print_record", stop_after(12))
    assert main(["train", "gpt2", "name=cli", "log_every=2", "sample_every=0"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("hears_hangups")
def test_a_run_whose_terminal_is_closed_writes_a_checkpoint(workplace):
    ours, theirs = pty.openpty()
    take = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"  # as its own
    command = [*COMMAND, "train", "gpt2", "name=cli", "log_every=1", "steps=100000", "save_every=100000"]
    run = subprocess.Popen(
        [sys.executable, "-c", take, *command], stdin=theirs, stdout=theirs, stderr=theirs, cwd=PROJECT,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        told = b""
        while b"step      3" not in told:
            told += os.read(ours, 4096)  # an error if the run ends before
        os.close(ours)
        assert run.wait(PATIENCE) == 129
    finally:
        run.kill()
    assert len(RunFolder(workplace / "runs" / "cli").checkpoints()) == 1


def test_an_interrupt_while_loading_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalm_utils.backbone.load_diffusion", interrupted)
    assert main(["sample", "tiny-diffugpt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


COMMAND = [sys.executable, "-m", "dalm_utils"]


@pytest.mark.parametrize("arguments, shown", [("--help", "exit status: 0 success"), ("status .", "step 0 of 12")])
def test_help_and_status_need_no_library_and_no_docstring(tmp_path, arguments, shown):
    (tmp_path / "config.json").write_text('{"total_steps": 12}')
    code = (
        "import sys\nfrom dalm_utils.__main__ import main\n"
        f"try: main({arguments.split()})\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-OO", "-c", code]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown in told.stdout, told
    loaded = set(told.stderr.split())
    assert "argparse" in loaded and not {"torch", "transformers", "numpy", "accelerate", "nbclient"} & loaded


def test_a_command_that_transformers_cannot_run_without_docstrings_is_one_line():
    command = [sys.executable, "-OO", "-m", "dalm_utils", "sample", "tiny-diffugpt"]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and told.stderr.endswith("without -OO\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments, unbuffered", [(["--help"], ""), (["status", "."], ""), (["status", "."], "1")])
def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path, arguments, unbuffered):
    (tmp_path / "config.json").write_text('{"total_steps": 12}')
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": unbuffered}
    told = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (told.returncode, told.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_one_line():
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        told = subprocess.run([*COMMAND, "--help"], cwd=PROJECT, env=environment, stdout=full, stderr=subprocess.PIPE)
    assert told.returncode == 1 and re.fullmatch(rb"error: the output cannot be written: .*\n", told.stderr)


def test_a_terminal_that_lacks_a_character_still_gets_the_text(tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sampling, "generate", lambda *_, **__: SimpleNamespace(text=["caf\xe9 \ufffd"]))
    monkeypatch.setattr("dalm_utils.backbone.load_diffusion", lambda *_, **__: (None, None))
    assert main(["sample", "model"]) == 0
    assert output.buffer.getvalue() == b"caf\\xe9 \\ufffd\n"


# ------------------------------------------------------------------------------------------------------- training
def test_a_machine_that_cannot_run_a_profile_is_an_error_before_any_download(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    loaded = []
    monkeypatch.setattr("dalm_utils.run.load_base", lambda *arguments, **_: loaded.append(arguments))
    assert main(["train", "gpt2", "--profile", "full"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err and not loaded


def test_a_finished_run_continues_with_more_steps(workplace, capsys):
    asked = ["train", "gpt2", "name=cli", "log_every=1", "sample_every=0", "warmup_steps=1", "anneal_steps=2"]
    assert main([*asked, "steps=3"]) == 0
    capsys.readouterr()
    assert main([*asked, "steps=6"]) == 0
    told = capsys.readouterr()
    assert "resuming from step 3 of 6" in told.err and re.findall(r"step +(\d+) ", told.out) == ["4", "5", "6"]
    assert main(["status", str(workplace / "runs" / "cli")]) == 0
    assert "step 6 of 6, finished" in capsys.readouterr().out


def test_training_continues_from_the_best_model_of_a_run_with_an_open_mask(workplace, capsys):
    asked = ["train", "gpt2", "log_every=1", "sample_every=0", "warmup_steps=1", "anneal_steps=2", "steps=3"]
    assert main([*asked, "name=first", "eval_every=3"]) == 0
    assert main([*asked, "name=second", f"base={workplace / 'runs' / 'first' / 'best'}"]) == 0
    first, second = (History.load(workplace / "runs" / name / "history.jsonl") for name in ("first", "second"))
    assert first.series("ratio")[1] == [0.5, 1, 1] and second.series("ratio")[1] == [1, 1, 1]
