"""One training step, eager and replayed; a fake device on the CPU stands for the GPU that captures it."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from dalm_utils import cuda_graph, step, train
from dalm_utils.machine import seed_dropout
from dalm_utils.objective import seeded
from tests.helpers import comparable, opened, tiny_base, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer
from tests.test_finetuning import pairs_config


@pytest.fixture
def replays(monkeypatch):
    """Steps that are captured on the CPU: a graph is its `compute`, called again on the same tensors."""
    log = []

    def capture(compute):
        log.append("capture")

        def replay():
            log.append("replay")
            compute()

        return replay

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(step, "_why_eager", lambda config, accelerator: None)
    monkeypatch.setattr(step, "_adamw", _without_capturable(step._adamw))
    return log


def _without_capturable(make):
    return lambda model, config, graph_device: make(model, config, None)


def tiny(folder, **changes):
    config = tiny_config(folder, base=tiny_base(folder), **changes)
    model, tokenizer = tiny_diffusion()
    return model, train(model, tokenizer, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, dict(distill=4.0, distill_steps=8), dict(batch=2, accumulate=2), dict(dropout=0.1)]
)
def test_a_replayed_run_is_the_eager_run(tmp_path, replays, monkeypatch, changes):
    steps = dict(steps=24, anneal_steps=12, save_every=12, eval_every=12, **changes)
    replayed_model, replayed = tiny(tmp_path, name="replayed", **steps)
    assert "replay" in replays
    monkeypatch.setattr(step, "_why_eager", lambda config, accelerator: "this test compares")
    model, eager = tiny(tmp_path, name="eager", **steps)
    for ours, theirs in zip(comparable(replayed), comparable(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    # Logits, not weights: a bias of the keys changes no output, so its gradient is rounding, which AdamW magnifies.
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(replayed_model(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_there_is_one_graph_under_the_mask_and_one_without(tmp_path, replays):
    tiny(tmp_path, steps=24, anneal_steps=12)
    assert replays.count("capture") == 2
    assert replays.count("replay") == 24 - 2 * cuda_graph.WARM_UP
    first = replays.index("replay")
    assert replays[first - 1] == "capture"  # a graph is replayed for the step at which it was captured


@pytest.mark.parametrize("captured", [False, True])
def test_a_captured_step_keeps_no_cast_weights(tmp_path, replays, monkeypatch, captured):
    """Inside the model, too, where accelerate enters autocast once more."""
    if not captured:
        monkeypatch.setattr(step, "_why_eager", lambda config, accelerator: "this test compares")
    keeps = []
    with opened(*tiny_diffusion(), tiny_config(tmp_path, precision="bf16")) as run:
        run.model.base_model.register_forward_pre_hook(lambda *_: keeps.append(torch.is_autocast_cache_enabled()))
        run.train_step(0, 1e-3, 0.0)
    assert keeps == [not captured]


def test_a_batch_beyond_the_capacity_is_computed_exactly(tmp_path, replays, monkeypatch):
    whole = tiny(tmp_path, name="whole", steps=8)[1]
    monkeypatch.setattr("dalm_utils.tasks.MaskedDiffusion.capacity", lambda self, rows: 30)  # of 60 maskable tokens
    replays.clear()
    small = tiny(tmp_path, name="small", steps=8)[1]
    assert replays.count("replay") < 8 - cuda_graph.WARM_UP
    for ours, theirs in zip(comparable(small), comparable(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_capture_that_fails_leaves_an_eager_run_and_one_line(tmp_path, replays, monkeypatch, capsys):
    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    expected = tiny(tmp_path, name="expected", steps=12)[1]
    monkeypatch.setattr(cuda_graph, "capture", refuse)
    capsys.readouterr()
    history = tiny(tmp_path, name="failed", steps=12)[1]
    said = capsys.readouterr().err
    assert said.count("CUDA graph failed, so steps run eagerly: operation not permitted") == 1
    assert "more of it" not in said
    assert history.series("loss") == expected.series("loss")


def test_a_rollback_captures_again(tmp_path, replays):
    """The optimizer's state was replaced, and a graph would go on to read the old one."""
    model, tokenizer = tiny_diffusion()

    def blow(history, config):
        if history.records[-1]["step"] == 14 and not history.last("event"):
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1e3)

    config = tiny_config(tmp_path, steps=24, log_every=1, save_every=4)
    history = train(model, tokenizer, config, on_log=blow)
    assert "rolled back to step 12" in history.last("event") and history.records[-1]["step"] == 24
    assert replays.count("capture") == 3  # under the mask, without it, and without it after the rollback


def test_the_inputs_are_filled_before_each_replay(tmp_path, monkeypatch):
    seen, filled = [], []
    replayed = cuda_graph.ReplayedStep(lambda parts, mask, with_teacher: seen.append(parts[0].noised.sum().item()),
                                       lambda: None, torch.device("cpu"))  # fmt: skip
    monkeypatch.setattr(cuda_graph, "capture", lambda compute: compute)
    model, tokenizer = tiny_diffusion()
    with opened(model, tokenizer, tiny_config(tmp_path)) as run:
        for number in range(8):
            batch = run.task.draw(number)
            filled.append(batch.noised.sum().item())
            replayed([batch.with_capacity(256)], None, False)
    assert seen == filled


def test_why_a_step_is_not_captured_is_said_in_words(tmp_path):
    def on(kind, distributed=DistributedType.NO):
        return SimpleNamespace(device=torch.device(kind), distributed_type=distributed)

    config = tiny_config(tmp_path)
    assert step._why_eager(config, on("cuda")) is None
    assert "device is cpu" in step._why_eager(config, on("cpu"))
    assert "MULTI_GPU" in step._why_eager(config, on("cuda", DistributedType.MULTI_GPU))
    assert "gradient_checkpointing" in step._why_eager(config.replace(gradient_checkpointing=True), on("cuda"))
    assert "cuda_graph is off" in step._why_eager(config.replace(cuda_graph=False), on("cuda"))


def test_the_ar_objective_is_replayed_too(tmp_path, replays):
    config = tiny_config(tmp_path, objective="ar", steps=12)
    history = train(tiny_model(vocab=320), tiny_tokenizer(), config)
    assert replays.count("capture") == 1 and math.isfinite(history.last("nll"))


def test_finetuning_is_replayed_on_padded_sequences(tmp_path, replays, monkeypatch):
    """Every batch has the same shapes there, while an eager step leaves out what is padding in all of its rows."""
    options = dict(steps=24, anneal_steps=12, save_every=12, eval_every=12)
    replayed = train(*tiny_diffusion(), pairs_config(tmp_path, name="replayed", **options))
    assert replays.count("capture") == 2
    monkeypatch.setattr(step, "_why_eager", lambda config, accelerator: "this test compares")
    eager = train(*tiny_diffusion(), pairs_config(tmp_path, name="eager", **options))
    for ours, theirs in zip(comparable(replayed), comparable(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_dropout_is_seeded_as_torch_would_seed_it():
    generator = seeded(3, 7, "dropout 0")
    torch.manual_seed(generator.initial_seed())
    expected = torch.rand(5)
    torch.rand(1)
    seed_dropout(generator, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
