"""The benchmarks run, at sizes that measure nothing, and the documents say what their records say."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import tests.benchmarks
from dalm_utils.config import PROJECT
from tests.benchmarks import cost, estimators, gpu, puzzles, recipe, sampling, train_step
from tests.helpers import tiny_diffusion, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("path", sorted(Path(tests.benchmarks.__path__[0]).glob("*.py")), ids=lambda path: path.stem)
def test_each_says_what_it_measures(path):
    assert importlib.import_module(f"tests.benchmarks.{path.stem}").__doc__


@pytest.mark.parametrize("way", train_step.WAYS)
def test_each_way_to_train_takes_a_step(way, monkeypatch):
    monkeypatch.setattr(train_step, "keep_memory", lambda: None)  # for the whole process
    step = train_step.stepper(way, "laptop", batch=2, length=16, vocab=64, accumulate=2)
    before = step.model.get_input_embeddings().weight.clone()
    step()
    assert step.work > 0 and not torch.equal(step.model.get_input_embeddings().weight, before)


def test_a_step_with_adapters_is_measured_too(monkeypatch):
    monkeypatch.setattr(train_step, "keep_memory", lambda: None)
    step = train_step.stepper("lora", "laptop", batch=2, length=16, vocab=64)
    trained = [name for name, weight in step.model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name or "mask_row" in name for name in trained) and trained
    step()


@pytest.mark.parametrize("name", estimators.WAYS)
def test_each_estimator_weighs_what_it_masks_to_one(name):
    masked, weights = estimators.WAYS[name](500, 4, 15, torch.Generator().manual_seed(0))
    each = len(masked) // 500
    assert masked.shape == (500 * each, 16) and not masked[:, 0].any()
    counted = (weights * masked.any(1)).view(500, each).mean(1)  # the estimate where every token costs one nat
    assert counted.mean() == pytest.approx(1, abs=0.1)


def test_the_plain_sampler_fills_all_positions():
    model, _ = tiny_diffusion()
    canvas = sampling.plain(model, length=12, steps=5, top_p=0.9)
    assert canvas.shape == (1, 13) and not (canvas == model.config.mask_token_id).any()


@pytest.mark.slow
def test_the_parts_of_the_sampling_benchmark_run(monkeypatch, capsys):
    model, tokenizer = tiny_diffusion()
    judge = tiny_model(vocab=len(tiny_tokenizer()))
    blocks = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))
    share, speedup = sampling.against_plain(*tiny_diffusion(), length=12, steps=5, rounds=1).values()
    assert 0 < share < 1 and speedup > 0
    assert sampling.cached_speedup("tiny", model, tokenizer, length=24, count=20, rounds=1, precision="fp32") > 0
    monkeypatch.setattr(sampling, "PROMPT", 8)
    tokens_per_pass = sampling.quality((model, tokenizer), judge, blocks, sampling.WAYS)
    assert all(value >= 1 for value in tokens_per_pass.values()) and list(tokens_per_pass) == list(sampling.WAYS)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(sampling.WAYS)


def test_the_table_of_all_trials_is_what_the_record_says():
    table = recipe.table(recipe.RESULTS.read_text().splitlines())
    assert table in (PROJECT / "tests" / "benchmarks" / "RECIPE.md").read_text()


def test_a_recipe_names_what_differs_from_the_plain_one():
    assert recipe.parse("") == recipe.PLAIN
    asked = recipe.parse("released batch=2 lr=5e-4 begin=bos warmup=0.1")
    assert asked == recipe.PLAIN | recipe.RELEASED | dict(batch=2, learning_rate=5e-4, begin="bos", warmup=0.1)


@pytest.mark.slow
def test_what_the_profile_full_would_take_is_what_the_results_say(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost"])
    cost.main()
    shown = re.findall(
        r"^\| \w+ \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| \d+ \| ([\d.]+) \|$", capsys.readouterr().out, re.M
    )
    rows = re.findall(
        r"^\| [123][^|]* \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|",
        (PROJECT / "tests" / "benchmarks" / "RESULTS.md").read_text(),
        re.M,
    )
    assert len(rows) == len(shown) == 3
    for ours, computed in zip(rows, shown, strict=True):
        assert ours[:4] == computed[:4] and float(ours[4]) == pytest.approx(float(computed[4]), abs=0.5)


def test_the_memory_of_adapters_is_what_the_results_say(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost"])
    cost.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [\w -]+ \| (no|rank 8) \|", line)]
    assert len(rows) == 4 and "\n".join(rows) in (PROJECT / "tests" / "benchmarks" / "RESULTS.md").read_text()


@pytest.mark.slow
def test_the_gpu_script_measures_every_part_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    """On a machine without a GPU, at sizes that measure nothing."""
    parts = ["step", "loop", "scoring", "smollm2"]  # the others are this test suite, and the notebooks
    monkeypatch.setattr(
        "sys.argv", ["gpu", "--tiny", "--minutes", "30", "--out", str(tmp_path / "out"), "--only", *parts]
    )
    gpu.main()
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert list(rows) == parts and not any("error" in row for part in rows.values() for row in part)
    assert {row["step"] for row in rows["step"]} >= {"ours", "plain", "ar"}
    assert all(row["exit"] == 0 for part in ("loop", "scoring") for row in rows[part])
    assert "### step" in (tmp_path / "out" / "gpu.md").read_text()


def test_the_gpu_script_never_writes_into_a_folder_in_use(tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is not empty"):
        gpu.main()


def test_a_part_that_fails_does_not_cost_the_others(tmp_path, monkeypatch):
    def broken(report, tiny):
        yield {"first": 1}
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "fine": lambda report, tiny: iter([{"value": 2.0}])})
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--out", str(tmp_path / "out")])
    gpu.main()
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert rows == {"broken": [{"first": 1}, {"error": "RuntimeError: the device is gone"}], "fine": [{"value": 2.0}]}


@pytest.mark.slow
def test_both_arms_of_the_puzzles_are_finetuned_and_asked(tmp_path):
    results = puzzles.measure(tmp_path, steps=2, count=40, givens=12, squares=3)
    assert list(results) == ["confidence", "first_hitting", "left to right"]
    assert all(len(which) == 3 and set(which) <= {0.0, 1.0} for which in results.values())
