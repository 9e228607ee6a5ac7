"""Prompt/answer pairs in, token rows out: read, tokenized piece by piece, split by prompt, and kept in the cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import RunConfig
from .corpus import SAMPLE_SEED, prepared
from .documents import (
    FEW,
    SPLITS,
    MissingField,
    Skips,
    SplitRule,
    about_left_out,
    content_of,
    digest,
    identify,
    records,
    split_at,
    split_few,
)
from .tokens import MASK, begin_id, decode, encode, token_ids, tokenizer_digest

VERSION = 2  # of this file's output: raise it when a change alters what is written
FORMS = (("prompt", "response"), ("messages",))  # the fields that are looked for when none are named
PROMPT, ANSWER, END = range(3)  # the role of a token; END is an answer's, too, and ends the pair
BATCH = 1000  # pairs that are tokenized together
TODAY = {  # 26 July 2024, in English, for templates that print the date: a text must be the same every day
    "%a": "Fri", "%A": "Friday", "%b": "Jul", "%B": "July", "%d": "26", "%-d": "26", "%m": "07", "%-m": "7",
    "%y": "24", "%Y": "2024", "%j": "208", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
CLOCK = (  # put before a template, it replaces the function `strftime_now` of transformers, which asks the machine
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in TODAY.items())
    + " }}{% endmacro +%}"
)


class Pair(NamedTuple):
    """One pair, or one conversation, as text."""

    pieces: list[tuple[str, bool]]  # in order; whether each is an answer
    chat: bool  # rendered by a chat template: in its text the name of a special token stands for the token


# -------------------------------------------------------------------------------------------------- rows
class PairRows(NamedTuple):
    """Pairs as sequences, padded on the right with the end token, which is also the begin token."""

    tokens: Tensor  # [B, L] long; position 0 is the begin token
    answers: Tensor  # [B, L] bool: the tokens of answers, and the end token after the last one
    real: Tensor  # [B, L] bool: not padding

    def trimmed(self) -> PairRows:
        """Without the columns on the right in which every sequence is padding."""
        longest = int(self.real.sum(1).max())
        return PairRows(*(column[:, :longest] for column in self))


class Pairs:
    """The pairs of a split that fit into `length` tokens. `pairs[[i, j, ...]]` and `pairs[i:j]` are `PairRows`.

    Args:
        tokens, roles: `[T]` of integers, such as memory-mapped files: all pairs in a row, without begin tokens.
        limit: how many pairs to draw, all equally likely and none twice; None takes all. See `Blocks`.

    Attributes:
        total: how many pairs the split has, dropped ones and those beyond the limit included.
        dropped: `[D]` where in `tokens` the pairs begin that are longer than `length`.
        longest: the number of tokens of the longest pair, dropped or not, begin and end token included.
        answers: `[N]` the tokens of answers in each pair, end token included.
    """

    def __init__(self, tokens: np.ndarray, roles: np.ndarray, length: int, begin: int, limit: int | None = None):
        self.tokens, self.roles, self.length, self.begin = tokens, roles, length, begin
        ends = np.flatnonzero(roles == END) + 1
        sizes = np.diff(ends, prepend=0)
        fits = sizes < length  # the begin token needs a place, too
        self.total, self.dropped, self.longest = len(ends), (ends - sizes)[~fits], int(sizes.max(initial=0)) + 1
        answers = np.add.reduceat(roles != PROMPT, ends - sizes, dtype=np.int64) if len(ends) else ends
        kept = np.flatnonzero(fits)
        if limit is not None and limit < len(kept):
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(SAMPLE_SEED))
            kept = kept[order[:limit].numpy()]
        self.starts, self.sizes, self.answers = (ends - sizes)[kept], sizes[kept], answers[kept]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index) -> PairRows:
        rows = np.atleast_1d(np.arange(len(self))[index])
        places = np.arange(self.length - 1)
        inside = places < self.sizes[rows, None]  # [B, L - 1]
        places = (self.starts[rows, None] + places).clip(max=len(self.tokens) - 1)
        tokens = np.where(inside, self.tokens[places], self.begin).astype(np.int64)
        answers = inside & (self.roles[places] != PROMPT)
        columns = (tokens, self.begin), (answers, False), (inside, True)
        return PairRows(*(torch.from_numpy(np.insert(x, 0, first, axis=1)) for x, first in columns))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """`[N]`: equal for pairs with the same prompt, which count as one where errors are computed."""
        numbers: dict[bytes, int] = {}
        prompts = (self.prompt(i).tobytes() for i in range(len(self)))
        return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])

    @property
    def longest_answer(self) -> int:
        """The most tokens of answers in one pair, end token included."""
        return int(self.answers.max(initial=0))

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt `[n]` and answer `[m]` of pair i, the end token included; of a chat the last answer."""
        own = slice(self.starts[i], self.starts[i] + self.sizes[i])
        given = int(np.flatnonzero(self.roles[own] == PROMPT).max(initial=-1)) + 1
        return self.tokens[own][:given], self.tokens[own][given:]

    def prompt(self, i: int) -> np.ndarray:
        """The token ids before the first answer of pair i."""
        own = slice(self.starts[i], self.starts[i] + self.sizes[i])
        return self.tokens[own][: int((self.roles[own] != PROMPT).argmax())]

    def about_dropped(self, tokenizer: PreTrainedTokenizerBase, split: str) -> str:
        """A sentence about the pairs that are longer than a sequence; empty if there are none."""
        if not len(self.dropped):
            return ""
        first = decode(tokenizer, self.tokens[self.dropped[0] :][:16].tolist())
        return (
            f"{len(self.dropped)} of {self.total} {split} pairs are longer than length={self.length} and left out, the "
            f"first one begins {first!r}; the longest has {self.longest} tokens"
        )


@dataclass(frozen=True)
class PairCorpus:
    """Tokenized pairs on disk, in three splits, with the facts about them."""

    folder: Path
    facts: dict
    begin: int

    def about_spelled(self) -> str:
        """A sentence about prompts and responses that name special tokens; empty if there are none."""
        spelled = self.facts.get("spelled") or {}  # pairs that an earlier version prepared do not say
        named = ", ".join(f"{word!r} in {count}" for word, count in spelled.items())
        return named and f"special tokens named by pairs are read as letters: {named}; write chats as `messages`"

    def about_left_out(self) -> str:
        """A sentence about pairs that were skipped or dropped, whatever the length; empty if there are none."""
        return about_left_out(self.facts, "pairs")

    def pairs(self, split: str, length: int, limit: int | None = None) -> Pairs:
        """The pairs of a split ("train", "validation" or "test") that fit into `length` tokens.

        Raises:
            ValueError: there are none.
        """
        pairs = self.all_pairs(split, length, limit)
        if len(pairs):
            return pairs
        name = self.facts["name"]
        if len(pairs.dropped):
            raise ValueError(
                f"no {split} pair of {name!r} has at most {length} tokens, the longest of {len(pairs.dropped)} has "
                f"{pairs.longest}: use a greater length, or shorter pairs"
            )
        total = sum(self.facts["documents"].values())
        raise ValueError(
            f"the {split} split of {name!r} is empty, since there are {total} pairs: it takes three different prompts"
        )

    def all_pairs(self, split: str, length: int, limit: int | None = None) -> Pairs:
        """The pairs of a split that fit into `length` tokens; there may be none."""
        dtype, count = np.dtype(self.facts["dtype"]), self.facts["tokens"][split]
        stored = np.memmap(self.folder / f"{split}.bin", dtype, mode="r") if count else np.empty(0, dtype)
        return Pairs(stored["f0"], stored["f1"], length, self.begin, limit)


# -------------------------------------------------------------------------------------------------- read
def read_pairs(
    source: str, tokenizer: PreTrainedTokenizerBase, field: str = RunConfig.field, skips: Skips | None = None
) -> Iterator[Pair]:
    """The pairs of a source, each of several equal ones once.

    Args:
        source: a .jsonl or .parquet file, or a folder of .parquet files. A record holds a `prompt` and a `response`,
            which are read as they are, one after the other without a space between them; or `messages`, a list of
            {"role": ..., "content": ...}, which the tokenizer's own chat template renders.
        field: other names, "question,answer" for two fields, or "conversation" for messages.
        skips: counts what was skipped: records that cannot be read, and pairs without a prompt or an answer.

    Raises:
        ValueError: the first record has neither form, or both; a later one has another; messages without a template.
    """
    skips = Skips() if skips is None else skips
    fields, seen = None, set()
    for place, record in records(source, _columns(field), skips):
        fields = fields or _fields_of(record, field, tokenizer, place)
        if field == RunConfig.field and _forms_in(record) not in ([], [fields]):
            raise ValueError(
                f"{place} has {_named(_forms_in(record))}, those before it have {_named([fields])}; keep one form in "
                "a file, or name the fields to read (field='prompt,response')"
            )
        try:
            pair = _pair(record, fields, tokenizer)
        except ValueError as error:
            skips.add(place, error)
            continue
        key = digest(json.dumps(pair))
        if key in seen:
            skips.copies += 1
        else:
            seen.add(key)
            yield pair


def is_pairs(source: str, field: str = RunConfig.field) -> bool:
    """Whether the first readable record of a source holds a pair, and not a document."""
    if "," in field:
        return True
    with contextlib.suppress(ValueError, FileNotFoundError):
        for _, record in records(source, _columns(field), Skips()):
            if field != RunConfig.field:
                turns = record.get(field)
                return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) for turn in turns)
            return bool(_forms_in(record)) and field not in record
    return False


def _columns(field: str) -> set[str]:
    """The fields that a pair may have."""
    return set(itertools.chain(*FORMS)) if field == RunConfig.field else set(_names(field))


def _names(field: str) -> tuple[str, ...]:
    """The fields that `field` names, separated by commas."""
    return tuple(name.strip() for name in field.split(","))


def _forms_in(record: dict) -> list[tuple[str, ...]]:
    """The forms whose fields a record has; where all are null, as in rows of a parquet file, it does not have them."""
    return [
        form for form in FORMS
        if all(name in record for name in form) and any(record[name] is not None for name in form)
    ]  # fmt: skip


def _named(forms: Iterable[tuple[str, ...]]) -> str:
    return " and ".join("/".join(form) for form in forms)


def _fields_of(record: dict, field: str, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[str, ...]:
    """The fields that hold a pair: prompt and answer, or messages."""
    fields = _names(field)
    if field == RunConfig.field:
        found = _forms_in(record)
        if len(found) != 1:
            raise ValueError(
                f"{place} has {_named(found) or 'neither prompt/response nor messages'}; name the fields of a pair, "
                f"such as field='question,answer' or field='messages'; there are {', '.join(map(repr, record))}"
            )
        fields = found[0]
    if len(fields) > 2 or not all(fields):
        raise ValueError(f"field names a prompt and an answer ('question,answer'), or messages; got {field!r}")
    if len(fields) == 1 and record.get(fields[0]) is not None and not tokenizer.chat_template:
        raise ValueError(
            f"{place} has messages, but the tokenizer has no chat template to render them with: take a base that was "
            "made for chats, set tokenizer.chat_template and save it, or write prompt and response"
        )
    return fields


def _pair(record: dict, fields: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Pair:
    for name in fields:
        if record.get(name) is None:  # a parquet file has every field in each row
            raise MissingField(name, record)
    if len(fields) == 1:
        return Pair(_chat_pieces(tokenizer, record[fields[0]]), chat=True)
    for name in fields:
        if not isinstance(record[name], str):
            raise ValueError(f"field {name!r} is not a string")
        if not record[name].strip():
            raise ValueError(f"empty {name!r}")
    return Pair([(record[fields[0]], False), (record[fields[1]], True)], chat=False)


# -------------------------------------------------------------------------------------------------- chats
def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Tensor:
    """What a chat model reads before its next answer: `[n]` long, to be given to `generate` as one of its `parts`.

    Args:
        messages: dictionaries with "role" and "content".

    Raises:
        ValueError: no chat template, or messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, or give a plain prompt")
    _check_messages(tokenizer, messages)
    ids = encode(tokenizer, [_render(tokenizer, messages, ask=True)], inside=True, special=True)[0]
    return torch.tensor(_without_begin(tokenizer, ids))


def _chat_pieces(tokenizer: PreTrainedTokenizerBase, messages) -> list[tuple[str, bool]]:
    """A conversation as the template renders it; what is added by each turn of the assistant is an answer."""
    _check_messages(tokenizer, messages)
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["content"].strip():
            raise ValueError("an empty answer")
        before, after = (
            _render(tokenizer, messages[:end], ask=ask) for end, ask in ((number, True), (number + 1, False))
        )
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("the chat template renders earlier turns anew when a conversation grows")
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not pieces:
        raise ValueError("no turn of the assistant")
    return pieces


def _check_messages(tokenizer: PreTrainedTokenizerBase, messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages are not a list of turns")
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise ValueError("a message without a role and a content that are strings")
        for token in _special_words(tokenizer):
            if token in message["content"]:
                raise ValueError(f"a message contains the special token {token!r}")


def _special_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What stands for a token in a rendered chat; [MASK] does so once the tokenizer is a diffusion model's."""
    return [*(token.content for token in tokenizer.added_tokens_decoder.values() if token.special), MASK]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], ask: bool) -> str:
    """The text of a conversation; `ask` adds what comes before the next answer."""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = CLOCK + template
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from None


def _without_begin(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Templates may write the begin token, which position 0 holds already."""
    return ids[1:] if ids[:1] == [begin_id(tokenizer)] else ids


# ------------------------------------------------------------------------------------------------ prepare
def load_pairs(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = RunConfig.field,
    cache: str | Path | None = None,
) -> PairCorpus:
    """The tokenized pairs of a source (see `read_pairs`): from the cache if they are there, else made and put there.

    Pairs with equal prompts lie in one split. After the last answer comes the begin token, which ends a text here, see
    `load_corpus`: a model that is trained on pairs learns to stop by it.

    Raises:
        ValueError: a source without a pair, or as `read_pairs`.
        FileNotFoundError: no such source.
    """
    source = os.fspath(source)
    words = [word for word in _special_words(tokenizer) if word != MASK]
    chat = digest(json.dumps([tokenizer.chat_template, words]))
    facts = {
        "pairs": VERSION,
        "source": identify(source, field),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat": chat,
    }
    folder, facts = prepared(source, facts, cache, lambda place, facts: _write(place, source, field, tokenizer, facts))
    return PairCorpus(folder, facts, begin_id(tokenizer))


def _write(folder: Path, source: str, field: str, tokenizer: PreTrainedTokenizerBase, facts: dict) -> None:
    """Write the tokens of each split and facts.json. Few pairs, or prompts that share their words, go by rank."""
    made = _tokenize(folder, source, field, tokenizer, BY_PROMPT)
    if sum(made["documents"].values()) < FEW or not all(made["documents"].values()):
        prompts = (pair.pieces[0][0] for pair in read_pairs(source, tokenizer, field))
        rule = split_few(prompts, content_of, ("prompt", "exact prompt"))
        made = _tokenize(folder, source, field, tokenizer, rule)
    (folder / "facts.json").write_text(json.dumps({**facts, "name": source, **made}, indent=1))


BY_PROMPT = SplitRule("prompt", lambda prompt: split_at(digest(content_of(prompt))))  # copies stay together


def _tokenize(folder: Path, source: str, field: str, tokenizer: PreTrainedTokenizerBase, rule: SplitRule) -> dict:
    """Stream the pairs onto disk, in order. Returns the facts about what was read and written."""
    skips = Skips()
    dtype = np.dtype(f"uint{16 if token_ids(tokenizer)[-1] + 1 < 2**16 else 32},uint8")  # token and role
    hashed = hashlib.blake2b(rule.name.encode(), digest_size=8)
    special, spelled = _special_words(tokenizer), Counter[str]()
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "answers", "bytes")}
    pairs = read_pairs(source, tokenizer, field, skips)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        while batch := list(itertools.islice(pairs, BATCH)):
            for pair, packed in zip(batch, _pack(tokenizer, batch, dtype), strict=True):
                split = rule.split_of(pair.pieces[0][0])
                files[split].write(packed.tobytes())
                hashed.update(packed.tobytes())
                spelled.update(
                    word for word in special if not pair.chat and any(word in text for text, _ in pair.pieces)
                )
                counts["documents"][split] += 1
                counts["tokens"][split] += len(packed)
                counts["answers"][split] += int((packed["f1"] != PROMPT).sum())
                counts["bytes"][split] += sum(len(text.encode("utf-8", "replace")) for text, _ in pair.pieces)
    if not any(counts["documents"].values()):
        raise ValueError(f"no pair to train on in {source!r}; skipped: {skips}")
    return {
        "dtype": f"{dtype[0]},{dtype[1]}",
        "digest": hashed.hexdigest(),
        "split_by": rule.name,
        **counts,
        "spelled": dict(spelled),
        "copies": skips.copies,
        "skipped": dict(skips.reasons),
        "skipped_at": skips.places,
    }


def _pack(tokenizer: PreTrainedTokenizerBase, batch: list[Pair], dtype: np.dtype) -> list[np.ndarray]:
    """Tokens and roles of each pair, `[n]` records. Pieces are tokenized one by one, as in `generate`."""
    chat, begin = batch[0].chat, begin_id(tokenizer)
    first = encode(tokenizer, [pair.pieces[0][0] for pair in batch], inside=chat, special=chat)
    rest = iter(encode(tokenizer, [text for pair in batch for text, _ in pair.pieces[1:]], inside=True, special=chat))
    packed = []
    for pair, prompt in zip(batch, first, strict=True):
        ids = [_without_begin(tokenizer, prompt), *itertools.islice(rest, len(pair.pieces) - 1)]
        roles = [[ANSWER if answers else PROMPT] * len(own) for (_, answers), own in zip(pair.pieces, ids, strict=True)]
        records = zip([*itertools.chain(*ids), begin], [*itertools.chain(*roles), END], strict=True)
        packed.append(np.array(list(records), dtype))
    return packed
