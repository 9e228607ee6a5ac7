import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import GPT2LMHeadModel

from dalm_utils import annealed_mask, as_diffusion, check_attention, load_base, load_diffusion, save_diffusion
from dalm_utils.backbone import randomize
from dalm_utils.objective import hidden_states
from tests.helpers import FAMILIES, tiny_diffusion, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_leaks_at_neither_end(family, attention):
    model = tiny_model(family, attention=attention)
    check_attention(model)
    tokens = torch.arange(1, 9)[None]
    changed = tokens.clone()
    changed[0, 5] = 40

    def effect(mask):  # [L]: how much each position notices that token 5 changed
        return (hidden_states(model, tokens, mask) - hidden_states(model, changed, mask)).abs().amax(-1)[0].detach()

    closed = effect(annealed_mask(8, 0.0))
    assert closed[:5].max() == 0 and closed[5:].min() > 1e-4
    as_open = torch.zeros(1, 1, 8, 8)
    assert effect(as_open).min() > 1e-4
    half_open = annealed_mask(8, 0.0)
    half_open[0, 0, 2, 5] = 0.0  # open one edge: position 2 may look at token 5, and nobody else before it
    noticed = effect(half_open)
    assert noticed[2] > 1e-4 and noticed[[0, 1]].max() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_a_diffusion_model_sees_everything(family, attention):
    model, _ = tiny_diffusion(family, attention=attention)
    tokens = torch.arange(1, 9)[None]
    everything = hidden_states(model, tokens, torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(hidden_states(model, tokens, None), everything)


def deafen(model):
    """Make a model ignore the mask it is given."""
    forward = model.transformer.forward
    model.transformer.forward = lambda *inputs, attention_mask=None, **rest: forward(*inputs, **rest)
    return model


class Scaled(GPT2LMHeadModel):
    """Does something to the logits after the head."""

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.logits = output.logits * 0.5
        return output


def test_a_model_that_fails_the_check_is_refused_with_the_reason():
    deaf = deafen(tiny_model())
    with pytest.raises(ValueError, match="does not see every token under the open mask"):
        check_attention(deaf)
    deaf.config.is_causal = False
    with pytest.raises(ValueError, match="see later tokens under the closed mask"):
        check_attention(deaf)
    with pytest.raises(ValueError, match="apply its head"):
        check_attention(Scaled(tiny_model().config).eval())
    broken = tiny_model()
    broken.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        as_diffusion(broken, tiny_tokenizer())


@pytest.mark.parametrize("tied", [True, False])
def test_mask_is_a_new_token_that_starts_as_the_mean(tied):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab=len(tokenizer), tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    model, tokenizer = as_diffusion(model, tokenizer, shift=False)
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + 1 == len(tokenizer) and tokenizer.mask_token_id == len(before)
    assert torch.equal(after[:-1], before)
    torch.testing.assert_close(after[-1], before.mean(0))
    assert (model.config.mask_token_id, model.config.shift, model.config.is_causal) == (len(before), False, False)


def test_mask_can_be_a_special_token_that_exists():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused>"]})
    model = tiny_model(vocab=len(tokenizer))
    model, tokenizer = as_diffusion(model, tokenizer, mask_token="<unused>")
    assert model.config.mask_token_id == tokenizer.convert_tokens_to_ids("<unused>") == 320
    assert len(model.get_input_embeddings().weight) == 321
    with pytest.raises(ValueError, match="already has"):
        as_diffusion(model, tokenizer)


@pytest.mark.parametrize(
    "token, reason", [("<none>", "no such token"), ("!", "texts may contain it"), ("<|endoftext|>", "it begins every")]
)
def test_a_token_that_cannot_be_mask_is_refused(token, reason):
    with pytest.raises(ValueError, match=reason):
        as_diffusion(tiny_model(vocab=320), tiny_tokenizer(), mask_token=token)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_models_give_equal_logits(family, tmp_path):
    model, tokenizer = tiny_diffusion(family, shift=False)
    save_diffusion(model, tokenizer, tmp_path / "model")
    assert sorted(p.suffix for p in (tmp_path / "model").iterdir() if p.suffix not in (".json", ".jinja")) == [
        ".safetensors"
    ]
    again, same_tokenizer = load_diffusion(tmp_path / "model")
    tokens = torch.tensor([[0, 5, model.config.mask_token_id, 9]])
    torch.testing.assert_close(hidden_states(again, tokens), hidden_states(model, tokens))
    assert again.config.shift is False and same_tokenizer.mask_token_id == tokenizer.mask_token_id
    assert again.dtype == torch.float32 and type(again) is type(model)


def test_loading_says_what_is_wrong(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a diffusion model"):
        load_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model 'nowhere'.*config\.json"):
        load_diffusion("nowhere")


def test_an_unknown_model_without_a_network_fails_within_seconds(tmp_path):
    """The hub's address is a closed port of this machine."""
    code = "from dalm_utils import load_base; load_base('somebody/some-model')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - begun < 60
    assert "FileNotFoundError: no model 'somebody/some-model'" in result.stderr
    assert "huggingface:" in result.stderr and "modelscope" in result.stderr


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_a_hub_that_stalls_is_given_up_within_seconds(tmp_path, hub):
    """A server of this machine takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        code = "from dalm_utils import backbone; backbone.PATIENCE = 1; "
        code += f"backbone.load_base('somebody/some-model', hub='{hub}')"
        places = {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path)}
        environment = {**os.environ, **places, "HF_ENDPOINT": address, "MODELSCOPE_ENDPOINT": address}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50
        )
    assert "FileNotFoundError: no model 'somebody/some-model'" in result.stderr and "timed out" in result.stderr


def test_random_weights_depend_on_the_seed_alone():
    model = tiny_model(vocab=30)
    first, same, other = randomize(model, 1), randomize(model, 1), randomize(model, 2)
    weights = [m.get_input_embeddings().weight for m in (first, same, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_shipped_bases_are_whole_small_and_proven():
    from dalm_utils.backbone import BASES

    names = [path.parent.name for path in BASES.glob("*/config.json")]
    assert "tiny-gpt2" in names
    for name in names:
        folder = BASES / name
        assert sum(file.stat().st_size for file in folder.iterdir()) < 16_000_000
        model, tokenizer = load_base(name)
        assert model.dtype == torch.float32
        if getattr(model.config, "mask_token_id", None) is None:
            check_attention(model)
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["seconds"] >= 3600 and provenance["tokens_seen"] > 10_000_000
        assert provenance["architecture"]["parameters"] == model.num_parameters()
        assert tokenizer.decode(tokenizer("Return an array.")["input_ids"]) == "Return an array."
