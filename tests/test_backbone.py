import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.activations import NewGELUActivation

from dalm_utils import (
    annealed_mask,
    as_diffusion,
    check_attention,
    load_base,
    load_diffusion,
    save_diffusion,
    train,
)
from dalm_utils.backbone import begin_id, hidden_states, load_tokenizer, randomize
from dalm_utils.hubs import BASES
from tests.helpers import FAMILIES, tiny_config, tiny_diffusion, tiny_model, tiny_tokenizer, write_gguf


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
    ],
    ids=["alibi", "sliding window", "local attention", "scaled logits"],
)  # fmt: skip
def test_stock_models_that_cannot_become_diffusion_models_are_refused(model, reason):
    torch.manual_seed(0)
    model = model().eval()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=f"{type(model).__name__} {reason}"):
        as_diffusion(model, tiny_tokenizer())
    assert model.config.to_dict() == before


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
        assert torch.equal(new[-1], old[word])
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


def test_loading_says_what_is_wrong(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a diffusion model"):
        load_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model 'nowhere'.*config\.json"):
        load_diffusion("nowhere")


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
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be read"):
        load_base(str(tmp_path))
