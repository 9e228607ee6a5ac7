"""Makes the small models that ship in checkpoints/base: `python -m dalm_utils.scripts.pretrain tiny-gpt2`.

Interrupted, the same command continues. Beside the weights stands provenance.json: what the model is,
what it was trained on, for how long, and how well it predicts text that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..backbone import fuse_gelu, load_base, save_diffusion
from ..checkpoint import write_whole
from ..config import PROJECT, RunConfig, cache_folder, load_config
from ..corpus import load_corpus
from ..documents import clean_documents, digest, identify, split_of
from ..evaluation import ar_nll, nelbo
from ..history import History
from ..hubs import BASES
from ..machine import describe
from ..run import build
from ..training import train

END = "<|endoftext|>"  # begins a block and separates documents, as in GPT-2
PAD = "<pad>"  # OPT's embedding never learns its padding token, so it must be one that no text contains
CONTEXT = 512
SHAPE = dict(n_layer=4, n_embd=288, n_head=3)
VOCAB = 8192
AR = RunConfig(
    objective="ar", base="none", text="docstrings", length=CONTEXT, batch=8, learning_rate=2e-3, warmup_steps=60,
    final_lr=0.05, weight_decay=0.1, log_every=10, eval_every=250, save_every=250, compile=True,
)  # fmt: skip
HOUR_OF_STEPS = 4_500
MATHEMATICS = dict(steps=2_500, warmup_steps=100, compile=False)
# The base teaches first and then no more: it cannot see to the right of a gap, and the student has to.
LONG: dict[str, Any] = dict(
    batch=16, learning_rate=2e-3, steps=7_000, warmup_steps=200, anneal_steps=250, distill=16.0, distill_steps=1_000,
    eval_every=500, eval_blocks=48, save_every=250, sample_every=0, compile=True,
)  # fmt: skip


def train_tokenizer(vocab: int, text: str, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the training split of a text as it is now; made once and kept beside the texts."""
    folder = cache_folder() / f"tokenizer-{digest(json.dumps([vocab, special, identify(text, 'text')]))[:12]}"
    if not folder.exists():
        bpe = tokenizers.ByteLevelBPETokenizer()
        texts = (document for document in clean_documents(text) if split_of(document) == "train")
        bpe.train_from_iterator(texts, vocab_size=vocab, special_tokens=list(special), show_progress=False)
        ends = {"bos_token": END, "eos_token": END} | ({"pad_token": PAD} if PAD in special else {})
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **ends)
        fast.model_max_length = CONTEXT
        write_whole(folder, fast.save_pretrained)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def fresh_gpt2(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights."""
    torch.manual_seed(seed)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return fuse_gelu(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, **SHAPE, **ends)))


def fresh_opt(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> OPTForCausalLM:
    """An OPT of the same size with random weights, built like Galactica: GELU, layer norm first."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, activation_function="gelu",
        num_hidden_layers=SHAPE["n_layer"], num_attention_heads=SHAPE["n_head"], hidden_size=SHAPE["n_embd"],
        word_embed_proj_dim=SHAPE["n_embd"], ffn_dim=4 * SHAPE["n_embd"], bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return OPTForCausalLM(config)


def make_base(config: RunConfig, fresh: Callable[..., PreTrainedModel] = fresh_gpt2) -> History:
    """Train one AR base from random weights; returns its history."""
    special = (END,) if fresh is fresh_gpt2 else (END, PAD)
    tokenizer = train_tokenizer(VOCAB, config.text, special)
    return train(fresh(tokenizer, config.seed), tokenizer, config)


def ship(config: RunConfig) -> Path:
    """Put a run's best checkpoint into checkpoints/base, in half precision, with its provenance and history."""
    history = History.load(config.folder / "history.jsonl")
    if config.steps is None or (history.last("step") or 0) < config.steps:
        raise SystemExit("not finished; the same command continues")
    model, tokenizer = load_base(str(config.folder / "best"), hub="local")
    model = model.half().float()  # what ships is in half precision: measure that
    corpus = load_corpus(config.text, tokenizer)
    held_out = corpus.blocks("validation", config.length)
    score = (ar_nll if config.objective == "ar" else nelbo)(model, tokenizer, held_out)
    provenance = {
        "made_by": f"python -m dalm_utils.scripts.pretrain {config.name}",
        "architecture": {"class": type(model).__name__, "shape": SHAPE, "parameters": model.num_parameters()},
        "trained_on": f"the training split of the text {config.text!r}; no other text",
        "corpus": {
            key: corpus.facts[key] for key in ("fingerprint", "version", "source", "documents", "tokens", "bytes")
        },
        "tokens_seen": history.records[-1]["tokens"],
        "seconds": history.records[-1]["seconds"],
        "machine": describe(),
        "validation": {
            "measure": "NLL" if config.objective == "ar" else "NELBO",
            "nats_per_token": round(score.mean, 4),
            "stderr": round(score.stderr, 4),
            "bits_per_byte": round(score.bits_per_byte, 4),
            "blocks": len(held_out),
        },
        "config": {key: value for key, value in vars(config).items() if key != "runs"},
    }
    folder = BASES / config.name
    save_diffusion(model.half(), tokenizer, folder)
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    shutil.copy(config.folder / "history.jsonl", folder / "history.jsonl")
    return folder


def recipe(name: str) -> RunConfig:
    """The settings that make one of the models that come with the project."""
    if name == "tiny-gpt2":
        return AR.replace(name=name, steps=HOUR_OF_STEPS)
    if name == "tiny-galactica":
        return AR.replace(name=name, text="mathematics", **MATHEMATICS)
    return load_config("gpt2", "laptop", name=name, **LONG)


def make(name: str) -> Path:
    """Train and ship one of the models that come with the project."""
    config = recipe(name)
    if config.objective == "ar":
        make_base(config, fresh_opt if name == "tiny-galactica" else fresh_gpt2)
    else:
        train(*build(config), config)
    return ship(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("tiny-gpt2", "tiny-galactica", "tiny-diffugpt"))
    print("made", make(parser.parse_args().name).relative_to(PROJECT))
