"""Small things the tests share: models of a few thousand weights, a tokenizer, a text."""

from __future__ import annotations

import itertools

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from dalm_utils import as_diffusion
from dalm_utils.config import RunConfig

END = "<|endoftext|>"
TEXTS = [
    f"Return the {what} of {noun} along the {place} axis. Parameters: a : array_like, axis : {kind}, optional."
    for what, noun, place, kind in itertools.product(
        ("sum", "mean", "product", "variance"),
        ("a matrix", "an array", "all edges"),
        ("given", "last"),
        ("int", "tuple"),
    )
]
FAMILIES = ("gpt2", "opt", "llama")


def tiny_model(family: str = "gpt2", vocab: int = 61, attention: str = "sdpa", tied: bool = True, seed: int = 0):
    """A random two-layer model in float32, with weights large enough that every token matters."""
    torch.manual_seed(seed)
    shared = dict(
        vocab_size=vocab,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    if family == "gpt2":
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, **shared)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        kind = GPT2LMHeadModel
    elif family == "opt":
        sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16)
        shared["init_std"] = shared.pop("initializer_range")
        config = OPTConfig(max_position_embeddings=64, dropout=0.0, **sizes, **shared)
        kind = OPTForCausalLM
    else:
        sizes = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16)
        config = LlamaConfig(max_position_embeddings=64, intermediate_size=32, **sizes, **shared)
        kind = LlamaForCausalLM
    config._attn_implementation = attention
    return kind(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=320, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def tiny_diffusion(family: str = "gpt2", shift: bool = True, **options):
    """A random diffusion model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    return as_diffusion(tiny_model(family, len(tokenizer), **options), tokenizer, shift=shift)


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


def number_word(number: int) -> str:
    """Letters for a number, so that documents differ in their words."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))
