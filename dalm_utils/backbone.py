"""Pretrained models in, diffusion models out: stock transformers classes all the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .annealing import annealed_mask
from .config import PROJECT
from .objective import hidden_states, mask_id_of

transformers.logging.disable_progress_bar()  # weights of this size load and save in a moment

BASES = PROJECT / "checkpoints" / "base"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the matrix products
PATIENCE = 10  # seconds for a hub's first answer
WANTED = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a hub's repository; never pickles or code


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
        features = torch.cpu.get_capabilities()
        return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision fp16 needs CUDA: a CPU computes in it hundreds of times slower; use auto, bf16 or fp32"
        )
    return precision


def autocast(device: torch.device, precision: str = "auto"):
    """A context in which matrix products run in `precision`; nothing for fp32."""
    precision = pick_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


# ------------------------------------------------------------------------------------------------- load
def load_base(
    name: str, *, hub: str = "auto", dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model and its tokenizer, as stock transformers classes, in eval mode.

    Args:
        name: a model that ships in checkpoints/base, a local folder, or a hub id.
        hub: "auto" looks on this machine first and then asks Hugging Face; "huggingface", "modelscope" and
            "local" say where to look.
        dtype: of the weights; never left to the checkpoint, which may be stored in half precision.
        device: None keeps the CPU.

    Raises:
        FileNotFoundError: the name is found nowhere; the message says what was tried and what else works.
    """
    folder = _find(name, hub)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.to(pick_device(device or "cpu")).eval(), tokenizer


def _find(name: str, hub: str) -> Path:
    tried = []
    if hub in ("auto", "local"):
        for folder in (BASES / name, Path(name), PROJECT / name):
            if (folder / "config.json").is_file():
                return folder
        tried.append(f"checkpoints/base/{name} and the folder {name!r}: no config.json there")
    downloads = {"auto": [_from_huggingface], "huggingface": [_from_huggingface], "modelscope": [_from_modelscope]}
    for download in downloads.get(hub, []):
        try:
            return Path(download(name))
        except Exception as error:  # each hub client has errors of its own; all of them mean "not from here"
            tried.append(f"{download.__name__.removeprefix('_from_')}: {str(error).splitlines()[0]}")
    shipped = ", ".join(sorted(path.parent.name for path in BASES.glob("*/config.json"))) or "none"
    raise FileNotFoundError(
        f"no model {name!r} (hub={hub!r}). Tried " + "; ".join(tried) + ". "
        f"Instead, name a base that ships with the project ({shipped}), a local folder with config.json and "
        "model.safetensors, or another hub (hub='huggingface' or hub='modelscope')."
    )


def _from_huggingface(name: str) -> str:
    from huggingface_hub import HfApi, snapshot_download

    return _fetch(lambda: HfApi().model_info(name, timeout=PATIENCE), partial(snapshot_download, name))


def _from_modelscope(name: str) -> str:
    import requests
    from modelscope import HubApi, snapshot_download

    address = f"{HubApi().endpoint}/api/v1/models/{name}"  # asked for by hand: HubApi waits a minute, five times
    return _fetch(lambda: requests.get(address, timeout=PATIENCE).raise_for_status(), partial(snapshot_download, name))


def _fetch(ask: Callable, download: Callable[..., str]) -> str:
    """Ask first, since a hub that does not answer is found out sooner so than in the retries of a download."""
    try:
        ask()
    except Exception:
        with contextlib.suppress(Exception):
            return download(allow_patterns=WANTED, local_files_only=True)  # fetched on an earlier day
        raise
    return download(allow_patterns=WANTED)


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
        mask_token: an existing special token to use as [MASK], one that no text contains; None adds a new one,
            whose embedding starts as the mean of all others.
        shift: whether the logits at i-1 predict token i.

    Raises:
        ValueError: the model fails `check_attention`, is one already, or `mask_token` cannot be used.
    """
    if mask_id_of(model) is not None:
        raise ValueError("this model already has a [MASK] token: it is a diffusion model; load it with load_diffusion")
    check_attention(model)
    if mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        _append_mean_embedding(model, tokenizer.mask_token_id)
    else:
        unusable = _why_not_mask(mask_token, tokenizer)
        if unusable:
            raise ValueError(f"{mask_token!r} cannot be [MASK]: {unusable}; leave mask_token=None to add a token")
        tokenizer.mask_token = mask_token
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.shift = shift
    model.config.is_causal = False
    return model, tokenizer


def _why_not_mask(token: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        return "the tokenizer has no such token"
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return "texts may contain it; it must be a special token"
    if token_id == begin_id(tokenizer):
        return "it begins every block"
    return None


def _append_mean_embedding(model: PreTrainedModel, mask_id: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[mask_id] = table[:mask_id].mean(0)


@torch.no_grad()
def check_attention(model: PreTrainedModel, length: int = 8) -> None:
    """Prove by perturbing tokens that this model obeys an additive mask, and that its head is where we look.

    With the closed mask no logit may change when a later token changes; with the open one every logit must
    change when any token changes; and the head on the hidden states must give the model's own logits.

    Raises:
        ValueError: one of the three does not hold; the message says which.
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
        hidden = hidden_states(model, batch, mask).float()
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

    positions = torch.arange(length, device=model.device)[None]
    own = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
    ours = model.get_output_embeddings()(hidden.to(model.dtype)).float()
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise ValueError(f"{type(model).__name__} does more to its hidden states than apply its head")


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
