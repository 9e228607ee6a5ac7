"""Pretrained models in, diffusion models out: stock transformers classes all the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation

from .annealing import annealed_mask
from .head import mask_id_of
from .hubs import find, require_files
from .machine import keep_memory, pick_device

transformers.logging.disable_progress_bar()  # weights of this size load and save in a moment

MASK_INIT_WORD = " the"  # [MASK] starts as a copy of it: common, and it says little about its neighbours


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
    place, target = find(name, hub, revision), pick_device(device or "cpu")
    if target.type == "cpu":
        keep_memory()
    if place.is_file():
        weights = {"quantization_config": GgufConfig(dequantize=True)}  # else it can be neither trained nor saved
    else:
        require_files(place, (file.name for file in place.iterdir()))
        weights = {"use_safetensors": True}
    source = _source(place)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **weights)
    return fuse_gelu(model).to(target).eval(), _tokenizer_of(source, model.config)


def load_tokenizer(name: str, *, hub: str = "auto", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, the same as from `load_base`, without reading the weights. See there."""
    source = _source(find(name, hub, revision))
    return _tokenizer_of(source, AutoConfig.from_pretrained(**source))


def _source(place: Path) -> dict:
    """What the transformers classes need to open a folder or a .gguf file."""
    if place.is_file():
        return {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name, "trust_remote_code": False}
    return {"pretrained_model_name_or_path": place, "trust_remote_code": False}


def _tokenizer_of(source: dict, config: transformers.PretrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a damaged file is a KeyError, a UnicodeDecodeError, or an Exception of tokenizers
        place = source["pretrained_model_name_or_path"]
        raise ValueError(f"the tokenizer in {place} cannot be read: {type(error).__name__}: {error}") from error
    _name_special_tokens(tokenizer, config)
    return tokenizer


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


# -------------------------------------------------------------------------------------------------- ask
def hidden_states(
    model: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """The last hidden states `[B, L, D]` of a stock causal LM, without running its head.

    Args:
        positions: `[B, L]` long; None counts from 0.
        cache: takes the keys and values of `tokens`, and gives those that they attend to.
    """
    if positions is None:  # OPT needs them beside a 4D mask
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    caching = dict(use_cache=False) if cache is None else dict(use_cache=True, past_key_values=cache)
    output = model.base_model(tokens, attention_mask=attention_mask, position_ids=positions, **caching)
    return output.last_hidden_state


def predicting_states(model: nn.Module, hidden: Tensor, places: Tensor, shift: bool | None = None) -> Tensor:
    """The hidden states `[M, D]` that predict the tokens at some places: the one rule behind loss, teacher and sampler.

    Under the shift the state at i-1 predicts token i, as in every AR model; without it the state at i does.

    Args:
        hidden: `[B, L, D]`.
        places: `[M]` long, flat indices b * L + i; under the shift, none at i = 0.
        shift: None takes the model's own setting, `model.config.shift`; an AR model has none and is shifted.
    """
    shift = getattr(model.config, "shift", True) if shift is None else shift
    return hidden.flatten(0, 1)[places - int(shift)]


def require_mask_id(model: nn.Module) -> int:
    """The id of [MASK]. Raises ValueError for a model that is not a diffusion model."""
    mask_id = mask_id_of(model)
    if mask_id is None:
        raise ValueError(
            "this model has no [MASK] token; make it a diffusion model first: as_diffusion(model, tokenizer)"
        )
    return mask_id


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every block: the tokenizer's bos, else its eos (GPT-2 uses one for both)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a begin nor an end token; set tokenizer.bos_token before adapting")


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain text: a document that mentions "[MASK]" gets the letters, never the special token."""
    with plain_backend(tokenizer) as backend:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextlib.contextmanager
def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """The tokenizer's backend, temporarily without special tokens in texts, truncation and padding."""
    backend = tokenizer.backend_tokenizer
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = special
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does to plain text; an added special token such as [MASK] does not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    relevant["words"] = [token["content"] for token in state["added_tokens"] if not token["special"]]
    content = json.dumps([relevant, begin_id(tokenizer)], sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------- adaptation
def as_diffusion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, mask_token: str | None = None, shift: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a causal LM a masked-diffusion LM, in place: a [MASK] token, and attention that is not causal.

    The config records `mask_token_id`, `shift` and `is_causal = False`, so that saving and loading with
    plain transformers gives back the same model.

    Args:
        mask_token: an existing special token to use as [MASK], one that no text contains, and which keeps its
            embedding; None adds a new one, which starts as a copy of a common word, `MASK_INIT_WORD`.
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
    word = tokenizer.encode(MASK_INIT_WORD, add_special_tokens=False)[-1]
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


def _try_hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    try:
        return hidden_states(model, tokens, mask).float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # as many ways as models
        kind = "an additive [1, 1, L, L] attention mask" if mask is not None else "no attention mask"
        raise ValueError(f"{type(model).__name__} does not work with {kind}: {error}") from error


def _hidden_without_mask(model: PreTrainedModel, tokens: Tensor) -> Tensor:
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
