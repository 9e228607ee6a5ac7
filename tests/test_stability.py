"""Faults are put into real runs, at the gradient or the weights; each run survives, says so, and ends well."""

import json
import os
import signal

import pytest
import torch

from dalm_utils import load_corpus, load_diffusion, nelbo, train, train_arms, training
from dalm_utils.history import History
from dalm_utils.stability import NORM_DECAY, Watch
from dalm_utils.step import TrainStep
from tests.helpers import stop_after, tiny_config, tiny_diffusion, tiny_tokenizer


class Fault:
    """Changes the gradient of the embedding in some backward passes, counted from 1."""

    def __init__(self, passes, change):
        self.passes, self.change, self.seen = passes, change, 0

    def strike(self, model):
        model.get_input_embeddings().weight.register_hook(self._hook)
        return model

    def _hook(self, grad):
        self.seen += 1
        return self.change(grad) if self.seen in self.passes else grad


def broken(grad):
    return grad * float("nan")


def events(history):
    return [record["event"] for record in history.records if "event" in record]


def inflated(model, at):
    """What blows the embedding up after step `at`, once."""

    def blow(history, config):
        if history.records[-1]["step"] == at and not events(history):
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1e3)

    return blow


def held_out(config):
    return load_corpus(config.text, tiny_tokenizer()).blocks("validation", config.length, config.eval_blocks)


def faulty(folder, fault, **changes):
    model, tokenizer = tiny_diffusion()
    settings = dict(steps=24, log_every=1, eval_every=12, save_every=4, max_skips=3)
    return model, train(fault.strike(model), tokenizer, tiny_config(folder, **{**settings, **changes}))


# ------------------------------------------------------------------------------------------------- judging
def test_watch_tells_usual_norms_from_spikes_and_from_nan():
    watch = Watch(spike=10, max_skips=2)
    verdicts = [bool(watch.judge(torch.tensor(norm))) for norm in (2.0, 4.0, 100.0, float("nan"), 3.0, float("inf"))]
    assert verdicts == [False, False, True, True, False, True]
    usual = 2.0 + NORM_DECAY * 2.0
    assert watch.state()["usual_norm"] == pytest.approx(usual + NORM_DECAY * (3.0 - usual))
    figures, trouble = watch.read(saturated=0, loss_scale=None)
    assert (figures["skipped"], figures["spikes"], figures["largest_norm"], trouble) == (3, 1, 100.0, None)
    watch.judge(torch.tensor(float("nan")))
    assert "2 steps in a row" in watch.read(saturated=0, loss_scale=None)[1]
    watch.judge(torch.tensor(3.0))
    assert watch.read(saturated=0, loss_scale=None)[1] is None  # it got over it by itself


@pytest.mark.parametrize(
    "saturated, scale, words",
    [(0, 0.5, "loss scale fell to 0.5"), (2, None, "2.0% of the predictions are saturated"), (1, 1.0, None)],
)
def test_watch_names_the_trouble(saturated, scale, words):
    watch = Watch(spike=None, max_skips=2)
    watch.count(torch.tensor(saturated), 100)
    figures, trouble = watch.read(saturated, scale)
    assert figures["saturated"] == saturated / 100
    assert trouble is None if words is None else words in trouble


def test_without_a_spike_limit_no_norm_is_a_spike():
    watch = Watch(spike=None, max_skips=2)
    assert not any(watch.judge(torch.tensor(norm)) for norm in (1.0, 1e9))
    assert "norm_limit" not in watch.read(0, None)[0]


# ------------------------------------------------------------------------------------------------ surviving
def test_a_saturated_model_is_no_checkpoint_to_go_back_to():
    watch = Watch(spike=None, max_skips=2)
    watch.count(torch.tensor(2), 100)
    assert not watch.is_calm(saturated=2) and watch.is_calm(saturated=1)
    watch.judge(torch.tensor(float("nan")))
    assert not watch.is_calm(saturated=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_back_and_ends_well(tmp_path, precision):
    fault = Fault(range(11, 16), broken)
    model, history = faulty(tmp_path, fault, precision=precision)
    assert events(history) == ["at step 13 (3 steps in a row were skipped): rolled back to step 8, learning rate x 0.5"]
    assert history.records[-1]["step"] == 24 and history.last("skipped") == 5  # two more passes were broken after it
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    clean = faulty(tmp_path, Fault((), broken), name="clean", precision=precision)[1]
    rates = [dict(zip(*run.series("lr"), strict=True)) for run in (history, clean)]
    assert rates[0][8] == rates[1][8] and rates[0][20] == rates[1][20] / 2
    steps = history.series("loss")[0]
    assert steps == sorted(set(steps))  # what was undone is not in the history
    assert history.last("nelbo") < history.series("nelbo")[1][0]


def test_an_fp16_run_whose_scale_collapses_goes_back(tmp_path, fp16):
    fault = Fault(range(31, 60), broken)  # the scale has found its level by then
    model, history = faulty(tmp_path, fault, steps=48, save_every=12, eval_every=24, max_skips=40)
    assert len(events(history)) == 1 and "the loss scale fell to 0.5): rolled back to step" in events(history)[0]
    assert history.records[-1]["step"] == 48 and history.last("loss_scale") > 1
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize("spike, skipped", [(10.0, 1), (None, 0)])
def test_a_spike_is_skipped_if_asked(tmp_path, spike, skipped):
    _, history = faulty(tmp_path, Fault([15], lambda grad: grad * 1e4), spike=spike)
    assert (history.last("skipped"), history.last("spikes")) == (skipped, skipped)
    norms = dict(zip(*history.series("largest_norm"), strict=True))
    assert norms[15] > 100 * norms[14]


def test_an_fp16_spike_does_not_lower_the_loss_scale(tmp_path, fp16):
    _, history = faulty(tmp_path, Fault([30], lambda grad: grad * 1e3), steps=32, spike=20.0, max_skips=40)
    scales = dict(zip(*history.series("loss_scale"), strict=True))
    assert history.last("spikes") == 1 and scales[30] == scales[29]


def test_saturated_logits_send_a_run_back(tmp_path):
    model, tokenizer = tiny_diffusion()
    config = tiny_config(tmp_path, steps=16, log_every=1, save_every=4)
    history = train(model, tokenizer, config, on_log=inflated(model, at=10))
    assert len(events(history)) == 1 and "predictions are saturated" in events(history)[0]
    assert "back to step 8" in events(history)[0] and history.last("saturated") == 0


def test_between_two_records_too_a_saturated_model_is_not_saved(tmp_path):
    model, tokenizer = tiny_diffusion()
    config = tiny_config(tmp_path, steps=20, log_every=5, save_every=4)
    history = train(model, tokenizer, config, on_log=inflated(model, at=10))  # step 12 is not saved, step 15 finds out
    assert len(events(history)) == 1 and "at step 15" in events(history)[0] and "back to step 8" in events(history)[0]


def test_the_best_model_stays_the_best_when_a_run_goes_back(tmp_path):
    def spoil(history, config):
        last = history.records[-1]
        if last["step"] == 10 and "nelbo" in last:
            seen.append(last["nelbo"])
        factor = 1e3 if last["step"] == 11 and not events(history) else 3 if "event" in last else 1
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(factor)

    seen, (model, tokenizer) = [], tiny_diffusion()
    config = tiny_config(tmp_path, steps=12, log_every=1, eval_every=10, save_every=8)
    history = train(model, tokenizer, config, on_log=spoil)
    assert "back to step 8" in events(history)[0] and seen[0] < seen[1]  # it never gets as far again
    state = json.loads((config.folder / "step-000012" / "state.json").read_text())
    assert state["best"] == seen[0]
    best = nelbo(*load_diffusion(config.folder / "best"), held_out(config), num_samples=2, precision="fp32")
    assert best.mean == pytest.approx(seen[0], rel=1e-6)


def test_an_arm_that_goes_back_gives_the_history_it_ends_with(tmp_path, monkeypatch):
    shaky, tokenizer = tiny_diffusion()
    models = iter([tiny_diffusion(), (Fault(range(11, 16), broken).strike(shaky), tokenizer)])
    monkeypatch.setattr(training, "build", lambda config, **_: next(models))
    config = tiny_config(tmp_path, steps=24, log_every=1, eval_every=12, save_every=4, max_skips=3)
    drawn = []
    histories = train_arms(
        {"calm": config, "shaky": config},
        on_log=lambda now: drawn.append({name: history.last("step") for name, history in now.items()}),
    )
    assert len(events(histories["shaky"])) == 1 and histories["shaky"].last("step") == 24
    assert drawn[-1] == {"calm": 24, "shaky": 24}


@pytest.mark.slow
def test_a_continued_run_remembers_that_it_went_back(tmp_path):
    fault = Fault(range(11, 16), broken)
    expected, whole = faulty(tmp_path, fault, name="whole")
    fault.seen = 0
    model, tokenizer = tiny_diffusion()
    config = tiny_config(tmp_path, steps=24, log_every=1, eval_every=12, save_every=4, max_skips=3)
    train(fault.strike(model), tokenizer, config, on_log=stop_after(18))
    again, _ = tiny_diffusion(seed=5)
    history = train(again, tokenizer, config)
    assert events(history) == events(whole) and history.series("lr") == whole.series("lr")
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in again.state_dict().items())


# ------------------------------------------------------------------------------------------------ giving up
def test_a_run_that_stays_unstable_is_given_up_and_its_checkpoint_stays(tmp_path):
    with pytest.raises(RuntimeError, match=r"after 3 rollbacks, 3 steps in a row.*a lower learning_rate"):
        faulty(tmp_path, Fault(range(7, 1000), broken))
    folder = tiny_config(tmp_path).folder
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004"]
    assert all(torch.isfinite(w).all() for w in load_diffusion(folder / "step-000004")[0].parameters())
    _, history = faulty(tmp_path, Fault((), broken))  # the folder is free, and the run goes on from there
    assert history.records[-1]["step"] == 24


def test_when_an_arm_is_given_up_the_others_are_saved(tmp_path, monkeypatch):
    shaky, tokenizer = tiny_diffusion()
    models = [tiny_diffusion(), (Fault(range(7, 1000), broken).strike(shaky), tokenizer), tiny_diffusion()]
    monkeypatch.setattr(training, "build", lambda config, **_: models.pop(0))
    settings = dict(steps=24, log_every=1, eval_every=12, save_every=5, max_skips=3)
    configs = {name: tiny_config(tmp_path, **settings) for name in ("before", "shaky", "after")}
    with pytest.raises(RuntimeError, match="after 3 rollbacks"):
        train_arms(configs)
    runs = tiny_config(tmp_path).folder.parent
    taken = {name: History.load(runs / f"tiny-{name}" / "history.jsonl").last("step") for name in ("before", "after")}
    assert taken == {"before": 18, "after": 17}
    for name, step in taken.items():
        assert (runs / f"tiny-{name}" / f"step-{step:06d}").is_dir()
    assert [path.name for path in (runs / "tiny-shaky").glob("step-*")] == ["step-000005"]


def test_trouble_before_the_first_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"before the first checkpoint.*a smaller save_every"):
        faulty(tmp_path, Fault(range(1, 9), broken), save_every=20)


# ------------------------------------------------------------------------------------------------- patience
@pytest.mark.slow
def test_a_run_ends_when_the_nelbo_no_longer_falls_and_keeps_the_best(tmp_path):
    config = tiny_config(tmp_path, steps=60, eval_every=2, learning_rate=0.5, patience=3)  # far too fast: it gets worse
    history = train(*tiny_diffusion(), config)
    steps, scores = history.series("nelbo")
    best = scores.index(min(scores))
    assert steps[-1] < 60 and len(scores) - 1 - best == 3
    assert events(history) == ["finished: no better NELBO in 3 evaluations"]
    assert json.loads((config.folder / f"step-{steps[-1]:06d}" / "state.json").read_text())["best"] == min(scores)
    assert train(*tiny_diffusion(), config).records == history.records  # a finished run is not continued
    assert train(*tiny_diffusion(), config.replace(patience=100)).records[-1]["step"] == 60  # unless more is asked


# ------------------------------------------------------------------------------- faults between two records
class Strike:
    """Multiplies the weights of the head by a factor once, right after the optimizer took a given step."""

    def __init__(self, monkeypatch, step, then=None, factor=1e3):
        self.step, self.then, self.factor, self.struck = step, then, factor, False
        take = TrainStep.__call__
        monkeypatch.setattr(TrainStep, "__call__", lambda *arguments: self._take(take, *arguments))

    def _take(self, take, train_step, step, *rates):
        norm = take(train_step, step, *rates)
        if step + 1 == self.step and not self.struck:
            self.struck = True
            with torch.no_grad():
                train_step.model.get_output_embeddings().weight.mul_(self.factor)
            if self.then is not None:
                os.kill(os.getpid(), self.then)
        return norm


SPARSE = dict(steps=30, log_every=10, save_every=4, eval_every=30)


@pytest.mark.slow
@pytest.mark.parametrize("step", [9, 11, 12, 13, 15, 16, 20, 29, 30])
def test_a_run_recovers_wherever_its_weights_break(tmp_path, monkeypatch, step):
    """Also directly before a checkpoint, where no step has used the weights yet, and at the end."""
    Strike(monkeypatch, step)
    model, tokenizer = tiny_diffusion()
    history = train(model, tokenizer, tiny_config(tmp_path, **SPARSE))
    assert len(events(history)) == 1 and history.records[-1]["step"] == 30
    back = int(events(history)[0].split("rolled back to step ")[1].split(",")[0])
    assert back == 4 * ((step - 1) // 4)
    for folder in tiny_config(tmp_path).folder.glob("step-*"):
        score = nelbo(*load_diffusion(folder), held_out(tiny_config(tmp_path)), num_samples=2, precision="fp32")
        assert score.mean < 10


def test_a_run_recovers_although_a_sample_of_broken_weights_is_due_first(tmp_path, monkeypatch, capsys):
    Strike(monkeypatch, step=11, factor=float("nan"))
    history = train(*tiny_diffusion(), tiny_config(tmp_path, **SPARSE, sample_every=5))
    assert len(events(history)) == 1 and "rolled back to step 8" in events(history)[0]
    assert history.series("sample")[0] == [5, 10, 15, 20, 25, 30]
    assert "no sample at step 15: the model's logits are not finite" in capsys.readouterr().err


def test_the_weights_of_the_last_step_are_checked_once(tmp_path, monkeypatch):
    checked, check = [], TrainStep.trouble_ahead
    monkeypatch.setattr(TrainStep, "trouble_ahead", lambda self, step: checked.append(step) or check(self, step))
    train(*tiny_diffusion(), tiny_config(tmp_path, steps=12, save_every=4))
    assert checked == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_right_after_its_weights_broke_keeps_its_good_checkpoint(tmp_path, monkeypatch, capsys, number):
    Strike(monkeypatch, step=11, then=number)
    config = tiny_config(tmp_path, **SPARSE)
    train(*tiny_diffusion(), config)
    assert "step 11 of 'tiny' was not saved, since its weights are unusable" in capsys.readouterr().err
    assert sorted(path.name for path in config.folder.glob("step-*")) == ["step-000004", "step-000008"]
    assert train(*tiny_diffusion(), config).records[-1]["step"] == 30  # from step 8 on


@pytest.mark.slow
def test_a_run_stopped_right_after_a_rollback_remembers_it(tmp_path):
    def settings(name):
        return tiny_config(tmp_path, name=name, steps=24, log_every=1, eval_every=12, save_every=4, max_skips=3)

    def stop_at_event(history, config):
        if "event" in history.records[-1]:
            os.kill(os.getpid(), signal.SIGINT)

    fault = Fault(range(11, 14), broken)
    expected = train(fault.strike(tiny_diffusion()[0]), tiny_tokenizer_with_mask(), settings("whole"))
    fault.seen = 0
    stopped = train(
        fault.strike(tiny_diffusion()[0]), tiny_tokenizer_with_mask(), settings("parts"), on_log=stop_at_event
    )
    assert stopped.records[-1]["step"] == 8 and events(stopped) == events(expected)
    history = train(*tiny_diffusion(seed=5), settings("parts"))
    assert events(history) == events(expected) and history.series("lr") == expected.series("lr")
    assert history.last("nelbo") == expected.last("nelbo")


def tiny_tokenizer_with_mask():
    return tiny_diffusion()[1]


@pytest.mark.parametrize("rate, steps", [(1e38, 8), (1e38, 2), (1e20, 30)])
def test_a_run_that_became_nan_ends_with_an_error(tmp_path, rate, steps):
    with pytest.raises(RuntimeError, match=r"unstable: at step \d+, .*(not finite|skipped|saturated)"):
        train(*tiny_diffusion(), tiny_config(tmp_path, learning_rate=rate, steps=steps))
    assert not list(tiny_config(tmp_path).folder.glob("step-*"))


def test_a_run_in_which_every_step_was_skipped_ends_with_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="before the first checkpoint, every step was skipped"):
        faulty(tmp_path, Fault(range(1, 9), broken), steps=8, max_skips=25)
