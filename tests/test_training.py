import itertools
import json
import os
import re
import signal

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM

from dalm_utils import (
    as_diffusion,
    build,
    checkpoint,
    diffusion_loss,
    load_base,
    load_diffusion,
    nelbo,
    save_diffusion,
    step,
    train,
    train_arms,
    training,
)
from dalm_utils.annealing import anneal_ratio
from dalm_utils.objective import batch_loss, hidden_states, sample_times, seeded
from dalm_utils.run import learning_rate
from dalm_utils.step import _set_dropout
from tests.helpers import (
    FAMILIES,
    comparable,
    opened,
    stop_after,
    tiny_base,
    tiny_config,
    tiny_diffusion,
    tiny_model,
    tiny_tokenizer,
)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_lowers_loss_and_nelbo_and_leaves_what_it_promises(tmp_path):
    config = tiny_config(tmp_path, steps=60, eval_every=20, learning_rate=1e-2, sample_every=30)
    model, tokenizer = tiny_diffusion()
    history = train(model, tokenizer, config)
    assert history.window("loss", 50, 61) < 0.8 * history.window("loss", 1, 11)
    steps, nelbos = history.series("nelbo")
    assert steps == [0, 20, 40, 60] and nelbos[-1] < nelbos[1] < nelbos[0]
    assert history.last("ratio") == 1.0 and len(history.last("sample")) > 0
    assert [json.loads(line) for line in (config.folder / "history.jsonl").read_text().splitlines()] == history.records
    assert sorted(p.name for p in config.folder.iterdir()) == [
        "best", "config.json", "history.jsonl", "step-000056", "step-000060",
    ]  # fmt: skip
    best, _ = load_diffusion(config.folder / "best")
    held_out = torch.randint(1, 300, (2, 16))
    held_out[:, 0] = 0
    again, now = (nelbo(m, tokenizer, held_out, precision="fp32").mean for m in (best, model))
    assert again == pytest.approx(now, rel=1e-5)  # the last evaluation was the best


@pytest.mark.slow
def test_progress_is_drawn_by_the_second_and_not_by_the_step(tmp_path, capsys, monkeypatch):
    def drawings(seconds_between_looks):
        clock = itertools.count(0, seconds_between_looks)
        monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
        train(*tiny_diffusion(), tiny_config(tmp_path, steps=100, eval_every=100, save_every=100), resume="never")
        shown = capsys.readouterr().err
        assert "100/100" in shown and "nelbo=" in shown  # the last drawing has all
        return len(re.findall(r"\d/100 ", shown))

    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # a thread that draws by the clock of the machine
    assert drawings(0) <= 4 and drawings(2) >= 100


@pytest.mark.parametrize("objective, shown", [("diffusion", "nelbo="), ("ar", "nll=")])
def test_the_bar_shows_the_held_out_score(tmp_path, capsys, objective, shown):
    model, tokenizer = tiny_diffusion() if objective == "diffusion" else load_base(tiny_base(tmp_path))
    train(model, tokenizer, tiny_config(tmp_path, objective=objective))
    last = capsys.readouterr().err.split("\r")[-1]
    assert "12/12" in last and "loss=" in last and shown in last


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_batch_is_split(tmp_path):
    histories = []
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        model, tokenizer = tiny_diffusion()
        config = tiny_config(
            tmp_path, name=f"split-{batch}", batch=batch, accumulate=accumulate, base=tiny_base(tmp_path), distill=4.0
        )
        histories.append(comparable(train(model, tokenizer, config)))
    for records in histories[1:]:
        for ours, whole in zip(records, histories[0], strict=True):
            assert ours.keys() == whole.keys()
            for key, tolerance in {"loss": 1e-5, "grad_norm": 1e-4, "nelbo": 1e-4}.items():
                assert ours.get(key, 0) == pytest.approx(whole.get(key, 0), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stop, precision", [(4, "fp32"), (6, "fp32"), (6, "bf16")])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, stop, precision):
    config = tiny_config(
        tmp_path, name="parts", dropout=0.1, precision=precision, base=tiny_base(tmp_path), distill=4.0
    )
    whole, tokenizer = tiny_diffusion()
    expected = train(whole, tokenizer, config.replace(name="whole"))
    first = train(*tiny_diffusion(), config, on_log=stop_after(stop))
    assert first.records[-1]["step"] == stop
    model, tokenizer = tiny_diffusion(seed=9)  # its weights are replaced by the checkpoint's
    history = train(model, tokenizer, config)
    assert comparable(history) == comparable(expected)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    shown = []
    finished = train(*tiny_diffusion(), config, on_log=lambda history, config: shown.append(history))
    assert comparable(finished) == comparable(expected) and shown == [finished]  # nothing to do but to show its curve


def test_a_mixture_of_experts_resumes_and_rolls_back(tmp_path):
    """Published checkpoints name its weights otherwise than the module does."""

    def mixture(seed=0):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.3,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return as_diffusion(MixtralForCausalLM(config), tokenizer)

    config = tiny_config(tmp_path, name="parts")
    whole, tokenizer = mixture()
    expected = train(whole, tokenizer, config.replace(name="whole"))
    train(*mixture(), config, on_log=stop_after(6))
    model, _ = mixture(seed=9)
    assert comparable(train(model, tokenizer, config)) == comparable(expected)
    with safe_open(config.folder / "best" / "model.safetensors", "pt") as file:
        assert any("block_sparse_moe.experts.0" in name for name in file.keys())  # noqa: SIM118  # no mapping
    best = load_diffusion(config.folder / "best")[0].state_dict()
    assert all(
        torch.equal(best[name], weight)
        for name, weight in load_diffusion(config.folder / "step-000012")[0].state_dict().items()
    )
    with opened(*mixture(), config.replace(name="back")) as run:
        run.save()
        before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
        run.advance()
        run._roll_back("of this test")
        assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_an_error_while_reporting_costs_no_step(tmp_path):
    config = tiny_config(tmp_path, name="parts", save_every=12)
    expected = train(*tiny_diffusion(), config.replace(name="whole"))

    def fail(history, config):
        if history.last("step") == 6:
            raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError):
        train(*tiny_diffusion(), config, on_log=fail)
    assert (config.folder / "step-000006").is_dir()
    assert comparable(train(*tiny_diffusion(), config)) == comparable(expected)


def test_an_error_while_reporting_on_a_full_disk_says_both(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, save_every=12)

    def fail(history, config):
        if history.last("step") == 6:
            monkeypatch.setattr(checkpoint, "write_whole", full)
            raise BrokenPipeError("nobody reads this")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match=r"at step 6, could not be written\. Make room") as caught:
        train(*tiny_diffusion(), config, on_log=fail)
    assert isinstance(caught.value.__context__, BrokenPipeError)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_process_ignores_is_not_heard(tmp_path, kind):
    before = signal.signal(kind, signal.SIG_IGN)  # as of a command in the background of a script, or under nohup
    try:
        history = train(*tiny_diffusion(), tiny_config(tmp_path), on_log=stop_after(6, kind))
        assert history.last("step") == 12 and signal.getsignal(kind) is signal.SIG_IGN
    finally:
        signal.signal(kind, before)


@pytest.mark.parametrize(("over", "shares"), [(None, [4 / 5, 3 / 4, 2 / 3, 1 / 2]), (2, [4 / 5, 2 / 3, 0, 0])])
def test_the_teacher_fades_and_a_model_from_scratch_has_none(tmp_path, monkeypatch, over, shares):
    asked = []

    def watched(*arguments, teacher, teacher_weight, **options):
        if torch.is_grad_enabled():
            asked.append((teacher, teacher_weight.item()))
        return batch_loss(*arguments, teacher=teacher, teacher_weight=teacher_weight, **options)

    monkeypatch.setattr(step, "batch_loss", watched)
    config = tiny_config(tmp_path, steps=4, base=tiny_base(tmp_path), distill=4.0, distill_steps=over)
    model, tokenizer = build(config)
    train(model, tokenizer, config)
    assert [share for _, share in asked] == pytest.approx(shares)
    base, teacher = load_base(config.base)[0], asked[0][0]
    assert teacher is not model and all(map(torch.equal, teacher.parameters(), base.parameters()))
    assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())
    train(*build(config.replace(scratch=True)), config.replace(name="scratch", scratch=True))
    assert asked[-1] == (None, 0.0)


def test_a_resumed_run_keeps_the_weight_that_was_fitted_to_its_text(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, base=tiny_base(tmp_path), distill=4.0, distill_fit=True)
    monkeypatch.setattr("dalm_utils.run.fit_distill", lambda teacher, train, held_out, largest: largest / 8)
    with opened(*tiny_diffusion(), config) as run:
        assert run.distill == 0.5 and run._teacher_weight() == pytest.approx(1 / 3)
        assert "distill lowered from 4 to 0.5" in capsys.readouterr().err
        run.step = 3
        run.save()
    monkeypatch.setattr("dalm_utils.run.fit_distill", lambda *_: pytest.fail("it was chosen before"))
    with opened(*tiny_diffusion(), config) as run:
        assert run.distill == 0.5


def test_one_process_fits_the_weight_for_all(tmp_path, monkeypatch):
    """Rounding differs between kinds of GPU; a weight that each fitted for itself could differ."""
    where = ["everywhere"]

    def on_main(accelerator, do):
        where.append("on main")
        try:
            return do()
        finally:
            where.pop()

    monkeypatch.setattr("dalm_utils.run.on_main", on_main)
    monkeypatch.setattr("dalm_utils.run.fit_distill", lambda *_: {"on main": 0.5}[where[-1]])
    config = tiny_config(tmp_path, base=tiny_base(tmp_path), distill=4.0, distill_fit=True)
    with opened(*tiny_diffusion(), config) as run:
        assert run.distill == 0.5


def test_a_random_teacher_is_not_imitated(tmp_path, capsys):
    config = tiny_config(tmp_path, base=tiny_base(tmp_path), distill=4.0, distill_fit=True)
    with opened(*tiny_diffusion(), config) as run:
        assert run.distill < 0.1
    assert "little better than token frequencies" in capsys.readouterr().err


def test_a_teacher_with_other_tokens_or_a_mask_is_refused(tmp_path):
    config = tiny_config(tmp_path, base="tiny-gpt2", distill=4.0)
    with pytest.raises(
        ValueError, match=r"distill=4\.0 needs the AR model.*base='tiny-gpt2'.*set `base`, or distill=0"
    ):
        train(*tiny_diffusion(), config)
    save_diffusion(*tiny_diffusion(), tmp_path / "diffusion")
    with pytest.raises(ValueError, match="is a diffusion model or has other tokens"):
        train(*tiny_diffusion(), config.replace(base=str(tmp_path / "diffusion")))


def test_a_finished_or_other_run_is_not_overwritten(tmp_path):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 then, 0\.5 now.*resume='never'"):
        train(*tiny_diffusion(), config.replace(learning_rate=0.5))
    train(*tiny_diffusion(), config.replace(learning_rate=0.001), resume="never")
    old = config.folder.with_name("tiny.old1")
    assert json.loads((old / "config.json").read_text())["learning_rate"] == 0.003
    assert json.loads((config.folder / "config.json").read_text())["learning_rate"] == 0.001


def test_arms_are_paired_and_each_equals_training_alone(tmp_path):
    config = tiny_config(tmp_path, base=tiny_base(tmp_path))
    shown = []
    arms = train_arms(
        {"shift": config, "plain": config.replace(shift=False)},
        on_log=lambda histories: shown.append([history.last("step") for history in histories.values()]),
    )
    assert shown == [[step, step] for step in (2, 4, 6, 8, 10, 12)]  # once, when every arm has taken the step
    alone = train(*as_diffusion(*load_base(config.base)), config.replace(name="alone"))
    assert comparable(arms["shift"]) == comparable(alone)
    assert arms["plain"].last("loss") != arms["shift"].last("loss")


def test_arms_draw_the_same_batches_times_masks_and_annealing(tmp_path):
    config = tiny_config(tmp_path)
    plain = config.replace(name="other", shift=False)
    seen = []
    with opened(*tiny_diffusion(), config) as one, opened(*tiny_diffusion(shift=False, seed=5), plain) as other:
        for one.step in range(4):
            other.step = one.step
            batch, twin = one.task.draw(one.step), other.task.draw(one.step)
            assert all(torch.equal(tensor, twin.tensors()[name]) for name, tensor in batch.tensors().items())
            masks = [task.attention_mask(one.step, torch.float32) for task in (one.task, other.task)]
            assert torch.equal(*masks)
            seen.append(batch.noised)
    assert not torch.equal(seen[0], seen[1])  # and they differ from step to step


@pytest.mark.parametrize("times", ["stratified", "uniform"])
@pytest.mark.parametrize("normalize", ["maskable", "masked"])
def test_a_step_minimises_the_loss_that_was_asked_for(tmp_path, times, normalize):
    model, tokenizer = tiny_diffusion()
    config = tiny_config(tmp_path, times=times, normalize=normalize, eps=0.3, steps=1, log_every=1)
    with opened(model, tokenizer, config.replace(name="look")) as look:
        batch, mask = look.task.draw(0), look.task.attention_mask(0, torch.float32)
    tokens, noised, masked = batch.tokens, batch.noised, batch.noised == model.config.mask_token_id
    drawn = sample_times(4, method=times, eps=0.3, generator=seeded(0, 0, "times"))
    assert torch.equal(batch.weights, 1 / drawn[masked.nonzero()[:, 0]])
    expected = diffusion_loss(model, tokens, noised, masked, drawn, attention_mask=mask, normalize=normalize)
    assert train(model, tokenizer, config).last("loss") == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_optimizer_is_the_one_that_was_asked_for(tmp_path):
    config = tiny_config(tmp_path, weight_decay=0.3, beta2=0.9, warmup_steps=4, clip=1e-3)
    with opened(*tiny_diffusion(), config) as run:
        adamw = run.train_step.adamw
        matrices, vectors = adamw.param_groups
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
        dims = [[weight.dim() for weight in group["params"]] for group in (matrices, vectors)]
        assert [set(group) for group in dims] == [{2}, {1}]
        assert sum(map(len, dims)) == len(list(run.model.parameters()))
        run.advance()
        for group in (matrices, vectors):
            assert group["betas"] == (0.9, 0.9) and group["lr"] == learning_rate(config, 0, 12) == 3e-3 / 4
        moments = torch.cat([state["exp_avg"].flatten() for state in adamw.state.values()])
        assert moments.norm().item() == pytest.approx(0.1 * config.clip, rel=1e-2)  # a tenth of the clipped gradient


def test_the_mask_opens_as_the_run_goes_on(tmp_path):
    ahead = torch.ones(16, 16, dtype=torch.bool).triu(1)  # 120 edges
    with opened(*tiny_diffusion(), tiny_config(tmp_path, anneal_steps=6)) as run:
        for run.step in range(5):
            mask = run.task.attention_mask(run.step, torch.float32)[0, 0]
            assert (mask[~ahead] == 0).all()
            assert (mask[ahead] == 0).double().mean() == pytest.approx(anneal_ratio(run.step, 6), abs=0.1)
        run.step = 5
        assert anneal_ratio(5, 6) == 1 and run.task.attention_mask(5, torch.float32) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_what_the_config_says_whatever_it_was(tmp_path, family):
    model, tokenizer = tiny_diffusion(family)
    tokens = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    for share in (0.5, 0.0):
        with opened(model, tokenizer, tiny_config(tmp_path, name=f"dropout-{share}", dropout=share)):
            once, again = (hidden_states(model.train(), tokens) for _ in range(2))
        assert torch.equal(once, again) == (share == 0)


def test_dropout_is_set_whatever_a_layer_calls_it():
    layer = torch.nn.Module()
    layer.residual_dropout, layer.attn_pdrop, layer.layerdrop, layer.inner = 0, 0.1, 0.1, torch.nn.Dropout(0.1)
    layer.is_dropped = True
    _set_dropout(layer, 0.2)
    assert (layer.residual_dropout, layer.attn_pdrop, layer.layerdrop, layer.inner.p) == (0.2, 0.2, 0.1, 0.2)
    assert layer.is_dropped is True


def test_the_ar_objective_is_the_next_token_loss(tmp_path):
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    config = tiny_config(tmp_path, objective="ar", steps=1, log_every=1)
    with opened(model, tokenizer, config.replace(name="look")) as look:
        tokens = look.task.draw(0).tokens
    own = model(tokens, labels=tokens).loss.item()
    history = train(model, tokenizer, config)
    assert history.last("loss") == pytest.approx(own, rel=1e-5)
    assert history.last("nll") > 0 and history.last("nelbo") is None


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    model, tokenizer = tiny_diffusion()
    before = weights(model)
    bad = model.get_input_embeddings().weight.register_hook(lambda grad: grad * float("nan"))
    with opened(model, tokenizer, tiny_config(tmp_path, steps=4, log_every=1)) as run:
        run.advance()
        run.advance()
        history = run.history
    bad.remove()
    assert history.last("skipped") == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fp16_skips_a_step_that_overflows_and_lowers_its_scale(tmp_path, fp16):
    model, tokenizer = tiny_diffusion()
    before = weights(model)
    config = tiny_config(tmp_path, steps=20, log_every=1, eval_every=20)
    history = train(model, tokenizer, config)
    assert 0 < history.last("skipped") < 15  # the first scale is far too large: skip, halve, until steps are taken
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    state = json.loads((config.folder / "step-000020" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (28 - history.last("skipped"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 11])  # while the scale still falls, and after
def test_an_interrupted_fp16_run_keeps_its_loss_scale(tmp_path, fp16, stop):
    whole, tokenizer = tiny_diffusion()
    expected = train(whole, tokenizer, tiny_config(tmp_path, name="whole", steps=20, log_every=1))
    config = tiny_config(tmp_path, name="parts", steps=20, log_every=1)
    train(*tiny_diffusion(), config, on_log=stop_after(stop))
    model, tokenizer = tiny_diffusion(seed=9)
    assert comparable(train(model, tokenizer, config)) == comparable(expected)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_every_block_is_seen_once_in_an_epoch(tmp_path):
    config = tiny_config(tmp_path, steps=None, epochs=2)
    with opened(*tiny_diffusion(), config) as run:
        count = len(run.task.train)
        assert run.total == -(-2 * count // 4)
        first, second = ([run.task._block_at(e * count + i) for i in range(count)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count)) and first != second


def test_learning_rate_warms_up_and_falls_to_its_end(tmp_path):
    config = tiny_config(tmp_path, learning_rate=1.0, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[20] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(length=100), "more than the model's 64 positions"),
        (dict(shift=False), "made with shift=True"),
        (dict(precision="fp16"), "needs CUDA"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(*tiny_diffusion(), tiny_config(tmp_path, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_which_small_steps_are_lost_are_refused(tmp_path, dtype):
    model, tokenizer = tiny_diffusion()
    with pytest.raises(ValueError, match=rf"weights are in {dtype}, .*load them with dtype=torch.float32"):
        train(model.to(dtype), tokenizer, tiny_config(tmp_path))


def test_blocks_longer_than_the_attention_window_are_refused(tmp_path):
    model, tokenizer = tiny_diffusion("llama")
    model.config.sliding_window = 12
    with pytest.raises(ValueError, match="length 16 is more than this model's attention window of 12"):
        train(model, tokenizer, tiny_config(tmp_path))


def test_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \[MASK\] token"):
        train(tiny_model(vocab=320), tiny_tokenizer(), tiny_config(tmp_path))
    with pytest.raises(ValueError, match="do not belong together"):
        train(tiny_model(vocab=61), tiny_tokenizer(), tiny_config(tmp_path, objective="ar"))
    with pytest.raises(ValueError, match="needs an AR model"):
        train(*tiny_diffusion(), tiny_config(tmp_path, objective="ar"))
    model, tokenizer = tiny_diffusion()
    del model.config.shift  # as in a diffusion model of others: it is taken as shifted
    with pytest.raises(ValueError, match="made with shift=True, the config says shift=False"):
        train(model, tokenizer, tiny_config(tmp_path, shift=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        train(*tiny_diffusion(), tiny_config(tmp_path, device="cuda"))


@pytest.mark.slow
def test_compiled_and_checkpointed_blocks_give_the_same_curve(tmp_path):
    def watched(**changes):
        model, tokenizer = tiny_diffusion()
        passes = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda mlp, _: passes.append(1) if mlp.training else None)
        return train(model, tokenizer, tiny_config(tmp_path, **changes)), len(passes)

    plain, once = watched(name="plain")
    checkpointed, twice = watched(name="checkpointed", gradient_checkpointing=True)
    assert (once, twice) == (12, 24)  # what was not kept is computed again
    assert checkpointed.last("loss") == pytest.approx(plain.last("loss"), rel=1e-5)

    def count(history, config):
        graphs[history.last("step")] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    graphs = {}
    torch._dynamo.reset()
    compiled = train(*tiny_diffusion(), tiny_config(tmp_path, name="compiled", compile=True), on_log=count)
    assert compiled.last("loss") == pytest.approx(plain.last("loss"), rel=1e-4)
    # under a mask and without one, in training and in evaluation: whatever else changes, nothing is compiled again
    assert graphs[12] == graphs[8] > 0


def test_trackers_get_the_same_figures_as_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path, trackers="tensorboard")
    history = train(*tiny_diffusion(), config)
    events = EventAccumulator(str(config.folder / "trackers")).Reload()
    for key in ("loss", "nelbo", "lr"):
        points = [(event.step, event.value) for event in events.Scalars(f"tiny/{key}")]
        assert [step for step, _ in points] == history.series(key)[0]
        assert [value for _, value in points] == pytest.approx(history.series(key)[1], rel=1e-6)


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tracker 'wandb' is not installed here \(pip install wandb\)"):
        train(*tiny_diffusion(), tiny_config(tmp_path, trackers="wandb"))


def test_arms_that_would_not_be_paired_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    for field, value in {"seed": 1, "eps": 0.01}.items():
        said = rf"the arms differ in {field} \({getattr(config, field)}, and {value} in 'other'\)"
        with pytest.raises(ValueError, match=said):
            train_arms({"one": config, "other": config.replace(**{field: value})})


def test_each_arm_has_a_loss_scale_of_its_own(tmp_path):
    config = tiny_config(tmp_path)
    arms = {name: (*tiny_diffusion(), config.replace(name=name)) for name in ("one", "other")}
    with training._opened(arms, "auto") as runs:
        assert runs["one"].accelerator is not runs["other"].accelerator
        assert (
            runs["one"].train_step.optimizer not in runs["other"].accelerator._optimizers
        )  # whose gradients it would unscale


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    def press_twice(history, config):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(*tiny_diffusion(), config, on_log=press_twice)
    assert train(*tiny_diffusion(), config).last("step") == 12  # the folder is free, the run goes on


def test_a_way_to_distribute_that_was_never_tried_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="under DEEPSPEED is not supported; launch with --multi_gpu"):
        train(*tiny_diffusion(), tiny_config(tmp_path))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        train(*tiny_diffusion(), tiny_config(tmp_path))


# ------------------------------------------------------------------------------------------- training longer
def test_a_finished_run_continues_with_more_steps(tmp_path):
    config = tiny_config(tmp_path, steps=6, save_every=6)
    short = train(*tiny_diffusion(), config)
    longer = train(*tiny_diffusion(seed=9), config.replace(steps=12))
    assert longer.records[-1]["step"] == 12
    assert comparable(longer)[: len(short.records)] == comparable(short)
    rates = dict(zip(*longer.series("lr"), strict=True))
    assert rates[8] == learning_rate(config, 7, 12) and rates[12] == learning_rate(config, 11, 12)
    assert json.loads((config.folder / "config.json").read_text())["total_steps"] == 12
    with pytest.raises(ValueError, match="total_steps: 12 then, 6 now"):  # but not with fewer
        train(*tiny_diffusion(), config)


def test_an_unfinished_run_keeps_its_number_of_steps(tmp_path):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config, on_log=stop_after(6))
    with pytest.raises(ValueError, match=r"total_steps: 12 then, 24 now.*`patience` ended it before, raise that first"):
        train(*tiny_diffusion(), config.replace(steps=24))


def test_a_trained_diffusion_model_is_not_annealed_again(tmp_path):
    config = tiny_config(tmp_path, steps=12, anneal_steps=6)
    model, tokenizer = tiny_diffusion()
    train(model, tokenizer, config)
    for name, again in (("memory", (model, tokenizer)), ("disk", load_diffusion(config.folder / "best"))):
        history = train(*again, config.replace(name=name, anneal_steps=10_000))
        assert set(history.series("ratio")[1]) == {1.0}
    resumed = train(*tiny_diffusion(), config.replace(name="memory", anneal_steps=10_000))  # a finished run: as it was
    assert set(resumed.series("ratio")[1]) == {1.0}


def test_random_weights_are_annealed_whatever_the_base_was(tmp_path):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config)
    scratch = config.replace(name="scratch", base=str(config.folder / "best"), scratch=True)
    assert train(*build(scratch), scratch).series("ratio")[1][0] < 1


def test_a_half_opened_model_is_annealed(tmp_path):
    config = tiny_config(tmp_path, steps=12, anneal_steps=24)
    train(*tiny_diffusion(), config)
    history = train(*load_diffusion(config.folder / "step-000012"), config.replace(name="again"))
    assert history.series("ratio")[1][0] < 0.1


def test_a_run_is_built_from_a_diffusion_model_as_it_is(tmp_path):
    save_diffusion(*tiny_diffusion(), tmp_path / "diffusion")
    model, _ = build(tiny_config(tmp_path, base=str(tmp_path / "diffusion")))
    assert torch.equal(model.lm_head.weight, tiny_diffusion()[0].lm_head.weight)


# ------------------------------------------------------------------------- what a run must have in common
def test_a_run_is_not_resumed_with_another_mask_token(tmp_path):
    def with_rows(mask_token):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<gap>", "<other>"]})
        model = tiny_model(vocab=len(tokenizer) + 4)  # padded: no row has to be added for [MASK]
        return as_diffusion(model, tokenizer, mask_token=mask_token)

    config = tiny_config(tmp_path)
    train(*with_rows("<gap>"), config, on_log=stop_after(6))
    for other in ("<other>", None):
        with pytest.raises(ValueError, match=r"mask_id: 320 then, 32\d now"):
            train(*with_rows(other), config)


def test_arms_with_two_tokenizers_are_refused(tmp_path):
    config = tiny_config(tmp_path, base=tiny_base(tmp_path))
    with pytest.raises(ValueError, match=r"arm 'other' \(base 'tiny-gpt2'\) reads the text as other tokens"):
        train_arms({"one": config, "other": config.replace(base="tiny-gpt2")})


def test_settings_of_accelerate_in_the_environment_change_nothing(tmp_path, monkeypatch):
    plain = train(*tiny_diffusion(), tiny_config(tmp_path, name="plain"))
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "inductor",
        "ACCELERATE_DYNAMO_MODE": "max-autotune",
        "ACCELERATE_SPLIT_BATCHES": "true",
    }.items():
        monkeypatch.setenv(name, value)
    assert comparable(train(*tiny_diffusion(), tiny_config(tmp_path, name="other"))) == comparable(plain)


def test_a_device_that_accelerate_chose_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match=r"device='cpu', but accelerate chose meta; unset .*ACCELERATE_TORCH_DEVICE"):
        train(*tiny_diffusion(), tiny_config(tmp_path))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(anneal_steps=10_000),
            "anneal_steps=10000 is longer than the run of 12 steps: its mask will be",
        ),
        (dict(warmup_steps=12), "warmup_steps=12 leaves no step after the warm-up in a run of 12"),
    ],
)
def test_a_schedule_that_does_not_fit_is_mentioned(tmp_path, capsys, changes, words):
    train(*tiny_diffusion(), tiny_config(tmp_path, **changes))
    assert words in capsys.readouterr().err


def test_a_resumed_run_says_from_where(tmp_path, capsys):
    config = tiny_config(tmp_path)
    train(*tiny_diffusion(), config, on_log=stop_after(6))
    assert "resuming" not in capsys.readouterr().err
    train(*tiny_diffusion(), config)
    assert "tiny: resuming from step 6 of 12" in capsys.readouterr().err


def test_a_run_on_the_first_blocks_of_a_text_is_not_resumed_on_sampled_ones(tmp_path):
    """Earlier versions took the first `train_blocks` of a text."""
    config = tiny_config(tmp_path, train_blocks=8)
    train(*tiny_diffusion(), config, on_log=stop_after(6))
    file = config.folder / "config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("train_blocks_are") == "sampled"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="train_blocks_are: 'the first' then, 'sampled' now"):
        train(*tiny_diffusion(), config)


def test_a_tracker_that_fails_costs_its_figures_and_nothing_else(tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    for call in ("log", "finish"):
        monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{call}", fail)
    config = tiny_config(tmp_path, trackers="tensorboard")
    assert train(*tiny_diffusion(), config).records[-1]["step"] == 12
    assert (config.folder / "step-000012").is_dir()
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert said[0].endswith("No space left on device); training goes on without them")
    assert said[1].startswith("the tracker 'tensorboard' could not be closed: ") and len(said) == 2
