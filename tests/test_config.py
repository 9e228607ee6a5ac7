import dataclasses

import pytest

from dalm_utils import RunConfig, load_config, save_diffusion
from dalm_utils.config import PROFILES, PROJECT, cache_folder, field_table, parse_field, runs_folder
from dalm_utils.hubs import find
from tests.helpers import tiny_diffusion


def test_every_profile_makes_a_config():
    for notebook, profiles in PROFILES.items():
        for profile in profiles:
            assert load_config(notebook, profile).name == f"{notebook}-{profile}"


def test_the_full_profile_is_what_the_readme_says():
    config = load_config("gpt2", "full")
    assert (config.base, config.epochs, config.anneal_steps, config.precision) == ("gpt2", 10, 10_000, "fp16")
    assert (config.batch, config.learning_rate, config.length) == (8, 5e-5, 512)


def test_environment_and_overrides(monkeypatch):
    monkeypatch.setenv("DALM_PROFILE", "full")
    monkeypatch.setenv("DALM_BATCH", "4")
    monkeypatch.setenv("DALM_SHIFT", "false")
    monkeypatch.setenv("DALM_TRAIN_BLOCKS", "none")
    config = load_config("gpt2", batch=2)
    assert (config.base, config.batch, config.shift, config.train_blocks) == ("gpt2", 2, False, None)
    assert load_config("gpt2", "laptop").base == "tiny-gpt2"


def test_paths_start_at_the_project():
    assert RunConfig(name="x").folder == PROJECT / "checkpoints" / "runs" / "x"
    assert str(RunConfig(name="x", runs="/elsewhere").folder) == "/elsewhere/x"


def test_paths_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DALM_CACHE", "~/cache")
    monkeypatch.setenv("DALM_RUNS", "~/runs")
    assert (cache_folder(), runs_folder()) == (tmp_path / "cache", tmp_path / "runs")
    assert RunConfig(runs="~/runs", name="one").folder == tmp_path / "runs" / "one"
    save_diffusion(*tiny_diffusion(), tmp_path / "model")
    assert find("~/model", "auto", None) == tmp_path / "model"


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("DALM_CACHE", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere"
    load_config("gpt2", "laptop")  # the variable is no field of RunConfig, and no mistake either
    monkeypatch.delenv("DALM_CACHE")
    assert cache_folder() == PROJECT / "data" / "cache"


@pytest.mark.parametrize("variable", ["DALM_RUNS", "DALM_CACHE", "DALM_PROFILE", "DALM_STEPS"])
def test_an_empty_variable_counts_as_unset(monkeypatch, variable):
    monkeypatch.delenv(variable, raising=False)
    unset = load_config("gpt2"), cache_folder()
    monkeypatch.setenv(variable, "")
    assert (load_config("gpt2"), cache_folder()) == unset


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(learning_rat=1), "did you mean 'learning_rate'"),
        (dict(zzz=1), "the fields are name"),
        (dict(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
        (dict(batch=-1), "batch must be positive, got -1"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(anneal_steps=0), "anneal_steps must be positive"),
        (dict(batch="8"), "batch must be of type int, got '8'"),
        (dict(runs=""), "runs must name a folder"),
        (dict(shift=1), "shift must be of type bool"),
        (dict(batch=True), "batch must be of type int"),
        (dict(normalize="tokens"), "normalize must be one of maskable, masked"),
        (dict(dropout=1.5), r"dropout must be in \[0, 1\), got 1.5"),
        (dict(eps=0.0), "eps must be above 0"),
        (dict(length=1), "length must be at least 2"),
        (dict(learning_rate=float("nan")), "learning_rate must be positive, got nan"),
    ],
)
def test_bad_fields_are_named_with_a_remedy(bad, message):
    with pytest.raises(ValueError, match=message):
        load_config("gpt2", "laptop", **bad)


def test_unknown_profiles_and_variables(monkeypatch):
    with pytest.raises(ValueError, match="no profile named 'desktop'; choose one of laptop, real, full"):
        load_config("gpt2", "desktop")
    with pytest.raises(ValueError, match="no recipe named 'bert'"):
        load_config("bert")
    monkeypatch.setenv("DALM_STEPZ", "3")
    with pytest.raises(ValueError, match=r"DALM_STEPZ.*did you mean 'steps'"):
        load_config("gpt2", "laptop")
    monkeypatch.delenv("DALM_STEPZ")
    monkeypatch.setenv("DALM_STEPS", "many")
    with pytest.raises(ValueError, match="steps must be of type int, got 'many'"):
        load_config("gpt2", "laptop")


@pytest.mark.parametrize("name", ["", ".", "..", "../base/tiny-gpt2", "a/b", "/tmp/x", "a\\b"])
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name):
    with pytest.raises(ValueError, match="name must be the name of one folder inside of"):
        RunConfig(name=name)


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "weight_decay", "eps", "distill", "clip", "spike"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*, got {value}"):
        RunConfig(**{field: value})


def test_the_old_name_of_a_recipe_still_works():
    assert load_config(notebook="shift", profile="laptop") == load_config("shift", "laptop")


def test_the_table_of_fields_has_each_with_its_default_and_comment():
    lines = [line.strip() for line in field_table().splitlines()]
    for field in dataclasses.fields(RunConfig):
        (line,) = (line for line in lines if line.startswith(f"{field.name}="))
        written = line.removeprefix(f"{field.name}=").split("  ")[0].split(" ")[0]
        assert parse_field(field.name, written) == field.default and len(line.split(" ", 1)[1]) > 8
