import hashlib
import json
import math
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dalm_utils import corpus
from dalm_utils.corpus import Blocks, Corpus, load_corpus
from dalm_utils.documents import SPLITS, identify
from dalm_utils.hubs import BASES
from dalm_utils.tokens import encode
from tests.helpers import TEXTS, tiny_diffusion, tiny_tokenizer
from tests.test_documents import write_lines

MANY = [{"text": f"{text} {'xy' * n}"} for n, text in enumerate(TEXTS * 9)]


def visible(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_an_empty_file_and_a_text_too_short_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no document to train on"):
        load_corpus(str(tmp_path / "empty.jsonl"), tiny_tokenizer(), cache=tmp_path / "cache")
    short = load_corpus(write_lines(tmp_path / "short.jsonl", [{"text": TEXTS[0]}]), tiny_tokenizer(), cache=tmp_path)
    count = short.facts["tokens"]["train"]
    with pytest.raises(
        ValueError,
        match=rf"the train split of .*short\.jsonl' has {count} tokens, in 1 of 1 documents, too few for one block of "
        rf"512: use a length of at most {count + 1}, or a text with about {math.ceil(511 / count)} times as many",
    ):
        short.blocks("train", 512)
    assert len(short.blocks("train", count + 1)) == 1
    with pytest.raises(
        ValueError, match=r"validation split .* is empty, since the text is 1 document: cut it into three"
    ):
        short.blocks("validation", 8)
    for length, limit in ((1, None), (8, 0)):
        with pytest.raises(ValueError, match=f"got {length} and {limit}"):
            short.blocks("train", length, limit)


def test_blocks_begin_with_the_begin_token_and_lose_no_token_between_them():
    blocks = Blocks(np.arange(10, 31), length=6, begin=0)
    assert len(blocks) == 4
    assert blocks[1].tolist() == [0, 15, 16, 17, 18, 19]
    assert blocks[[0, 3]][:, 1].tolist() == [10, 25]
    for outside in (4, -1):
        with pytest.raises(IndexError):
            blocks[outside]
    with pytest.raises(ValueError, match="too few for one block"):
        Blocks(np.arange(4), length=6, begin=0)


def test_a_slice_of_blocks_gives_as_many_as_there_are():
    blocks = Blocks(np.arange(10, 31), length=6, begin=0)
    assert blocks[1:3].tolist() == blocks[[1, 2]].tolist() and blocks[:100].tolist() == blocks[[0, 1, 2, 3]].tolist()
    assert blocks[4:].shape == (0, 6)


def test_a_limit_draws_blocks_from_all_over_a_text_and_always_the_same():
    tokens = np.arange(1, 50_001)
    large, small = (Blocks(tokens, length=6, begin=0, limit=limit) for limit in (300, 64))
    numbers = ((large[:][:, 1] - 1) // 5).numpy()  # of the 10,000 blocks there are
    assert len(large) == 300 == len(set(numbers)) and numbers.min() >= 0 and numbers.max() < 10_000
    tenths = np.bincount(numbers // 1000, minlength=10)
    assert tenths.sum() == 300 and tenths.min() > 30 - 4 * 27**0.5  # each of ten parts as often as any other
    assert small[:].equal(large[:64])  # the beginning of a sample is a sample
    torch.manual_seed(5)
    other = Blocks(tokens[::-1] + 1, length=6, begin=0, limit=300)  # another text and another run
    assert other._starts(np.arange(300)).tolist() == large._starts(np.arange(300)).tolist()
    for limit in (None, 10_000, 10_001):
        assert Blocks(tokens, length=6, begin=0, limit=limit)[[0, 1, 9_999]][:, 1].tolist() == [1, 6, 49_996]
    with pytest.raises(IndexError, match="no block 64 among 64"):
        small[64]


class Read(np.ndarray):
    """Tokens that record which of them are read."""

    seen: ClassVar[list[slice]] = []

    def __getitem__(self, index):
        self.seen.append(index)
        return np.asarray(self)[index]


def test_a_block_lies_in_the_document_that_holds_its_middle():
    draws = np.random.default_rng(0)
    tokens = draws.integers(1, 9, 4000)
    tokens[[7, 8, 50, 51, 52, 400, 1500, 3000]] = 0
    for limit in (None, 40):
        blocks = Blocks(tokens, length=17, begin=0, limit=limit)
        middles = blocks._starts(np.arange(len(blocks))) + 8
        brute = [next((p for p in range(m, 4000) if tokens[p] == 0), 3999) for m in middles]
        assert blocks.documents.tolist() == brute and len(set(brute)) > 3


def test_the_documents_of_a_few_blocks_are_found_without_reading_the_others(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    tokens = np.ones(10**6, dtype=np.uint16)
    tokens[499::500] = 0
    blocks = Blocks(tokens.view(Read), length=50, begin=0, limit=20)
    Read.seen.clear()
    assert (blocks.documents % 500 == 499).all() and len(set(blocks.documents)) > 15
    assert sum(len(range(*piece.indices(10**6))) for piece in Read.seen) <= 20 * 500


def test_special_tokens_in_a_text_are_only_letters():
    _, tokenizer = tiny_diffusion()
    (ids,) = encode(tokenizer, ["a [MASK] and <|endoftext|>"])
    assert tokenizer.mask_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a [MASK] and <|endoftext|>"


def test_padding_and_truncation_of_a_tokenizer_do_not_reach_a_text():
    tokenizer = tiny_tokenizer()
    plain = encode(tokenizer, TEXTS[:2])
    tokenizer.pad_token = tokenizer.eos_token
    limits = dict(padding="max_length", truncation=True, max_length=5)
    assert [len(ids) for ids in tokenizer(TEXTS[:2], **limits).input_ids] == [5, 5]
    before = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    assert None not in before and encode(tokenizer, TEXTS[:2]) == plain
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == before


def test_text_full_of_latex_keeps_every_byte(tmp_path):
    formula = r"$\mathcal{L}_{\theta}=\int_0^{\infty}\!\frac{\partial^2 u}{\partial x^2}\,{\rm d}x$ @xmath0 , @xcite ."
    texts = [f"{formula}\n\n\t\\begin{{align}} a_{{{n}}} &= b^{{{n}}} \\\\ \\end{{align}}  ~é ∑ 𝔽" for n in range(60)]
    tokenizer = AutoTokenizer.from_pretrained(BASES / "tiny-gpt2")
    made = load_corpus(write_lines(tmp_path / "t.jsonl", [{"article": t} for t in texts]), tokenizer, cache=tmp_path)
    assert sum(made.facts["documents"].values()) == 60 and made.facts["copies"] == 0  # all of the same few words
    written = []
    for split in SPLITS:
        tokens = made.blocks(split, 2).tokens
        pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_token_id) + 1)[:-1]
        written += [tokenizer.decode(piece[:-1], clean_up_tokenization_spaces=False) for piece in pieces]
    assert sorted(written) == sorted(texts)


SUMS = [f"Question: what is {n % 97} plus {n}? Answer: {n % 97 + n}" for n in range(5000)]


@pytest.mark.parametrize("texts, rule", [(SUMS, "text"), (SUMS[:40], "rank of text"), (TEXTS[:30], "rank of words")])
def test_every_split_of_a_text_of_short_or_few_documents_has_blocks(tmp_path, texts, rule):
    source = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert made.facts["split_by"] == rule and sum(made.facts["documents"].values()) == len(texts)
    held_out = len(texts) // 50 if rule == "text" else len(texts) // 10
    for split in ("validation", "test"):
        assert made.facts["documents"][split] == pytest.approx(held_out, rel=0.3)
        assert len(made.blocks(split, 16)) >= 1
        with pytest.raises(ValueError, match=r"use a length of at most \d+, or a text with about \d+ times as many"):
            made.blocks(split, 2**16)
    ids = [set(), set(), set()]
    for split, found in zip(SPLITS, ids, strict=True):
        tokens = made.blocks(split, 2).tokens
        found |= {bytes(piece) for piece in np.split(tokens, np.flatnonzero(tokens == made.begin) + 1)}
        assert made.facts["tokens"][split] == len(tokens)
    assert not (ids[0] & ids[1] | ids[0] & ids[2] | ids[1] & ids[2]) - {b""}


def test_a_text_of_two_documents_trains_and_says_what_a_test_split_needs(tmp_path):
    source = write_lines(tmp_path / "two.jsonl", [{"text": TEXTS[0]}, {"text": TEXTS[1]}])
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert made.facts["documents"] == {"train": 1, "validation": 1, "test": 0}
    with pytest.raises(ValueError, match=r"the test split of .* is empty, since the text is 2 documents: cut it into"):
        made.blocks("test", 16)


def test_a_text_that_an_earlier_version_prepared_stays_as_it_is_unless_nothing_could_be_trained_on_it(tmp_path):
    source = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS[:30]])
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    contents = {split: made.blocks(split, 2).tokens.tobytes() for split in SPLITS}
    facts = {key: value for key, value in made.facts.items() if key != "split_by"}

    def write(train, validation, test):
        """The prepared text with these documents in each split, as before facts had "split_by"."""
        for split, parts in zip(SPLITS, (train, validation, test), strict=True):
            (made.folder / f"{split}.bin").write_bytes(b"".join(contents[part] for part in parts))
            facts["tokens"] = {**facts["tokens"], split: sum(made.facts["tokens"][part] for part in parts)}
            facts["documents"] = {**facts["documents"], split: sum(made.facts["documents"][part] for part in parts)}
        (made.folder / "facts.json").write_text(json.dumps(facts))

    write(["train"], ["validation", "test"], [])
    kept = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert kept.facts == facts
    with pytest.raises(
        ValueError, match=r"is empty: an earlier version .* Delete '.*/cache/t-.*' to have it split anew"
    ):
        kept.blocks("test", 16)
    write(["train", "validation", "test"], [], [])
    again = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert {**again.facts, "seconds": 0} == {**made.facts, "seconds": 0}


@pytest.mark.slow
def test_the_tokens_are_those_of_one_text_after_another_whatever_the_threads(tmp_path, monkeypatch):
    source, digests = write_lines(tmp_path / "t.jsonl", MANY), set()
    for threads, characters in ((1, 2**18), (1, 100), (5, 300), (5, 2**18)):
        monkeypatch.setattr(corpus, "THREADS", threads)
        monkeypatch.setattr(corpus, "BATCH", characters)
        made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / f"cache{threads}-{characters}")
        digests.add(made.facts["digest"])
    serial = hashlib.blake2b(digest_size=8)
    for line in MANY:
        (ids,) = encode(tiny_tokenizer(), [line["text"].strip()])
        serial.update(np.array([*ids, made.begin], dtype=np.uint16).tobytes())
    assert digests == {serial.hexdigest()}


def test_batches_are_read_no_faster_than_they_are_used():
    read = []
    with corpus.ThreadPoolExecutor(2) as pool:
        batches = (read.append(n) or [n] for n in range(100))
        for used, (batch, result) in enumerate(corpus._in_order(pool, lambda batch: [batch[0] ** 2], batches)):
            assert batch == [used] and result == [used**2] and len(read) <= used + 2 * corpus.THREADS
    assert len(read) == 100


def test_a_corpus_is_made_once_whole_and_found_again(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "t.jsonl", [*MANY, b"{", MANY[0]])
    tokenizer = tiny_tokenizer()
    made = load_corpus(source, tokenizer, cache=tmp_path / "cache")
    assert made.facts["skipped"] == {"not JSON": 1} and sum(made.facts["documents"].values()) == len(MANY)
    assert made.facts["copies"] == 1 and visible(tmp_path / "cache") == [made.folder.name]
    ids = made.blocks("train", 32).tokens
    assert (
        len(ids) == made.facts["tokens"]["train"]
        and (ids == tokenizer.eos_token_id).sum() == made.facts["documents"]["train"]
    )
    assert made.facts["bytes"]["train"] == len(tokenizer.decode(ids, skip_special_tokens=True).encode())

    monkeypatch.setattr(corpus, "_write", None)  # found again, nothing is written
    assert load_corpus(source, tokenizer, cache=tmp_path / "cache").folder == made.folder
    adapted = tiny_diffusion()[1]  # with [MASK]: the same tokens, so the same cache
    assert load_corpus(source, adapted, cache=tmp_path / "cache").folder == made.folder
    monkeypatch.undo()
    other = tiny_tokenizer()
    other.add_tokens("matrix")  # a word of its own changes what becomes of a text
    assert load_corpus(source, other, cache=tmp_path / "cache").folder != made.folder
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "t.jsonl").read_bytes())
    assert load_corpus(str(moved), tokenizer, cache=tmp_path / "cache").facts["digest"] == made.facts["digest"]
    monkeypatch.setattr(corpus, "VERSION", 99)
    assert load_corpus(source, tokenizer, cache=tmp_path / "cache").folder != made.folder


def test_a_text_is_made_anew_when_its_field_its_file_or_its_packages_change(tmp_path, monkeypatch):
    file = tmp_path / "t.jsonl"
    source = write_lines(file, [{**row, "title": row["text"][::-1]} for row in MANY])
    made, title = (load_corpus(source, tiny_tokenizer(), field=field, cache=tmp_path) for field in ("text", "title"))
    assert made.facts["digest"] != title.facts["digest"]
    changed = file.stat().st_mtime_ns + 1
    file.write_bytes(file.read_bytes().replace(b"Return the", b"Result the"))  # of the same size
    os.utime(file, ns=(changed, changed))
    assert load_corpus(source, tiny_tokenizer(), cache=tmp_path).facts["digest"] != made.facts["digest"]
    now = {text: identify(text, "text") for text in ("docstrings", "mathematics")}
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert all(identify(text, "text") != installed for text, installed in now.items())


def test_documents_that_were_left_out_are_said_in_one_sentence(tmp_path):
    source = write_lines(tmp_path / "t.jsonl", [*MANY, b"{", *MANY[:2], b"", b"{"])
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    first = f"t.jsonl:{len(MANY) + 1}"
    assert made.about_left_out() == (
        f"left out of {source!r}: 5 of {len(MANY) + 5} documents: 2 not JSON (the first at {first}), 1 empty "
        "document, 2 copies"
    )
    whole = load_corpus(write_lines(tmp_path / "whole.jsonl", MANY), tiny_tokenizer(), cache=tmp_path / "cache")
    assert whole.about_left_out() == ""


def test_near_copies_among_docstrings_are_to_be_expected_and_not_said(tmp_path):
    facts = {"name": "docstrings", "skipped": {}, "skipped_at": [], "copies": 9_000, "documents": {"train": 18_000}}
    assert Corpus(tmp_path, facts, 0).about_left_out() == ""


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_file_may_have_the_longest_name_there_is(tmp_path, letter):
    stem = letter * (249 // len(letter.encode()))  # with its ending nearly 255 bytes
    made = load_corpus(write_lines(tmp_path / f"{stem}.jsonl", MANY), tiny_tokenizer(), cache=tmp_path / "cache")
    assert made.folder.name.startswith(letter * 64) and made.facts["name"].endswith(f"{stem}.jsonl")


def test_ids_beyond_16_bits_are_kept(tmp_path):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0")
    source = write_lines(tmp_path / "t.jsonl", [{"text": " ".join(f"w{i}" for i in range(69_900, 70_000))}])
    made = load_corpus(source, tokenizer, cache=tmp_path)
    assert made.blocks("train", 2).tokens.tolist() == [*range(69_900, 70_000), 0]


def test_ids_beyond_16_bits_are_kept_in_a_vocabulary_with_gaps(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 70_000}, unk_token="a")), bos_token="a", eos_token="a"
    )
    source = write_lines(tmp_path / "t.jsonl", [{"text": "b"}])
    assert load_corpus(source, tokenizer, cache=tmp_path).blocks("train", 2).tokens.tolist() == [70_000, 0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: os.truncate(file, 100),
        lambda file: os.truncate(file.with_name("facts.json"), 0),
        lambda file: file.with_name("facts.json").write_text("{}"),
    ],
)
def test_a_text_that_lost_tokens_is_made_again(tmp_path, damage):
    source = write_lines(tmp_path / "t.jsonl", MANY)
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    before = (made.folder / "train.bin").read_bytes()
    damage(made.folder / "train.bin")
    again = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert (again.folder / "train.bin").read_bytes() == before and again.facts["digest"] == made.facts["digest"]


def test_a_failed_build_leaves_nothing(tmp_path):
    source = write_lines(tmp_path / "none.jsonl", [b"{"] * 5)
    with pytest.raises(ValueError, match="no document to train on"):
        load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


HELD = """
import sys
from transformers import AutoTokenizer
from dalm_utils import corpus

pack, batches, corpus.BATCH, corpus.THREADS = corpus._pack, iter(range(1000)), 500, 1

def held(*given):
    if next(batches) == 5:
        print("held", flush=True)
        sys.stdin.readline()
    return pack(*given)

corpus._pack = held
corpus.load_corpus(sys.argv[2], AutoTokenizer.from_pretrained(sys.argv[1]), cache=sys.argv[3])
"""


@pytest.fixture
def held(tmp_path):
    """Starts a process that prepares a text, and holds it in the middle of that until it gets a line to read."""
    source, begun = write_lines(tmp_path / "t.jsonl", MANY), []
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def start(cache):
        command = [sys.executable, "-c", HELD, str(tmp_path / "tokenizer"), source, str(cache)]
        begun.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert begun[-1].stdout.readline() == b"held\n" and list(cache.glob("*.unfinished/train.bin"))
        return source, begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_preparation_begins_again_cleanly(tmp_path, held):
    source, process = held(tmp_path / "cache")
    process.kill()
    process.wait()
    assert len(list((tmp_path / "cache").glob(".*.unfinished"))) == 1 and not visible(tmp_path / "cache")
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == [made.folder.name]
    assert not list((tmp_path / "cache").glob(".*.unfinished"))
    undisturbed = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "other")
    assert made.facts["digest"] == undisturbed.facts["digest"]


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_takes_what_it_made(tmp_path, held, monkeypatch):
    def let_go(message):
        assert "another process is preparing" in message
        process.stdin.write(b"go\n")
        process.stdin.flush()

    source, process = held(tmp_path / "cache")
    monkeypatch.setattr(corpus, "_write", None)
    monkeypatch.setattr(corpus, "warn", let_go)  # it says that it waits
    made = load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert process.wait() == 0 and sum(made.facts["documents"].values()) == len(MANY)
