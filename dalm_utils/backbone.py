"""Pretrained models in, diffusion models out: stock transformers classes all the way."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation

from .annealing import annealed_mask
from .hubs import find, require_files
from .objective import hidden_states, mask_id_of

transformers.logging.disable_progress_bar()  # weights of this size load and save in a moment

LIKE = " the"  # as [MASK] starts: a word that blocks know, and that says little about what stands beside it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the matrix products


# ---------------------------------------------------------------------------------------------- devices
def pick_device(device: str | torch.device | None = "auto") -> torch.device:
    """`auto` takes CUDA where there is one. Raises RuntimeError if CUDA is asked for and missing."""
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "this run wants CUDA (device='cuda'), but torch sees no CUDA device here. "
            "Use the laptop profile (DALM_PROFILE=laptop), or device='cpu' with precision='auto'."
        )
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where it is fast in hardware, else fp16 on CUDA, else fp32."""
    if precision == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if precision == "auto":
        return "bf16" if _cpu_is_faster_in_bf16() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision fp16 needs CUDA: a CPU computes in it hundreds of times slower; use auto, bf16 or fp32"
        )
    return precision


def _cpu_is_faster_in_bf16() -> bool:
    """AMX multiplies in it many times faster, AMD's AVX-512 twice; Intel's AVX-512 half as fast as in fp32."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in features["cpu_name"]))


def keep_memory() -> None:
    """Tell glibc, for the whole process, to keep what is freed, so that the next large tensor finds memory in place.

    Otherwise it goes back to the kernel and comes again page by page, zeroed, at every step of a large model on a CPU.
    Where there is no glibc nothing happens.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # their numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 2**26)


def machine() -> str:
    """What a figure was measured on."""
    features = torch.cpu.get_capabilities()
    bf16 = ", ".join(name for name in ("avx512_bf16", "amx_bf16") if features.get(name)) or "no bf16 instructions"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"
    return f"{cores}, {features['cpu_name']} ({bf16}){gpu}, torch {torch.__version__}"


def autocast(device: torch.device, precision: str = "auto"):
    """A context in which matrix products run in `precision`; nothing for fp32."""
    precision = pick_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


# ------------------------------------------------------------------------------------------------- load
def load_base(
    name: str,
    *,
    hub: str = "auto",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model and its tokenizer, as stock transformers classes, in eval mode.

    Weights are read from safetensors or GGUF and never from pickles; a repository's own code is never run.

    Args:
        name: a model that ships in checkpoints/base, a local folder, a .gguf file (its quantised weights are
            unpacked into `dtype`), or a hub id.
        hub: "auto" looks on this machine first and then asks Hugging Face; "huggingface", "modelscope" and
            "local" say where to look.
        revision: a branch, tag or commit of the hub's repository; with one, "auto" goes straight to the hub.
        dtype: of the weights; never left to the checkpoint, which may be stored in half precision.
        device: None keeps the CPU.

    Raises:
        FileNotFoundError: the name is found nowhere, or without safetensors; the message says what was tried and
            what else works. A hub that does not answer is given up after `PATIENCE` seconds.
        ValueError: an unknown hub, or a revision of something local.
    """
    place, device = find(name, hub, revision), pick_device(device or "cpu")
    if device.type == "cpu":
        keep_memory()
    if place.is_file():
        source, options = place.parent, {"gguf_file": place.name}
        weights = {"quantization_config": GgufConfig(dequantize=True)}  # else it can be neither trained nor saved
    else:
        require_files(place, (file.name for file in place.iterdir()))
        source, options, weights = place, {}, {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options, **weights)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    _name_special_tokens(tokenizer, model.config)
    return fuse_gelu(model).to(device).eval(), tokenizer


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Let torch compute the tanh form of GELU at once, in place: GPT-2's own code takes eight passes over memory.

    The same function to rounding, and one that plain transformers knows, so that what is saved loads anywhere.
    """
    for name in ("activation_function", "hidden_act"):
        if getattr(model.config, name, None) in ("gelu_new", "gelu_fast"):
            setattr(model.config, name, "gelu_pytorch_tanh")
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: transformers.PretrainedConfig) -> None:
    """Galactica's tokenizer has special tokens without saying what each is for; its model's config says it."""
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{kind}_token_id", None)
        # Configs also carry defaults of their class, which may be any word of this vocabulary.
        if getattr(tokenizer, f"{kind}_token_id") is None and _is_special(tokenizer, token_id):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> bool:
    added = tokenizer.added_tokens_decoder
    return isinstance(token_id, int) and token_id in added and added[token_id].special


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A new model of the same architecture and size with random weights: the from-scratch arm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(model.device, model.dtype).eval()


# ------------------------------------------------------------------------------------------- adaptation
def begin_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every block: the tokenizer's bos, else its eos (GPT-2 uses one for both)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a begin nor an end token; set tokenizer.bos_token before adapting")


def as_diffusion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, mask_token: str | None = None, shift: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a causal LM a masked-diffusion LM, in place: a [MASK] token, and attention that is not causal.

    The config records `mask_token_id`, `shift` and `is_causal = False`, so that saving and loading with
    plain transformers gives back the same model.

    Args:
        mask_token: an existing special token to use as [MASK], one that no text contains, and which keeps its
            embedding; None adds a new one, which starts as a copy of a common word, `LIKE`.
        shift: whether the logits at i-1 predict token i.

    Raises:
        ValueError: the model fails `check_attention`, is one already, begins blocks with a token that cannot
            learn, or `mask_token` cannot be used.
    """
    if mask_id_of(model) is not None:
        raise ValueError("this model already has a [MASK] token: it is a diffusion model; load it with load_diffusion")
    check_attention(model)
    frozen = getattr(model.get_input_embeddings(), "padding_idx", None)  # its row gets no gradient
    if begin_id(tokenizer) == frozen:
        raise ValueError(
            f"token {frozen} ({tokenizer.convert_ids_to_tokens(frozen)!r}) begins every block, but it is this model's "
            "padding, which never learns; set tokenizer.bos_token to another special token"
        )
    if mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        _start_as_word(model, tokenizer)
    else:
        unusable = _why_not_mask(mask_token, tokenizer, frozen)
        if unusable:
            raise ValueError(f"{mask_token!r} cannot be [MASK]: {unusable}; leave mask_token=None to add a token")
        tokenizer.mask_token = mask_token
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.shift = shift
    model.config.is_causal = False
    return model, tokenizer


def _why_not_mask(token: str, tokenizer: PreTrainedTokenizerBase, frozen: int | None) -> str | None:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        return "the tokenizer has no such token"
    if not _is_special(tokenizer, token_id):
        return "texts may contain it; it must be a special token"
    if token_id == begin_id(tokenizer):
        return "it begins every block"
    if token_id == frozen:
        return "it is the model's padding, which never learns"
    return None


@torch.no_grad()
def _start_as_word(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    mask_id, rows = tokenizer.mask_token_id, len(model.get_input_embeddings().weight)
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    word = tokenizer.encode(LIKE, add_special_tokens=False)[-1]
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table[mask_id] = table[word]


@torch.no_grad()
def check_attention(model: PreTrainedModel, length: int = 8) -> None:
    """Prove by perturbing tokens that this model obeys an additive mask, and that its head is where we look.

    With the closed mask no logit may change when a later token changes; with the open one every logit must
    change when any token changes; without a mask a model that is not causal must do as with the open one; and
    the head on the hidden states must give the model's own logits.

    Raises:
        ValueError: one of the four does not hold, or the model cannot take such a mask; the message says which.
    """
    model = model.eval()
    vocab = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (1, length), generator=generator)
    others = tokens.repeat(length, 1)
    index = torch.arange(length)
    others[index, index] = (others[index, index] + 1 + torch.randint(vocab - 1, (length,), generator=generator)) % vocab
    batch = torch.cat([tokens, others]).to(model.device)  # row 1 + j differs from row 0 at position j only

    later = torch.ones(length, length, dtype=torch.bool).triu(1)  # [i, j]: token j comes after position i
    for ratio in (0.0, 1.0):
        mask = annealed_mask(length, ratio, dtype=model.dtype, device=model.device)
        mask = torch.zeros(1, 1, length, length, dtype=model.dtype, device=model.device) if mask is None else mask
        hidden = _try_hidden_states(model, batch, mask)
        change = (hidden[1:] - hidden[:1]).abs().amax(-1).T.cpu()  # [i, j]: what token j does to position i
        if not torch.isfinite(change).all():
            raise ValueError(f"{type(model).__name__} gives values that are not finite: its weights are damaged")
        floor = 1e-6 * change.max()
        if ratio == 0.0 and (change[later] > floor).any():
            raise ValueError(
                f"{type(model).__name__} lets positions see later tokens under the closed mask; it cannot be annealed"
            )
        if ratio == 1.0 and (change <= floor).any():
            raise ValueError(f"{type(model).__name__} does not see every token under the open mask")

    own = _hidden_without_mask(model, batch[:1])
    if not torch.allclose(own, hidden[:1], rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise ValueError(f"{type(model).__name__} does not see every token when it is not causal and has no mask")

    positions = torch.arange(length, device=model.device)[None]
    own = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
    ours = model.get_output_embeddings()(hidden.to(model.dtype)).float()
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise ValueError(f"{type(model).__name__} does more to its hidden states than apply its head")


def _try_hidden_states(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    try:
        return hidden_states(model, tokens, mask).float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # as many ways as models
        kind = "an additive [1, 1, L, L] attention mask" if mask is not None else "no attention mask"
        raise ValueError(f"{type(model).__name__} does not work with {kind}: {error}") from error


def _hidden_without_mask(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    before = vars(model.config).get("is_causal")
    model.config.is_causal = False
    try:
        return _try_hidden_states(model, tokens, None)
    finally:
        if before is None:
            del model.config.is_causal
        else:
            model.config.is_causal = before


# ------------------------------------------------------------------------------------------ save and load
def save_diffusion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, weights: dict | None = None
) -> None:
    """Write config, safetensors weights and tokenizer; `load_diffusion` gives back the same logits.

    Args:
        weights: the state dict to write, where the model itself holds only shards of it.
    """
    model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)


def load_diffusion(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model written by `save_diffusion`, in eval mode.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the folder holds a model without a [MASK] token.
    """
    model, tokenizer = load_base(str(path), hub="local", dtype=dtype, device=device)
    if mask_id_of(model) is None:
        raise ValueError(f"{path} holds an autoregressive model, not a diffusion model; use load_base and as_diffusion")
    return model, tokenizer
