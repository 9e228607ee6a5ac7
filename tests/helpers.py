"""Small things the tests share: models of a few thousand weights, a tokenizer, a text."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dalm_utils import as_diffusion, training
from dalm_utils.backbone import fuse_gelu
from dalm_utils.checkpoint import MACHINE_KEYS
from dalm_utils.config import RunConfig

END = "<|endoftext|>"
PATIENCE = 1800  # seconds until a process counts as hung: far beyond what a slow machine needs
TEXTS = [
    f"Return the {what} of {noun} along the {place} axis. Parameters: a : array_like, axis : {kind}, optional."
    for what, noun, place, kind in itertools.product(
        ("sum", "mean", "product", "variance"),
        ("a matrix", "an array", "all edges"),
        ("given", "last"),
        ("int", "tuple"),
    )
]
FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gpt_neox")


def tiny_model(
    family: str = "gpt2",
    vocab: int = 61,
    attention: str = "sdpa",
    tied: bool = True,
    seed: int = 0,
    padding: int | None = None,
    heads: int = 2,
    layers: int = 2,
):
    """A random small model in float32, with weights large enough that every token matters."""
    torch.manual_seed(seed)
    shared = dict(
        vocab_size=vocab,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=padding,
        max_position_embeddings=64,
    )
    sizes = dict(hidden_size=16, num_hidden_layers=layers, num_attention_heads=heads)
    if family == "gpt2":
        kind = GPT2LMHeadModel
        config = GPT2Config(**shared, **sizes, initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    elif family == "opt":
        kind = OPTForCausalLM
        config = OPTConfig(**shared, **sizes, init_std=0.3, ffn_dim=32, word_embed_proj_dim=16, dropout=0)
    else:
        config_kind, kind, more = {
            "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=1)),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=1)),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(num_key_value_heads=1, head_dim=8)),
            "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
        }[family]
        config = config_kind(**shared, **sizes, initializer_range=0.3, intermediate_size=32, **more)
    config._attn_implementation = attention
    return fuse_gelu(kind(config)).eval()  # as load_base does


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=320, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def write_gguf(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path) -> None:
    """Write a Llama and its tokenizer as llama.cpp's converter does, unquantized."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    kinds = [gguf.TokenType.CONTROL if token == END else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, count in heads.items():
            if part in name:  # llama.cpp pairs neighboring dimensions in its rotary embedding, transformers halves
                weight = weight.reshape(count, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_diffusion(family: str = "gpt2", shift: bool = True, **options):
    """A random diffusion model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    return as_diffusion(tiny_model(family, len(tokenizer), **options), tokenizer, shift=shift)


def tiny_base(folder) -> str:
    """Where the AR model lies that `tiny_diffusion` makes a diffusion model of."""
    path = folder / "base"
    if not path.exists():
        tokenizer = tiny_tokenizer()
        tiny_model(vocab=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


def tiny_config(folder, **changes) -> RunConfig:
    """A run of a few steps in fp32 on the CPU, everything under `folder`."""
    text = folder / "texts"
    if not text.exists():
        text.mkdir(parents=True)
        for number, words in enumerate(TEXTS * 4):
            (text / f"{number:03d}.txt").write_text(f"{words} Example {number_word(number)}.")
    settings = dict(
        name="tiny", runs=str(folder / "runs"), text=str(text), length=16, batch=4, steps=12, learning_rate=3e-3,
        anneal_steps=6, log_every=2, eval_every=6, eval_blocks=4, eval_samples=2, save_every=4,
        device="cpu", precision="fp32",
    )  # fmt: skip
    return RunConfig(**{**settings, **changes})


@contextlib.contextmanager
def opened(model, tokenizer, config: RunConfig):
    """A run that has taken no step yet."""
    with training._opened({config.name: (model, tokenizer, config)}, "auto") as runs:
        yield runs[config.name]


def comparable(history) -> list[dict]:
    """The records without what differs when a run is repeated: its clock and its memory."""
    return [{key: value for key, value in record.items() if key not in MACHINE_KEYS} for record in history.records]


def stop_after(step: int, kind: signal.Signals = signal.SIGINT):
    """An on_log that presses Ctrl-C, or sends another signal, once a step is reached."""

    def press(history, config):
        if history.records[-1]["step"] == step:
            os.kill(os.getpid(), kind)

    return press


def number_word(number: int) -> str:
    """Letters for a number, so that documents differ in their words."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def assert_same_loss_and_gradients(model, ours, plain) -> None:
    """Two functions that compute a loss of a model agree, and so do the gradients of all of its parameters."""
    results = []
    for loss_of in (ours, plain):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (our_loss, our_grads), (plain_loss, plain_grads) = results
    assert our_loss == pytest.approx(plain_loss, rel=1e-5)
    largest = max(float(grad.abs().max()) for grad in plain_grads)
    for a, b in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest)
