"""Pretrained models in, diffusion models out: stock transformers classes all the way."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation

from .annealing import annealed_mask
from .head import is_shifted, mask_id_of
from .hubs import find, in_one_line, require_contents, require_files
from .machine import keep_memory, pick_device
from .tokens import add_mask, begin_id, encode, is_special, require_backend, token_ids

transformers.logging.disable_progress_bar()  # weights of this size load and save in a moment

LARGE_LOGIT = 1e3  # well beyond any soft cap, and within float16
MASK_INIT_WORD = " the"  # [MASK] starts as a copy of it: common, and it says little about its neighbors
MODEL_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # models differ in what they raise
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # settings that limit what a layer sees


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
        name: a model that ships in checkpoints/base, a local folder, a .gguf file (its quantized weights are
            unpacked into `dtype`), or a hub id, with a revision as in "gpt2@main".
        hub: "auto" looks on this machine first and then asks Hugging Face; "huggingface", "modelscope" and
            "local" say where to look.
        revision: a branch, tag or commit of the hub's repository; with one, "auto" goes straight to the hub.
        dtype: of the weights; never left to the checkpoint, which may be stored in half precision.
        device: None keeps the CPU.

    Raises:
        FileNotFoundError: the name is found nowhere, or without safetensors or a tokenizer; the message says what was
            tried and what else works. A hub that does not answer is given up after `PATIENCE` seconds.
        ValueError: an unknown hub, a revision of something local, a device of another kind than cpu and cuda, a
            tokenizer without a backend in Rust, files that transformers cannot load, or weights that are missing or not
            finite.
        RuntimeError: a CUDA device that is not there.
    """
    target = pick_device(device or "cpu")
    place = find(name, hub, revision)
    if target.type == "cpu":
        keep_memory()
    if place.is_file():
        weights = {"quantization_config": GgufConfig(dequantize=True)}  # else it can be neither trained nor saved
    else:
        require_files(place, (file.name for file in place.iterdir()))
        weights = {"use_safetensors": True}
    source = _source(place)
    with _naming(place):
        config = AutoConfig.from_pretrained(**source)
        tokenizer = _tokenizer_of(source, config)
        model, report = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True, **weights)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{place} lacks weights of a {type(model).__name__} ({len(missing)} in all, the first is {missing[0]}): "
            "its config.json is that of another model, or it is no causal language model"
        )
    if any(weight.dtype in (torch.int8, torch.uint8) for weight in model.parameters()):
        raise ValueError(f"the weights of {place} are quantized, and cannot be trained; take the unquantized model")
    check_finite(model)
    return fuse_gelu(model).to(target).eval(), tokenizer


def load_tokenizer(name: str, *, hub: str = "auto", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, the same as from `load_base`, without reading the weights. See there."""
    place = find(name, hub, revision)
    source = _source(place)
    with _naming(place):
        return _tokenizer_of(source, AutoConfig.from_pretrained(**source))


def _source(place: Path) -> dict:
    """What the transformers classes need to open a folder or a .gguf file. Raises ValueError for one they misread."""
    require_contents(place)
    if place.is_file():
        return {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name, "trust_remote_code": False}
    return {"pretrained_model_name_or_path": place, "trust_remote_code": False}


def _tokenizer_of(source: dict, config: transformers.PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(**source)
    require_backend(tokenizer)
    _name_special_tokens(tokenizer, config)
    return tokenizer


@contextlib.contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Give an error of transformers the name of the model and a line: its libraries raise every kind there is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"cannot load {place}: {in_one_line(error)}") from error


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Use torch's kernel for the tanh form of GELU, in place: GPT-2's own code takes eight passes over memory.

    It is the same function to rounding, and plain transformers knows it, so that a saved model loads anywhere.
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
    """Name special tokens as the config does: Galactica's tokenizer does not say what its special tokens are for."""
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{kind}_token_id", None)
        # A config also carries the defaults of its class, which may be any word of this vocabulary.
        if getattr(tokenizer, f"{kind}_token_id") is None and is_special(tokenizer, token_id):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))


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
    shift = is_shifted(model) if shift is None else shift
    return hidden.flatten(0, 1)[places - int(shift)]


def require_mask_id(model: nn.Module) -> int:
    """The id of [MASK]. Raises ValueError for a model that is not a diffusion model."""
    mask_id = mask_id_of(model)
    if mask_id is None:
        raise ValueError(
            "this model has no [MASK] token; make it a diffusion model first: as_diffusion(model, tokenizer)"
        )
    return mask_id


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model without dropout, inside of a `with` statement."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------ guards
def check_finite(model: nn.Module) -> None:
    """Raise ValueError if a weight of a model is infinite or NaN."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weights {name} of the model are not finite; load it again from a whole copy")


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raise ValueError unless a model can take `length` tokens of a tokenizer, each seen from everywhere."""
    pick_device(model.device)
    check_tokenizer(model, tokenizer)
    room = max_length(model)
    if length > room:
        blind = f"this model's attention window of {room}, outside of which it sees nothing"
        limit = blind if room == _attention_window(model.config) else f"the model's {room} positions"
        raise ValueError(f"length {length} is more than {limit}; lower `length`, or give it less text")


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a tokenizer cannot be that of a model."""
    ids, rows = token_ids(tokenizer), len(model.get_input_embeddings().weight)
    mask_id, its_mask_id = mask_id_of(model), tokenizer.mask_token_id
    if mask_id is None and its_mask_id is not None:
        ids = ids[ids != its_mask_id]  # an AR model may lack it
    trouble = None
    if mask_id not in (None, its_mask_id):
        trouble = f"[MASK] is token {its_mask_id} of the tokenizer, but {mask_id} of the model"
    elif ids[-1] >= rows:
        trouble = f"the tokenizer's ids go up to {ids[-1]}, but the model's embedding has {rows} rows"
    if trouble:
        raise ValueError(f"{trouble}; they do not belong together: use the tokenizer that was saved with the model")


def max_length(model: PreTrainedModel) -> int:
    """The most tokens of which a model sees every one from everywhere: its positions, or its attention window."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = (positions, _attention_window(model.config), sys.maxsize)
    return min(limit for limit in limits if limit and limit > 0)  # a config may say "no limit" by None, 0 or -1


def _attention_window(config: transformers.PretrainedConfig) -> int | None:
    """How many tokens a layer sees, where some layer does not see them all; None where every layer does."""
    config = config.get_text_config()
    layers = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # None: all are alike
    if layers and set(layers) <= {"full_attention", "global"}:
        return None
    limits = [getattr(config, name, None) for name in WINDOWS if getattr(config, f"use_{name}", True)]
    return min((limit for limit in limits if limit and limit > 0), default=None)


# ------------------------------------------------------------------------------------------- adaptation
def as_diffusion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, mask_token: str | None = None, shift: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a causal LM a masked-diffusion LM, in place: a [MASK] token, and attention that is not causal.

    The config records `mask_token_id`, `shift` and `is_causal = False`, so that saving and loading with
    plain transformers gives back the same model.

    Args:
        mask_token: an existing special token to use as [MASK], one that no text contains, and which keeps its
            embedding; None adds a new one, which starts as a copy of a common word, `MASK_INIT_WORD`, or as the mean
            of all tokens where that word is not one token.
        shift: whether the logits at i-1 predict token i.

    Raises:
        ValueError: the model fails `check_attention`, is a diffusion model already, does not belong to the tokenizer,
            begins blocks with a token that cannot learn, or `mask_token` cannot be used. Nothing is changed then.
    """
    if mask_id_of(model) is not None:
        raise ValueError("this model already has a [MASK] token: it is a diffusion model; load it with load_diffusion")
    require_backend(tokenizer)
    check_attention(model)
    check_tokenizer(model, tokenizer)
    frozen = getattr(model.get_input_embeddings(), "padding_idx", None)  # its row gets no gradient
    if begin_id(tokenizer) == frozen:
        raise ValueError(
            f"token {frozen} ({tokenizer.convert_ids_to_tokens(frozen)!r}) begins every block, but it is this model's "
            "padding, which never learns; set tokenizer.bos_token to another special token"
        )
    if mask_token is None:
        add_mask(tokenizer)
        _start_as_word(model, tokenizer)
    else:
        unusable = _why_not_mask(mask_token, tokenizer, frozen)
        if unusable:
            raise ValueError(f"{mask_token!r} cannot be [MASK]: {unusable}; leave mask_token=None to add a token")
        tokenizer.mask_token = mask_token
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.shift = shift
    model.config.is_causal = False
    _suppress_mask(model)
    return model, tokenizer


def _why_not_mask(token: str, tokenizer: PreTrainedTokenizerBase, frozen: int | None) -> str | None:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        return "the tokenizer has no such token"
    if not is_special(tokenizer, token_id):
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
    word = encode(tokenizer, [MASK_INIT_WORD], inside=True)[0]
    if len(word) != 1 or word == [tokenizer.unk_token_id]:
        word = [token_id for token_id in token_ids(tokenizer).tolist() if token_id != mask_id]
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table[mask_id] = table[word].mean(0, dtype=torch.float32)


@torch.no_grad()
def _suppress_mask(model: PreTrainedModel, weights: dict | None = None) -> None:
    """Have samplers other than ours not predict [MASK], whose logit is never trained.

    `model.generate` of transformers gets a list of tokens to suppress. A sampler that looks at the bare logits finds
    [MASK], where the head is not tied to the embedding, to be the mean of the other tokens: its logit is the mean of
    theirs, so it is never the best token, and its probability at most 1 / V by Jensen's inequality.

    Args:
        weights: the state dict to change, where the model itself holds only shards of it.
    """
    mask_id, head = mask_id_of(model), model.get_output_embeddings()
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*suppressed, mask_id})
    if head.weight is model.get_input_embeddings().weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    for kind, own in head.named_parameters():
        table = own.data if weights is None else weights.get(f"{name}.{kind}")
        if table is not None:  # only the main process has gathered weights
            others = torch.arange(len(table), device=table.device) != mask_id
            table[mask_id] = table[others].mean(0, dtype=torch.float32)


@torch.no_grad()
def check_attention(model: PreTrainedModel, length: int = 8) -> None:
    """Prove by perturbing tokens that this model obeys an additive mask, and that its head is where we look.

    With the closed mask no logit may change when a later token changes; with the open one every logit must
    change when any token changes; without a mask a model that is not causal must do as with the open one; and
    the head on the hidden states must give the model's own logits, small ones and large ones.

    Raises:
        ValueError: one of the four does not hold, or the model cannot take such a mask; the message says which.
    """
    pick_device(model.device)
    with eval_mode(model):
        _prove(model, length)


def _prove(model: PreTrainedModel, length: int) -> None:
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

    ours = model.get_output_embeddings()(hidden.to(model.dtype)).float()
    for scale in (1.0, LARGE_LOGIT / float(ours.abs().max())):  # a soft cap shows in large logits only
        _check_head(model, batch, mask, hidden.to(model.dtype), scale)


def _check_head(model: PreTrainedModel, tokens: Tensor, mask: Tensor, hidden: Tensor, scale: float) -> None:
    """Compare the model's own logits with its head alone, both on hidden states times `scale`."""
    head = model.get_output_embeddings()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    handle = head.register_forward_pre_hook(lambda _, given: (given[0] * scale, *given[1:]))
    try:
        own = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
        ours = head(hidden).float()
    finally:
        handle.remove()
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise ValueError(f"{type(model).__name__} does more to its hidden states than apply its head")


def _try_hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    try:
        return hidden_states(model, tokens, mask).float()
    except MODEL_ERRORS as error:
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    weights: dict | None = None,
    *,
    published_names: bool = True,
) -> None:
    """Write config, safetensors weights and tokenizer; `load_diffusion` gives back the same logits.

    Args:
        weights: the state dict to write, where the model itself holds only shards of it.
        published_names: name weights as published checkpoints of the family do, which differs from the module's own
            names in mixtures of experts.
    """
    path = os.path.expanduser(path)
    if mask_id_of(model) is not None:
        _suppress_mask(model, weights)
    _make_savable(model)
    size = {} if published_names else {"max_shard_size": 2**60}  # a run reads its own checkpoints from one file
    model.save_pretrained(path, state_dict=weights, save_original_format=published_names, **size)
    tokenizer.save_pretrained(path)


def _make_savable(model: PreTrainedModel) -> None:
    """Change what transformers refuses to save in the generation config, as many published models have it."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # a temperature without it
    try:
        config.validate(strict=True)
    except ValueError:  # the tokens alone
        kept = ("bos_token_id", "eos_token_id", "suppress_tokens")
        model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in kept})


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
