import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation

from dalm_utils import (
    annealed_mask,
    ar_nll,
    as_diffusion,
    check_attention,
    continuation_nelbo,
    generate,
    infilling,
    load_base,
    load_corpus,
    load_diffusion,
    nelbo,
    save_diffusion,
    train,
)
from dalm_utils.backbone import check_fits, hidden_states, load_tokenizer, max_length, randomize
from dalm_utils.hubs import BASES
from dalm_utils.machine import pick_device
from dalm_utils.tokens import begin_id
from tests.helpers import FAMILIES, TEXTS, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer, write_gguf


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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_training_lower_the_loss(family, tmp_path):
    model, tokenizer = tiny_diffusion(family, tied=family == "gpt2")
    config = tiny_config(tmp_path, steps=10, anneal_steps=5, batch=32, log_every=1, eval_every=10, learning_rate=2e-2)
    history = train(model, tokenizer, config)
    assert history.window("loss", 8, 11) < 0.9 * history.window("loss", 1, 4)


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


SMALL = dict(vocab_size=61, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, initializer_range=0.3)


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: BloomForCausalLM(BloomConfig(**SMALL)), r"does not work with an additive \[1, 1, L, L\]"),
        (
            lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=3)),
            "does not see every token when it is not causal and has no mask",
        ),
        (
            lambda: GPTNeoForCausalLM(
                GPTNeoConfig(
                    vocab_size=61, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["local"], 1]],
                    window_size=3, max_position_embeddings=64, initializer_range=0.3,
                )
            ),
            "does not see every token under the open mask",
        ),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, pad_token_id=0)), "does more to its hidden states than"),
        (
            lambda: GraniteForCausalLM(GraniteConfig(**SMALL, num_key_value_heads=1, logits_scaling=8.0)),
            "does more to its hidden states than",
        ),
        (
            lambda: Gemma2ForCausalLM(
                Gemma2Config(**SMALL | dict(initializer_range=0.02), num_key_value_heads=1, head_dim=8, pad_token_id=0)
            ),
            "does more to its hidden states than",
        ),
    ],
    ids=["alibi", "sliding window", "local attention", "scaled logits", "divided logits", "capped logits"],
)  # fmt: skip
def test_stock_models_that_cannot_become_diffusion_models_are_refused(model, reason):
    torch.manual_seed(0)
    model = model().eval()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=f"{type(model).__name__} {reason}"):
        as_diffusion(model, tiny_tokenizer())
    assert model.config.to_dict() == before


@torch.no_grad()
def test_a_cap_that_small_logits_do_not_show_is_found():
    torch.manual_seed(0)
    small = SMALL | dict(initializer_range=0.02)  # as a model is initialized: its logits are far below the cap
    model = Gemma2ForCausalLM(Gemma2Config(**small, num_key_value_heads=1, head_dim=8, pad_token_id=0)).eval()
    tokens = torch.arange(1, 9)[None]
    bare = model.lm_head(hidden_states(model, tokens, annealed_mask(8, 0.0)))
    torch.testing.assert_close(model(tokens).logits, bare, rtol=1e-3, atol=1e-3)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more to its hidden states than apply its head"):
        check_attention(model)
    assert all(map(torch.equal, model.parameters(), before))
    model.config.final_logit_softcapping = None
    check_attention(model)


WINDOWED = {  # a layer of each sees `window` tokens
    "mistral": lambda window: ("Mistral", dict(sliding_window=window)),
    "phi-3": lambda window: ("Phi3", dict(sliding_window=window)),
    "starcoder2": lambda window: ("Starcoder2", dict(sliding_window=window)),
    "qwen2": lambda window: ("Qwen2", dict(sliding_window=window, use_sliding_window=True, max_window_layers=1)),
    "olmo-3": lambda window: ("Olmo3", dict(sliding_window=window)),
    "gemma-3": lambda window: ("Gemma3", dict(sliding_window=window, head_dim=8)),
}


def windowed(kind, window):
    torch.manual_seed(0)
    name, options = WINDOWED[kind](window)
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    sizes = SMALL | dict(vocab_size=320, num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=None)
    return getattr(transformers, f"{name}ForCausalLM")(config(**sizes, **ends, **options)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_model_is_used_within_its_attention_window_only(kind, tmp_path):
    model, tokenizer = as_diffusion(windowed(kind, window=12), tiny_tokenizer())
    assert max_length(model) == 12
    blind = torch.arange(1, 33)[None]
    seen = hidden_states(model, blind, torch.zeros(1, 1, 32, 32))
    assert not torch.allclose(hidden_states(model, blind), seen, rtol=1e-3, atol=1e-3)  # the danger is real
    check_attention(model, 12)

    blocks, message = blind.repeat(2, 1), "is more than this model's attention window of 12"
    for use in (
        lambda: generate(model, tokenizer, length=12),
        lambda: nelbo(model, tokenizer, blocks),
        lambda: continuation_nelbo(model, tokenizer, [1] * 8, [2] * 8),
        lambda: infilling(model, tokenizer, blocks, gap=4),
        lambda: ar_nll(model, tokenizer, blocks),
        lambda: train(model, tokenizer, tiny_config(tmp_path, length=13)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert generate(model, tokenizer, length=11).tokens.shape == (1, 12)
    assert nelbo(model, tokenizer, blocks[:, :12], num_samples=1).mean > 0


@pytest.mark.parametrize(
    "kind, changes",
    [("qwen2", dict(use_sliding_window=False)), ("olmo-3", dict(layer_types=["full_attention"] * 2))],
)
def test_a_window_that_no_layer_uses_limits_nothing(kind, changes, monkeypatch):
    name, options = WINDOWED[kind](12)
    monkeypatch.setitem(WINDOWED, kind, lambda window: (name, options | changes))
    model = windowed(kind, 12)
    assert max_length(model) == 64
    check_attention(model, 40)


@pytest.mark.parametrize(
    "config, room",
    [
        (Llama4TextConfig(attention_chunk_size=12, max_position_embeddings=64), 12),
        (GPTNeoConfig(window_size=12, attention_types=[[["global", "local"], 2]], num_layers=4), 12),
        (GPTNeoConfig(window_size=12, attention_types=[[["global"], 4]], num_layers=4), 2048),
        (MistralConfig(sliding_window=12, max_position_embeddings=8), 8),
        (MistralConfig(sliding_window=None, max_position_embeddings=64), 64),
        (MistralConfig(sliding_window=-1, max_position_embeddings=64), 64),
        (MistralConfig(sliding_window=12, max_position_embeddings=-1), 12),
        (MistralConfig(sliding_window=None, max_position_embeddings=0), sys.maxsize),
    ],
    ids=["chunks", "local layers", "global layers", "fewer positions", "no window", "-1", "positions -1", "no limit"],
)
def test_the_length_that_a_model_sees_is_read_from_its_config(config, room):
    assert max_length(SimpleNamespace(config=config)) == room


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_enlarged(tmp_path):
    model, tokenizer = tiny_model(vocab=61), tiny_tokenizer()
    message = "ids go up to 319, but the model's embedding has 61 rows; they do not belong together"
    with pytest.raises(ValueError, match=message):
        as_diffusion(model, tokenizer)
    assert len(model.get_input_embeddings().weight) == 61 and tokenizer.mask_token is None
    assert getattr(model.config, "mask_token_id", None) is None and len(tokenizer) == 320
    blocks = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        ar_nll(model, tokenizer, blocks)
    with pytest.raises(ValueError, match=message):
        infilling(model, tokenizer, blocks, gap=2)
    diffusion, _ = tiny_diffusion()
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<unused>"]})
    other.add_special_tokens({"mask_token": "<other mask>"})
    for use in (
        lambda: generate(diffusion, other, length=4),
        lambda: nelbo(diffusion, other, blocks),
        lambda: continuation_nelbo(diffusion, other, "a", "b"),
        lambda: train(diffusion, other, tiny_config(tmp_path)),
        lambda: generate(diffusion, tiny_tokenizer(), length=4),
    ):
        with pytest.raises(ValueError, match=r"\[MASK\] is token (321|None) of the tokenizer, but 320 of the model"):
            use()


@pytest.mark.parametrize("device", ["mps", "xpu:0", "meta", "cuda:x", "gpu"])
def test_a_device_of_another_kind_is_refused_at_once(device, monkeypatch):
    monkeypatch.setattr("dalm_utils.backbone.find", lambda *_: pytest.fail("nothing is looked for"))
    with pytest.raises(ValueError, match=f"no support for the device '{device}'; choose one of auto, cpu, cuda"):
        load_base("tiny-gpt2", device=device)


def test_a_model_on_a_device_of_another_kind_is_refused():
    model, tokenizer = tiny_diffusion()
    check_fits(model, tokenizer, 8)
    with pytest.raises(ValueError, match="no support for the device 'meta'"):
        generate(model.to("meta"), tokenizer, length=4)
    with pytest.raises(ValueError, match="no support for the device 'meta'"):
        as_diffusion(tiny_model(vocab=320).to("meta"), tiny_tokenizer())


@pytest.mark.parametrize(
    "seen, asked, told", [(0, "cuda", "sees no CUDA devices"), (1, "cuda:1", "sees 1 CUDA device ")]
)
def test_a_cuda_device_that_is_not_there_is_refused_with_both_remedies(seen, asked, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(RuntimeError, match=told) as caught:
        pick_device(asked)
    assert "device=cpu precision=auto" in str(caught.value) and "device='cpu', precision='auto'" in str(caught.value)


def broken_in_the_middle(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    model.transformer.h[1].register_forward_hook(fail)
    return model.train()


def test_a_model_in_training_is_in_training_after_an_error():
    model, tokenizer = tiny_diffusion()
    broken_in_the_middle(model)
    blocks = torch.ones(2, 8, dtype=torch.long)
    for use in (
        lambda: generate(model, tokenizer, length=4),
        lambda: nelbo(model, tokenizer, blocks),
        lambda: ar_nll(model, tokenizer, blocks),
        lambda: infilling(model, tokenizer, blocks, gap=2),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            use()
        assert model.training and all(module.training for module in model.modules())
    base = broken_in_the_middle(tiny_model(vocab=320))
    with pytest.raises(ValueError, match="out of memory"):
        as_diffusion(base, tiny_tokenizer())
    assert base.training


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_is_a_new_token_that_starts_as_a_word(family, tied):
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab=len(tokenizer), tied=tied)
    before = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    word = tokenizer.convert_tokens_to_ids("Ġthe")
    model, tokenizer = as_diffusion(model, tokenizer, shift=False)
    after = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (after[0] is after[1]) == tied and len(tokenizer) == 321 and tokenizer.mask_token_id == 320
    for old, new in zip(before, after, strict=True):
        assert len(new) == len(old) + 1 and torch.equal(new[:-1], old)
    assert torch.equal(after[0][-1], before[0][word])
    assert tied or torch.allclose(after[1][-1], before[1].mean(0), atol=1e-6)  # which is never predicted
    assert (model.config.mask_token_id, model.config.shift, model.config.is_causal) == (320, False, False)


@pytest.mark.parametrize("tied", [True, False])
def test_mask_takes_a_spare_row_of_a_padded_vocabulary(tied):
    """A vocabulary of 320 in 384 rows: [MASK] becomes row 320, which no longer is what it was."""
    model = tiny_model(vocab=384, tied=tied)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[320:] = 100.0
    model, tokenizer = as_diffusion(model, tiny_tokenizer())
    assert model.config.mask_token_id == tokenizer.mask_token_id == 320
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(table.weight) == 384
        assert table.weight[320].abs().max() < 100.0 and (table.weight[321:] == 100.0).all()


def test_mask_can_be_a_special_token_that_exists(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused>"]})
    model = tiny_model(vocab=len(tokenizer))
    before = model.get_input_embeddings().weight.detach().clone()
    model, tokenizer = as_diffusion(model, tokenizer, mask_token="<unused>")
    assert model.config.mask_token_id == tokenizer.convert_tokens_to_ids("<unused>") == 320
    assert torch.equal(model.get_input_embeddings().weight, before)  # it keeps what it has learnt
    with pytest.raises(ValueError, match="already has"):
        as_diffusion(model, tokenizer)

    train(model, tokenizer, tiny_config(tmp_path, steps=2, eval_every=2))
    save_diffusion(model, tokenizer, tmp_path / "model")
    again, same_tokenizer = load_diffusion(tmp_path / "model")
    assert same_tokenizer.mask_token == "<unused>" and again.config.mask_token_id == 320
    tokens = torch.tensor([[0, 5, 320, 9]])
    torch.testing.assert_close(hidden_states(again, tokens), hidden_states(model, tokens))


def test_padding_neither_begins_blocks_nor_is_mask():
    """An embedding with a padding_idx gives that row no gradient; GPT-2's has none, so there it may begin blocks."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>", "<s>"]})
    model = tiny_model("opt", vocab=len(tokenizer), padding=320)
    with pytest.raises(ValueError, match=r"'<pad>' cannot be \[MASK\]: it is the model's padding"):
        as_diffusion(model, tokenizer, mask_token="<pad>")
    tokenizer.bos_token = "<pad>"
    with pytest.raises(ValueError, match=r"token 320 \('<pad>'\) begins every block.*set tokenizer.bos_token"):
        as_diffusion(model, tokenizer)
    as_diffusion(tiny_model(vocab=len(tokenizer), padding=320), tokenizer)
    model, tokenizer = tiny_model("opt", vocab=len(tokenizer), padding=320), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>", "<s>"]})
    tokenizer.bos_token = "<s>"  # the remedy
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


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_sampler_that_is_not_ours_hardly_ever_sees_mask_in_an_untied_head(tmp_path, bias):
    """A sampler over all logits of plain transformers, which knows of no [MASK]."""
    model, tokenizer = tiny_diffusion("llama", tied=False)
    head, mask_id = model.lm_head, model.config.mask_token_id
    if bias:
        head.bias = torch.nn.Parameter(torch.randn(len(head.weight), generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        head.weight[mask_id] *= 100.0  # as if training had let it go anywhere
    save_diffusion(model, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if bias:
        plain.lm_head.bias = head.bias
    tokens = torch.randint(320, (64, 32), generator=torch.Generator().manual_seed(0))
    logits = plain(tokens).logits
    assert (logits.argmax(-1) != mask_id).all()
    assert logits.softmax(-1)[..., mask_id].max() <= 1 / len(head.weight)
    torch.testing.assert_close(logits, model(tokens).logits)  # what is in memory is what was saved


@pytest.mark.parametrize("adapted", [True, False])
def test_generation_of_plain_transformers_gives_no_mask(tmp_path, adapted):
    model, tokenizer = tiny_diffusion()
    if not adapted:  # saved by an earlier version
        model.generation_config.suppress_tokens = None
    save_diffusion(model, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mask_id = model.config.mask_token_id
    plain.lm_head.bias = torch.nn.Parameter(torch.zeros(321).index_fill(0, torch.tensor([mask_id]), 100.0))
    tokens = torch.arange(1, 5)[None]
    options = dict(max_new_tokens=20, pad_token_id=0, eos_token_id=-1)
    for how in (dict(do_sample=True), dict(do_sample=False), dict(num_beams=2)):
        assert mask_id not in plain.generate(tokens, **options, **how)
    assert mask_id in plain.generate(tokens, **options, suppress_tokens=None)


@torch.no_grad()
def sample_as_transformers(folder, prompts=64, length=24):
    """Tokens `[prompts, length]` of a plain sampler that obeys generation_config.json, without this project."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[model.config.mask_token_id] = 20.0  # ever so likely, unless it is suppressed
    begins = torch.arange(1, 1 + prompts)[:, None]
    options = dict(max_new_tokens=length, min_new_tokens=length, pad_token_id=0, do_sample=True)
    return model.generate(begins, **options)[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_model_of_a_run_is_safe_with_samplers_of_others(tmp_path, tied, shift):
    model, tokenizer = tiny_diffusion(tied=tied, shift=shift)
    config = tiny_config(tmp_path, steps=4, eval_every=2, save_every=2, shift=shift)
    train(model, tokenizer, config)
    saved = [config.folder / "best", *sorted(config.folder.glob("step-*"))]
    assert len(saved) == 3
    for folder in saved:
        assert (sample_as_transformers(folder) != model.config.mask_token_id).all()


def test_the_diffusion_models_that_ship_are_safe_with_samplers_of_others():
    folders = [path.parent for path in BASES.glob("*/config.json") if "mask_token_id" in path.read_text()]
    assert "tiny-diffugpt" in [folder.name for folder in folders]
    for folder in folders:
        mask_id = load_diffusion(folder)[0].config.mask_token_id
        assert (sample_as_transformers(folder) != mask_id).all()


@pytest.mark.parametrize(
    "published, kept",
    [
        (dict(temperature=0.6, top_p=0.9), dict(temperature=0.6, top_p=0.9)),  # without do_sample: Llama 2, GGUF files
        (dict(pad_token_id=-1), {}),
        (dict(early_stopping=True, length_penalty=2.0), {}),
    ],
)
def test_a_published_generation_config_that_cannot_be_saved_does_not_end_a_run(tmp_path, published, kept):
    tokenizer, base = tiny_tokenizer(), tiny_model(vocab=320)
    for name, value in published.items():
        setattr(base.generation_config, name, value)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        base.save_pretrained(tmp_path / "plain")
    model, tokenizer = as_diffusion(base, tokenizer)
    train(model, tokenizer, tiny_config(tmp_path, steps=2, eval_every=2))
    again = load_diffusion(tmp_path / "runs" / "tiny" / "best")[0].generation_config
    expected = dict(suppress_tokens=[320], bos_token_id=0, eos_token_id=0) | kept
    assert {name: getattr(again, name) for name in expected} == expected


def test_a_checkpoint_is_one_file_however_large_the_model(tmp_path, monkeypatch):
    """transformers cuts files at 50 GB, and a run resumes from model.safetensors."""
    model, tokenizer = tiny_diffusion()
    save = PreTrainedModel.save_pretrained
    small = lambda self, path, **options: save(self, path, **{"max_shard_size": 2000} | options)  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", small)
    save_diffusion(model, tokenizer, tmp_path / "export")
    save_diffusion(model, tokenizer, tmp_path / "checkpoint", published_names=False)
    assert [len([*(tmp_path / name).glob("*.safetensors")]) > 1 for name in ("export", "checkpoint")] == [True, False]
    assert load_diffusion(tmp_path / "export")


def test_quantized_weights_are_refused(tmp_path, monkeypatch):
    save_diffusion(*tiny_diffusion(), tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*args, **options):
        model, report = load(*args, **options)
        packed = torch.zeros(4, 1, dtype=torch.uint8)
        model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(packed, requires_grad=False)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    with pytest.raises(ValueError, match="are quantized, and cannot be trained; take the unquantized model"):
        load_base(str(tmp_path))


def test_paths_are_taken_as_such_and_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, tokenizer = tiny_diffusion()
    save_diffusion(model, tokenizer, "~/model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert load_base(tmp_path / "model")[1].vocab_size == tokenizer.vocab_size
    with pytest.raises(FileNotFoundError, match=r"no model '.*typo'"):
        load_base(tmp_path / "typo", hub="local")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    corpus = load_corpus(tmp_path / "t.jsonl", tokenizer, cache="~/cache")
    assert corpus.folder.parent == tmp_path / "cache"


def test_loading_says_what_is_wrong(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a diffusion model"):
        load_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model 'nowhere'.*config\.json"):
        load_diffusion("nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="bert"), r"lacks weights of a BertLMHeadModel \(\d+ in all, the first is bert\."),
        (dict(model_type="whisper"), r"lacks weights of a WhisperForCausalLM"),
        (dict(n_layer=3), r"lacks weights of a GPT2LMHeadModel \(12 in all, the first is transformer\.h\.2\."),
        (
            dict(tie_word_embeddings=False),
            r"lacks weights of a GPT2LMHeadModel \(1 in all, the first is lm_head\.weight",
        ),
    ],
)
def test_a_model_that_lacks_weights_is_refused(tmp_path, changes, message):
    """transformers fills them with random numbers and goes on."""
    save_diffusion(*tiny_diffusion(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    for load in (load_base, load_diffusion):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path):
    model, tokenizer = tiny_diffusion()
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    save_diffusion(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight of the model are not finite"):
        load_diffusion(tmp_path)


def written_base(folder):
    tiny_model(vocab=320).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (written_base(tmp_path) / name).unlink()
        if name == "tokenizer.json":  # what is left makes an empty tokenizer
            with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no tokenizer \(tokenizer\.json, or .*merges"):
                load_base(str(tmp_path))
        else:
            assert len(load_base(str(tmp_path))[1]) == 320


def test_a_vocabulary_and_merges_are_a_tokenizer(tmp_path):
    written_base(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_base(str(tmp_path))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, state["merges"])]))
    text = "Return the sum of an array."
    assert load_base(str(tmp_path))[1](text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("config.json", ""), ("config.json", "{}"),
        ("model.safetensors", "not weights"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line_that_names_the_model(tmp_path, name, content):
    (written_base(tmp_path / "model") / name).write_text(content)
    with pytest.raises(ValueError, match=f"cannot load {tmp_path / 'model'}: ") as caught:
        load_base(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["pytorch_model.bin"], []])
def test_a_folder_without_safetensors_is_refused(tmp_path, names):
    tiny_model().config.save_pretrained(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"not to be opened")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no model\*\.safetensors, only config.*never opened"):
        load_base(str(tmp_path))


def test_special_tokens_that_the_tokenizer_does_not_name_are_those_of_the_config(tmp_path):
    """As in Galactica: the tokens are special, but nothing says which begins, ends or pads."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<pad>", "</s>"]})
    model = tiny_model("opt", vocab=len(tokenizer), padding=321)
    model.config.bos_token_id, model.config.eos_token_id = 320, 322
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    declared = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key in [key for key in declared if "token" in key and key != "tokenizer_class"]:
        del declared[key]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))

    model, tokenizer = load_base(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token) == ("<s>", "<pad>", "</s>")
    assert begin_id(tokenizer) == 320
    save_diffusion(*as_diffusion(model, tokenizer), tmp_path / "diffusion")
    assert load_diffusion(tmp_path / "diffusion")[1].bos_token == "<s>"

    config = json.loads((tmp_path / "config.json").read_text()) | {"bos_token_id": 9, "eos_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))  # a word: defaults of a config's class often name one
    with pytest.raises(ValueError, match="neither a begin nor an end token"):
        begin_id(load_base(str(tmp_path))[1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_a_model_like_any_other(tied, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab=len(tokenizer), tied=tied)
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    tokens = torch.arange(1, 9)[None]
    monkeypatch.chdir(tmp_path)  # a relative path is looked for here
    loaded, its_tokenizer = load_base("tiny.gguf")
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    text = "Return the sum of an array.\n    a : array_like"
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab() and its_tokenizer.bos_token == tokenizer.bos_token
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert load_base(str(tmp_path / "tiny.gguf"), dtype=torch.bfloat16)[0].dtype == torch.bfloat16

    adapted, its_tokenizer = as_diffusion(loaded, its_tokenizer)
    train(adapted, its_tokenizer, tiny_config(tmp_path, steps=2, eval_every=2))
    save_diffusion(adapted, its_tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(tokens).logits, adapted(tokens).logits)


def test_a_gguf_file_may_end_in_capitals_and_its_own_tokenizer_is_read(tmp_path):
    tokenizer = tiny_tokenizer()
    write_gguf(tiny_model("llama", len(tokenizer)), tokenizer, tmp_path / "model.GGUF")
    assert load_base(str(tmp_path / "model.GGUF"))[1].get_vocab() == tokenizer.get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        for load in (load_base, load_tokenizer):
            with pytest.raises(
                ValueError, match=rf"{name} would be read instead of the tokenizer in model\.GGUF; move"
            ):
                load(str(tmp_path / "model.GGUF"))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "alone/model.gguf"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "alone").mkdir()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "pytorch_model.bin").write_bytes(pointer)
    load_base(str(tmp_path))  # which does not read that one
    (tmp_path / name).write_bytes(pointer)
    with pytest.raises(ValueError, match=rf"{name} is a Git-LFS pointer, not the file itself: run git lfs pull"):
        load_base(str(tmp_path / name if name.endswith(".gguf") else tmp_path))


def test_a_gguf_file_that_is_not_there_is_not_asked_from_a_hub():
    with pytest.raises(FileNotFoundError, match=r"no model 'none/here\.gguf'.*nor a \.gguf file\. Three other ways"):
        load_base("none/here.gguf")


def test_gelu_in_one_pass_is_the_same_function_and_loads_anywhere(tmp_path):
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    assert stock.config.activation_function == "gelu_new"
    stock.save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    ours, _ = load_base(str(tmp_path / "stock"))
    assert not any(isinstance(module, NewGELUActivation) for module in ours.modules())
    ours.save_pretrained(tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(2, 34).view(2, 16)
    logits = [model(tokens).logits for model in (stock, ours, plain, randomize(ours))]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[1], logits[2])
    pairs = zip(logits[:2], (stock, ours), strict=True)
    grads = [torch.autograd.grad(out.square().mean(), list(model.parameters())) for out, model in pairs]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_random_weights_depend_on_the_seed_alone():
    model = tiny_model(vocab=30)
    first, same, other = randomize(model, 1), randomize(model, 1), randomize(model, 2)
    weights = [m.get_input_embeddings().weight for m in (first, same, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_shipped_bases_are_whole_small_and_proven():
    from dalm_utils.hubs import BASES
    from dalm_utils.scripts.pretrain import recipe

    names = [path.parent.name for path in BASES.glob("*/config.json")]
    assert "tiny-gpt2" in names
    for name in names:
        folder = BASES / name
        assert sum(file.stat().st_size for file in folder.iterdir()) < 16_000_000
        model, tokenizer = load_base(name)
        assert model.dtype == torch.float32
        provenance = json.loads((folder / "provenance.json").read_text())
        if getattr(model.config, "mask_token_id", None) is None:
            check_attention(model)
            assert provenance["seconds"] >= 3600  # of CPU cores
        assert provenance["tokens_seen"] > 10_000_000
        assert provenance["architecture"]["parameters"] == model.num_parameters()
        assert tokenizer.decode(tokenizer("Return an array.")["input_ids"]) == "Return an array."
        fields = vars(recipe(name)).items() & provenance["config"].items()
        differing = {key for key, _ in provenance["config"].items() - fields}
        assert differing <= {"attention", "compile", "device", "save_every"}  # the first is no longer a field


def test_the_tokenizer_alone_is_that_of_the_whole_model(tmp_path):
    tokenizer = tiny_tokenizer()
    write_gguf(tiny_model("llama", len(tokenizer)), tokenizer, tmp_path / "small.gguf")
    for place in (BASES / "tiny-gpt2", BASES / "tiny-galactica", BASES / "tiny-diffugpt", tmp_path / "small.gguf"):
        _, whole = load_base(str(place))
        alone = load_tokenizer(str(place))
        assert alone.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
        assert alone.special_tokens_map == whole.special_tokens_map and begin_id(alone) == begin_id(whole)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_an_error_that_names_the_folder(tmp_path, content):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}"):
        load_base(str(tmp_path))
