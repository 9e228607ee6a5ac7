"""What only a GPU can show: the CPU's numbers, float16 under the real scaler, and that no step waits for the device."""

import pytest
import torch

from dalm_utils import annealed_mask, diffusion_loss, generate, nelbo, train
from dalm_utils.history import History
from tests.helpers import FAMILIES, comparable, opened, stop_after, tiny_base, tiny_config, tiny_diffusion, tiny_model
from tests.processes import exit_codes, start_many
from tests.test_objective import noisy_batch
from tests.test_processes import WAYS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LEARNS = dict(device="cuda", steps=60, anneal_steps=30, log_every=10, eval_every=30, save_every=30)
ON_GPU = {"ACCELERATE_USE_CPU": "false", "NCCL_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("taught", [False, True])
def test_loss_and_gradients_are_those_of_the_cpu(family, taught):
    batch = noisy_batch((8, 16))
    mask = annealed_mask(16, 0.5, generator=torch.Generator().manual_seed(1))
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_diffusion(family)[0].to(device)
        teaching = dict(teacher=tiny_model(family, 320).to(device), teacher_weight=0.5) if taught else {}
        loss = diffusion_loss(model, *(part.to(device) for part in batch), attention_mask=mask.to(device), **teaching)
        loss.loss.backward()
        results.append((loss.loss.item(), loss.token_nll.cpu(), [p.grad.cpu() for p in model.parameters()]))
    (cpu, cpu_nll, cpu_grads), (cuda, cuda_nll, cuda_grads) = results
    assert cuda == pytest.approx(cpu, rel=1e-5)
    torch.testing.assert_close(cuda_nll, cpu_nll, rtol=1e-4, atol=1e-4)
    floor = 1e-5 * max(float(grad.abs().max()) for grad in cpu_grads)
    torch.testing.assert_close(cuda_grads, cpu_grads, rtol=1e-3, atol=floor)


WAITS = {
    "fp32": {},
    "fp16": dict(precision="fp16"),
    "bf16": dict(precision="bf16"),
    "accumulated": dict(precision="fp16", accumulate=2),
    "taught": dict(precision="fp16", distill=4.0),
    "spikes": dict(precision="fp16", spike=10.0),
    "compiled": dict(precision="fp16", compile=True),
    "checkpointed": dict(precision="fp16", gradient_checkpointing=True),
}


def is_captured(run):
    return run.train_step.replayed is not None and run.train_step.replayed.graph is not None


def test_a_step_is_captured_although_an_earlier_loss_is_alive(tmp_path):
    model, tokenizer = tiny_diffusion()
    batch = (part.to("cuda") for part in noisy_batch((2, 16)))
    kept = diffusion_loss(model.to("cuda"), *batch).loss
    with opened(model, tokenizer, tiny_config(tmp_path, device="cuda", anneal_steps=100)) as run:
        for _ in range(5):
            run.advance()
        assert is_captured(run) and kept.requires_grad


@pytest.mark.parametrize("way", WAITS)
def test_a_step_does_not_wait_for_the_gpu(tmp_path, way):
    config = tiny_config(tmp_path, device="cuda", base=tiny_base(tmp_path), anneal_steps=100, **WAITS[way])
    with opened(*tiny_diffusion(), config) as run:
        for _ in range(5):  # kernels are compiled and loaded, and the graph is captured
            run.advance()
        assert is_captured(run) or way == "checkpointed"
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train_step(run.step, 1e-3, 0.5 if run.train_step.teacher else 0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_compiled_again_when_masks_change(tmp_path):
    config = tiny_config(tmp_path, device="cuda", anneal_steps=12, eval_every=100, save_every=100, compile=True)
    with opened(*tiny_diffusion(), config) as run:
        for _ in range(3):
            run.advance()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(6):
                run.advance()


@pytest.mark.parametrize(
    "changes",
    [dict(precision="fp16"), dict(precision="bf16"), dict(precision="fp16", compile=True)],
    ids=["fp16", "bf16", "compiled"],
)
def test_every_way_learns_what_float32_learns(tmp_path, changes):
    other = train(*tiny_diffusion(), tiny_config(tmp_path, name="other", **{**LEARNS, **changes}))
    plain = train(*tiny_diffusion(), tiny_config(tmp_path, name="plain", **LEARNS))
    assert plain.last("nelbo") < 0.85 * plain.series("loss")[1][0]  # it did learn
    assert other.last("nelbo") == pytest.approx(plain.last("nelbo"), rel=0.03)


def test_overflow_leaves_the_weights_alone_until_the_scale_has_come_down(tmp_path):
    config = tiny_config(tmp_path, precision="fp16", **LEARNS)
    with opened(*tiny_diffusion(), config) as run:
        before = [p.detach().clone() for p in run.model.parameters()]
        scaler = run.accelerator.scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**36})
        run.advance()
        assert all(map(torch.equal, before, run.model.parameters()))
        assert scaler.get_scale() == 2.0**35
        while not run.is_done:
            run.advance()
        assert 0 < run.watch.values["skipped"].item() < config.steps
        assert scaler.get_scale() < 2.0**30
        assert not torch.equal(before[0], next(run.model.parameters()))
        assert run.history.last("nelbo") < run.history.series("loss")[1][0]


def test_a_continued_run_follows_the_uninterrupted_one(tmp_path):
    histories = []
    for name, stop in (("whole", None), ("cut", 20)):
        config = tiny_config(tmp_path, name=name, precision="fp16", **LEARNS)
        if stop:
            train(*tiny_diffusion(), config, on_log=stop_after(stop))
        histories.append(train(*tiny_diffusion(), config))
    whole, cut = map(comparable, histories)
    assert [record["step"] for record in whole] == [record["step"] for record in cut]
    for ours, theirs in zip(whole, cut, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, nan_ok=True)


@pytest.mark.parametrize("way", WAYS)
def test_nccl_with_one_process_follows_the_curve_without_a_launcher(tmp_path, way):
    settings = dict(precision="fp16", base=tiny_base(tmp_path), distill=4.0, **LEARNS)
    alone = train(*tiny_diffusion(), tiny_config(tmp_path, name="alone", **settings))
    config = tiny_config(tmp_path, **settings)
    processes = start_many(1, tmp_path, settings, WAYS[way] | ON_GPU)
    assert exit_codes(*processes) == [0], (tmp_path / "messages-0").read_text()
    history = History.load(config.folder / "history.jsonl")
    for key in ("loss", "nelbo"):
        assert history.series(key)[1] == pytest.approx(alone.series(key)[1], rel=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_writing_are_those_of_the_cpu(family):
    scores, texts = [], []
    for device in ("cpu", "cuda"):
        model, tokenizer = tiny_diffusion(family)
        model.to(device)
        blocks = noisy_batch((4, 16))[0]
        scores.append(nelbo(model, tokenizer, blocks, num_samples=2, precision="fp32").mean)
        options = dict(length=12, seed=3, num_samples=2, precision="fp32")
        texts += [[generate(model, tokenizer, order=order, **options).text for order in ("random", "confidence")]]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert texts[0] == texts[1]
