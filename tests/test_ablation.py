import json

import numpy as np
import pytest

from dalm_utils import load_config
from dalm_utils.history import History
from dalm_utils.scripts import ablation
from tests.helpers import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def config(tmp_path):
    tiny_model(vocab=320, seed=7).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tiny_config(tmp_path, name="shift-tiny", base=str(tmp_path / "base"), steps=None)


@pytest.mark.slow
def test_a_plan_is_recorded_group_by_group_and_continued(tmp_path, config, monkeypatch):
    monkeypatch.setattr(ablation, "TEST_BLOCKS", 2)
    path = tmp_path / "recorded" / "shift-tiny.json"
    ablation.record(config, [(ablation.SQUARE, 12, 0)], path)
    first = json.loads(path.read_text())
    assert first["command"] == "python -m dalm_utils.scripts.ablation tiny" and first["ar_nll"] > 0
    assert all(len(run["documents"]) == 2 for run in first["runs"])
    assert all(run["sample"] for run in first["runs"])
    assert [run["arm"] for run in first["runs"]] == list(ablation.SQUARE)
    assert all(len(run["per_block"]) == 2 and run["tokens"] == 12 * 4 * 16 for run in first["runs"])
    history = ablation.Recorded(first, first["runs"]).history("no-shift")
    own = History.load(config.folder.with_name("shift-tiny-12-0-no-shift") / "history.jsonl")
    for key in ("loss", "nelbo", "nelbo_stderr"):
        assert history.series(key)[0] == own.series(key)[0]
        assert history.series(key)[1] == pytest.approx(own.series(key)[1], abs=1e-4)
    scores = [run["nelbo"] for run in first["runs"]]
    assert len(set(scores)) == len(scores), "two arms are the same"
    ablation.record(config, [(ablation.SQUARE, 12, 0), (ablation.PAIR, 12, 1)], path)
    second = json.loads(path.read_text())["runs"]
    assert second[:5] == first["runs"] and [run["seed"] for run in second[5:]] == [1, 1]


def test_stopped_before_the_first_record_it_says_how_to_go_on(tmp_path, config, monkeypatch):
    monkeypatch.setattr(ablation, "train_arms", lambda configs: {name: History() for name in configs})
    with pytest.raises(SystemExit, match="the same command continues"):
        ablation.record(config, [(ablation.PAIR, 12, 0)], tmp_path / "shift-tiny.json")


def test_a_budget_scales_the_schedule_with_the_run(config):
    small, large = (ablation.budget(config, steps, seed=0) for steps in (24, 240))
    for field in ("train_blocks", "anneal_steps", "warmup_steps", "eval_every", "save_every"):
        assert getattr(large, field) == 10 * getattr(small, field)
    assert small.name != large.name != ablation.budget(config, 240, seed=1).name


def test_effects_are_paired_by_seed_and_block():
    noise = np.random.default_rng(0).normal(size=(3, 50))
    runs = [
        {"arm": arm, "steps": 10, "seed": seed, "tokens": 640, "per_block": list(4 + noise[seed] + worse + 0.1 * seed)}
        for seed in (2, 0, 1)
        for arm, worse in (("shift", 0.0), ("no-shift", 0.5))
    ]
    recorded = ablation.Recorded({}, runs)
    assert recorded.effects("no-shift", "shift", 10) == pytest.approx([0.5, 0.5, 0.5])
    assert recorded.effect("no-shift", "shift", 10) == pytest.approx((0.5, 0.0), abs=1e-9)
    assert recorded.tokens(10) == 640
    assert [round(s.mean() - 4 - noise[i].mean(), 6) for i, s in enumerate(recorded.scores("shift", 10))] == [
        0,
        0.1,
        0.2,
    ]
    single = ablation.Recorded({}, [run for run in runs if run["seed"] == 0])
    single.runs[0]["per_block"][0] -= 5.0
    mean, error = single.effect("no-shift", "shift", 10)
    assert mean == pytest.approx(0.6) and error == pytest.approx(0.1)  # one block of fifty differs by five more
    for run in single.runs:
        run["documents"] = [0, *range(49)]  # the first two blocks are of one document
    assert single.effect("no-shift", "shift", 10)[1] == pytest.approx(0.098)


def test_the_shipped_records_are_whole():
    for path in ablation.RECORDED.glob("*.json"):
        recorded = ablation.load(path.stem)
        profile = path.stem.removeprefix("shift-")
        config = load_config("shift", profile)
        groups = [(arms, ablation.budget(config, steps, seed)) for arms, steps, seed in ablation.PLANS[profile]]
        expected = {(arm, group.train_blocks // group.batch, group.seed) for arms, group in groups for arm in arms}
        assert {(run["arm"], run["steps"], run["seed"]) for run in recorded.runs} == expected
        for run in recorded.runs:
            assert run["nelbo"] == pytest.approx(np.mean(run["per_block"]), abs=1e-3)


def test_a_record_keeps_numbers_in_a_line_and_texts_as_they_are():
    content = {"sample": "array([ 1,  2,  3])\n[  4]", "per_block": [1.5, -2.0]}
    written = ablation._as_json(content)
    assert json.loads(written) == content and '"per_block": [ 1.5, -2.0 ]' in written


def test_tokens_until_a_figure_is_reached():
    history = History(records=[{"tokens": 100 * i, "nelbo": value} for i, value in enumerate((8.0, 6.0, 5.0), 1)])
    assert history.tokens_until("nelbo", 7.0) == 150
    assert history.tokens_until("nelbo", 5.0) == 300
    assert history.tokens_until("nelbo", 9.0) == 100
    assert history.tokens_until("nelbo", 4.9) is None
