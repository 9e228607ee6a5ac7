"""Adapters: what is trained, what is saved, and that a stock model comes out."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dalm_utils import diffusion_loss, load_diffusion, train
from dalm_utils.backbone import hidden_states
from dalm_utils.head import logits_of
from dalm_utils.history import History
from dalm_utils.lora import Adapter
from dalm_utils.run import ADAPTER, build
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
from tests.processes import exit_codes, kill_at, start_many
from tests.test_finetuning import pairs_config
from tests.test_objective import noisy_batch

TOKENS = torch.tensor([[0, 5, 320, 7, 320, 9]])  # 320 is [MASK]


@torch.no_grad()
def logits(model):
    return logits_of(model, hidden_states(model, TOKENS)).nan_to_num(neginf=0)


def shaken(adapter):
    """The adapter, as if it had been trained."""
    draws = torch.Generator().manual_seed(0)
    for weight in adapter.trained().values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=draws)
    return adapter


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_adapted_one_with_stock_layers(family, tied):
    model, _ = tiny_diffusion(family, tied=tied)
    modules, names, before = {n: type(m) for n, m in model.named_modules()}, list(model.state_dict()), logits(model)
    adapter = Adapter(model, rank=4)
    assert torch.equal(logits(model), before)  # nothing is learned yet
    shaken(adapter)
    adapted, weights = logits(model), {name: weight.clone() for name, weight in adapter.merged().items()}
    assert (adapted - before).abs().max() > 0.1
    adapter.merge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert {n: type(m) for n, m in model.named_modules()} == modules and list(model.state_dict()) == names
    assert all(weight.requires_grad for weight in model.parameters()) and not hasattr(model, "peft_config")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for name, weight in weights.items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert set(names) - set(weights) == ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_the_blocks_are_adapted_and_nothing_else_is_trained(family):
    model, _ = tiny_diffusion(family)
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    adapter = Adapter(model, rank=4)
    trained = adapter.trained()
    assert {name.partition(".lora_")[0] for name in trained if "lora_" in name} == set(linear)
    assert [name.rpartition(".")[2] for name in trained if "lora_" not in name] == ["mask_row"]
    hidden_states(model, TOKENS).square().sum().backward()
    assert all(weight.grad is not None for weight in trained.values())
    assert all(weight.grad is None for name, weight in model.named_parameters() if name not in trained)


def test_the_same_seed_begins_with_the_same_adapter():
    def first(seed):
        return torch.cat([weight.flatten() for weight in Adapter(tiny_diffusion()[0], 4, seed).trained().values()])

    one = first(0)
    torch.manual_seed(1)
    assert torch.equal(first(0), one) and not torch.equal(first(1), one)


def lora_config(folder, **changes):
    return pairs_config(folder, **{"lora_rank": 2, "steps": 16, "learning_rate": 1e-2, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["diffusion", "finetune"])
def test_a_run_trains_the_adapter_and_leaves_stock_models(tmp_path, objective):
    make = pairs_config if objective == "finetune" else tiny_config
    config = make(tmp_path, lora_rank=2, steps=16, learning_rate=1e-2, keep=9)
    model, tokenizer = tiny_diffusion()
    start_logits = logits(model)
    history = train(model, tokenizer, config)
    scores = history.series("nelbo")[1]
    assert scores[-1] == min(scores) < scores[0] - 0.1
    checkpoint = config.folder / "step-000016"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {ADAPTER, "optimizer.pt", "state.json", "history.jsonl", "manifest.json"}
    stored = load_file(checkpoint / ADAPTER)
    whole = sum(weight.numel() for weight in model.parameters())
    assert sum(weight.numel() for weight in stored.values()) < whole / 4
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {name.removeprefix("model.") for name in moments} == set(stored)

    fresh, _ = tiny_diffusion()
    adapter = Adapter(fresh, 2)
    adapter.load(checkpoint / ADAPTER)
    adapter.merge()
    assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(model), start_logits)
    best, _ = load_diffusion(config.folder / "best")
    plain = AutoModelForCausalLM.from_pretrained(config.folder / "best")
    assert type(best) is type(plain) is type(model) and torch.equal(logits(best), logits(plain))
    torch.testing.assert_close(logits(best), logits(model), rtol=1e-5, atol=1e-5)  # the last step was the best


def test_an_ar_model_is_finetuned_with_adapters_too(tmp_path):
    model = tiny_model(vocab=320)
    history = train(model, tiny_tokenizer(), lora_config(tmp_path, objective="finetune-ar"))
    assert history.series("loss")[1][-1] < history.series("loss")[1][0]
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, background):
    monkeypatch.setattr("dalm_utils.run.saves_in_background", lambda accelerator: background)
    whole_model, tokenizer = tiny_diffusion()
    whole = train(whole_model, tokenizer, lora_config(tmp_path / "whole"))
    config = lora_config(tmp_path / "cut")
    train(*tiny_diffusion(), config, on_log=stop_after(6))
    model, tokenizer = tiny_diffusion()
    assert comparable(train(model, tokenizer, config)) == comparable(whole)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole_model.state_dict()[name])


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    whole_model, tokenizer = tiny_diffusion()
    whole = train(whole_model, tokenizer, lora_config(tmp_path / "whole"))
    config = lora_config(tmp_path)
    kill_at(10, tmp_path, vars(config))
    model, tokenizer = tiny_diffusion()
    assert comparable(train(model, tokenizer, config)) == comparable(whole)
    assert torch.equal(logits(model), logits(whole_model))


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path):
    alone = train(*tiny_diffusion(), lora_config(tmp_path / "alone", batch=4))
    config = lora_config(tmp_path, batch=2)
    processes = start_many(2, tmp_path, vars(config))
    assert exit_codes(*processes) == [0, 0], (tmp_path / "messages-0").read_text()
    ours = History.load(config.folder / "history.jsonl")
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("nelbo", 1e-5)):
        assert ours.series(key)[1] == pytest.approx(alone.series(key)[1], rel=tolerance)


def test_a_rollback_loads_the_adapter(tmp_path):
    model, tokenizer = tiny_diffusion()

    def blow(history, config):
        if history.records[-1]["step"] == 14 and not history.last("event"):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.fill_(torch.nan)

    history = train(model, tokenizer, lora_config(tmp_path, steps=24, max_skips=2, log_every=1), on_log=blow)
    assert "rolled back to step 12" in history.last("event") and history.last("step") == 24
    assert torch.isfinite(logits(model)).all()


def test_a_run_resumes_on_the_base_that_it_began_with(tmp_path):
    config = lora_config(tmp_path)
    model, tokenizer = tiny_diffusion()
    train(model, tokenizer, config, on_log=stop_after(6))
    with pytest.raises(ValueError, match=r"adapted: .*build or load the base again to resume it"):
        train(model, tokenizer, config)  # which holds what was learned so far already


def test_an_error_leaves_a_stock_model(tmp_path):
    model, tokenizer = tiny_diffusion()
    before = logits(model)
    with opened(model, tokenizer, lora_config(tmp_path)) as run:
        assert run.adapter is not None and "lora" in str(type(model.transformer.h[0].attn.c_attn)).lower()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D" and torch.equal(logits(model), before)


def test_without_peft_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dalm_utils\[lora\]', or set lora_rank=0"):
        train(*tiny_diffusion(), lora_config(tmp_path))
    train(*tiny_diffusion(), lora_config(tmp_path, lora_rank=0, steps=2))


def test_a_frozen_head_has_no_gradient_of_its_size(monkeypatch):
    model, _ = tiny_diffusion()
    batch, asked, zeros_like = noisy_batch(), [], torch.zeros_like
    before = diffusion_loss(model, *batch).loss
    adapter = Adapter(model, 2)
    head = model.get_output_embeddings().weight
    monkeypatch.setattr(torch, "zeros_like", lambda like, **how: asked.append(like.shape) or zeros_like(like, **how))
    loss = diffusion_loss(model, *batch).loss
    loss.backward()
    assert torch.equal(loss, before) and head.shape not in asked
    assert all(weight.grad is not None for weight in adapter.trained().values())


def test_a_folder_of_runs_from_before_adapters_resumes(tmp_path):
    config = pairs_config(tmp_path)
    train(*tiny_diffusion(), config, on_log=stop_after(6))
    settings = json.loads((config.folder / "config.json").read_text())
    for newer in ("lora_rank", "adapted"):
        del settings[newer]
    (config.folder / "config.json").write_text(json.dumps(settings))
    assert train(*tiny_diffusion(), config).last("step") == config.steps


def test_a_base_that_is_adapted_on_the_way(tmp_path):
    config = lora_config(tmp_path, base=tiny_base(tmp_path))
    model, tokenizer = build(config)
    history = train(model, tokenizer, config)
    assert history.series("ratio")[1][0] < 1 == history.series("ratio")[1][-1] and model.config.annealed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_is_in_float32_whatever_the_base_is_in(tmp_path, dtype):
    model, tokenizer = tiny_diffusion()
    history = train(model.to(dtype), tokenizer, tiny_config(tmp_path, lora_rank=2, learning_rate=1e-5))
    assert history.records[-1]["step"] == 12 and {weight.dtype for weight in model.parameters()} == {dtype}
    adapter = load_file(tmp_path / "runs" / "tiny" / "step-000012" / ADAPTER)
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    learned = [weight for name, weight in adapter.items() if "lora_B" in name]
    assert learned and all(0 < weight.abs().max() < 1e-3 for weight in learned)
