"""Texts to token ids and back, without a space or a special token that the text does not have."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every block: the tokenizer's bos, else its eos (GPT-2 uses one for both)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a begin nor an end token; set tokenizer.bos_token before adapting")


def is_special(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> bool:
    """Whether a token was added as a special one, which plain text never contains."""
    added = tokenizer.added_tokens_decoder
    return isinstance(token_id, int) and token_id in added and added[token_id].special


def token_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids that have a token, `[n]` long, ascending. There may be gaps, so the largest may be above n - 1."""
    return _token_ids(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _token_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Cached, since it takes half a second for 150,000 tokens; adding a token changes the size."""
    return torch.tensor(sorted(tokenizer.get_vocab().values()))


def unused_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """The ids below `rows` without a token, `[k]` long: gaps, and rows that only pad an embedding."""
    unused = torch.ones(rows, dtype=torch.bool)
    ids = token_ids(tokenizer)
    unused[ids[ids < rows]] = False
    return unused.nonzero()[:, 0]


# --------------------------------------------------------------------------------------- text to ids and back
def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, inside: bool = False, special: bool = False
) -> list[list[int]]:
    """Token ids of plain text: a document that mentions "[MASK]" gets the letters, never the special token.

    Some tokenizers put a space before every text (Llama 2's, Mistral's). A text that begins a sequence gets it; a text
    inside of a sequence does not, so that the pieces of one text, cut anywhere, decode to that text.

    Args:
        inside: whether the texts continue another text.
        special: whether the name of a special token stands for the token, as in a rendered chat.
    """
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]  # no half characters
    with plain_backend(tokenizer) as backend, _without_prefix(backend) as prefix:
        prefix = "" if inside else prefix
        backend.encode_special_tokens = not special
        encodings = backend.encode_batch_fast(
            [prefix + text if text else "" for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text of token ids, without special tokens and without the space that `encode` put before the first text.

    Args:
        before: the token ids before them. Without any, the text begins here.
    """
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = tokenizer.decode([*before, *ids], **options)
    if len(before):
        return text[len(tokenizer.decode(before, **options)) :]
    with plain_backend(tokenizer) as backend:
        probe = backend.encode(PROBE, add_special_tokens=False).ids
    keeps_prefix = tokenizer.decode(probe, **options) == " " + PROBE
    return text.removeprefix(" ") if keeps_prefix else text


PROBE = "a a"  # shows whether a tokenizer puts a space before a text, and whether it keeps the spaces within


@contextlib.contextmanager
def _without_prefix(backend: Tokenizer) -> Iterator[str]:
    """The backend, temporarily without the space that it puts before every text; yields that space, or nothing."""
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    shell = Tokenizer(models.BPE())  # the two parts without the vocabulary
    shell.normalizer, shell.pre_tokenizer = normalizer, pre_tokenizer
    settings = json.loads(shell.to_str())
    plain = settings | {part: _plain_settings(settings[part]) for part in ("normalizer", "pre_tokenizer")}
    if plain == settings:
        yield ""
        return
    shell = Tokenizer.from_str(json.dumps(plain))
    usual = backend.encode(PROBE, add_special_tokens=False).ids
    try:
        backend.normalizer, backend.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
        for prefix in ("", " "):
            if backend.encode(prefix + PROBE, add_special_tokens=False).ids == usual:
                yield prefix
                return
        # it puts the space before each word, and knows no other
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
        yield ""
    finally:
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer


def _plain_settings(part: Any) -> Any:
    """The settings of a normalizer or pre-tokenizer that neither adds nor removes a space at the ends of a text."""
    match part:
        case {"type": "Prepend" | "Strip"}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
        case {"type": "Sequence", "normalizers": inner}:
            return part | {"normalizers": [plain for one in inner if (plain := _plain_settings(one))]}
        case {"type": "Sequence", "pretokenizers": inner}:
            return part | {"pretokenizers": [plain for one in inner if (plain := _plain_settings(one))]}
    return part


@contextlib.contextmanager
def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """The tokenizer's backend, temporarily without special tokens in texts, truncation and padding."""
    backend = require_backend(tokenizer)
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    model, plain_model = backend.model, _plain_model(tokenizer, len(tokenizer))
    if plain_model is not None:
        backend.model = plain_model
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        if plain_model is not None:
            backend.model = model
        backend.encode_special_tokens = special
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


@functools.lru_cache(maxsize=8)
def _plain_model(tokenizer: PreTrainedTokenizerBase, size: int) -> models.Model | None:
    """A Unigram model that finds no special token in a text; None for the other kinds, which find none anyway.

    Unigram models find every piece of their vocabulary, and special tokens are among them. Here these have other names.
    """
    backend = require_backend(tokenizer)
    if not isinstance(backend.model, models.Unigram):
        return None
    state = json.loads(backend.to_str())["model"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    state["vocab"] = [["\0" * (piece in special) + piece, score] for piece, score in state["vocab"]]
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": state})).model


def require_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's backend in Rust. Raises ValueError for a tokenizer that is written in Python, such as ByT5's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is written in Python and has no backend in Rust (a tokenizer.json), which "
            "texts are read with here; choose a model that has one"
        )
    return backend


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does to plain text; an added special token such as [MASK] does not change it."""
    state = json.loads(require_backend(tokenizer).to_str())
    relevant = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    relevant["words"] = [token["content"] for token in state["added_tokens"] if not token["special"]]
    if MASK in (token["content"] for token in state["added_tokens"] if token["special"]) and isinstance(
        state["model"]["vocab"], dict
    ):
        state["model"]["vocab"].pop(MASK, None)  # where `add_mask` had to put it
    content = json.dumps([relevant, begin_id(tokenizer)], sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=16).hexdigest()


# --------------------------------------------------------------------------------------------------- [MASK]
MASK = "[MASK]"


def add_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make "[MASK]" the mask token, in place, under an id that no other token has.

    Raises:
        ValueError: "[MASK]" is an ordinary token, which texts may contain.
    """
    backend, ids = require_backend(tokenizer), token_ids(tokenizer)
    token_id = tokenizer.get_vocab().get(MASK)
    if token_id is not None and not is_special(tokenizer, token_id):
        raise ValueError(f"{MASK!r} is an ordinary token of this tokenizer; pass another special token as mask_token")
    if token_id is None and ids[-1] >= len(ids):
        # The backend takes the number of tokens for a free id, which it is not where ids have gaps. A token of the
        # vocabulary keeps its id.
        state = json.loads(backend.to_str())["model"]
        state["vocab"][MASK] = int(ids[-1]) + 1
        backend.model = Tokenizer.from_str(json.dumps({"version": "1.0", "model": state})).model
    tokenizer.add_special_tokens({"mask_token": MASK})
