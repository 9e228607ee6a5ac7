import json

import numpy as np
import pytest

from dalm_utils import corpus
from dalm_utils.corpus import Blocks, Skips, documents, drop_near_copies, encode, load_corpus, split_of
from tests.helpers import TEXTS, tiny_diffusion, tiny_tokenizer


def write_lines(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def test_json_lines_with_every_kind_of_damage_are_counted_and_placed(tmp_path):
    source = write_lines(
        tmp_path / "papers.jsonl",
        [{"article": "one"}, b"{broken", {"other": "x"}, {"article": 5}, {"article": "  "},
         b'{"article": "\xff\xfe"}', b"", [1], {"article": "two"}],
    )  # fmt: skip
    skips = Skips()
    assert list(documents(source, "article", skips)) == ["one", "two"]
    assert skips.reasons == {
        "not JSON": 1, "no field 'article'": 2, "field 'article' is not a string": 1, "empty document": 2,
        "not UTF-8": 1,
    }  # fmt: skip
    assert skips.places[0] == "papers.jsonl:2: not JSON"


def test_past_the_limit_it_is_an_error_that_names_the_places(tmp_path):
    source = write_lines(tmp_path / "bad.jsonl", [b"{"] * 10)
    with pytest.raises(ValueError, match=r"4 of 4 documents cannot be read.*bad\.jsonl:1: not JSON"):
        list(documents(source, skips=Skips(limit=3)))


def test_the_limit_is_a_share_of_what_was_read(monkeypatch):
    skips = Skips(limit=2, read=1000)
    for n in range(10):
        skips.add(f"line {n}", "not JSON")  # 1% of a thousand
    with pytest.raises(ValueError, match="11 of 1000"):
        skips.add("line 10", "not JSON")


def test_one_giant_line_is_passed_over_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 100)
    lines = [{"text": "before"}, {"text": "x" * 1000}, {"text": "y" * 87}, {"text": "after"}]
    source = write_lines(tmp_path / "t.jsonl", lines)
    assert len(json.dumps(lines[2])) + 1 == 100  # with its line end just short enough
    skips = Skips()
    assert list(documents(source, skips=skips)) == ["before", "y" * 87, "after"]
    assert skips.places == ["t.jsonl:2: longer than 0 MiB"]
    read = list(corpus._numbered_lines(tmp_path / "t.jsonl"))
    assert [place for place, _ in read] == [f"t.jsonl:{n}" for n in (1, 2, 3, 4)] and len(read[1][1]) == 101


def test_an_empty_file_and_a_text_too_short_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no document to train on"):
        load_corpus(str(tmp_path / "empty.jsonl"), tiny_tokenizer(), cache=tmp_path / "cache")
    short = load_corpus(write_lines(tmp_path / "short.jsonl", [{"text": TEXTS[0]}]), tiny_tokenizer(), cache=tmp_path)
    with pytest.raises(ValueError, match=r"the train split of .*short\.jsonl' has \d+ tokens, too few .* of 512"):
        short.blocks("train", 512)
    with pytest.raises(ValueError, match=r"the validation split .* has 0 tokens \(it gets 2% of the documents\)"):
        short.blocks("validation", 8)


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "deep" / "b.md").write_text("beta\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xff")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "ignored.png").write_bytes(b"x")
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == ["alpha", "beta"]
    assert skips.places == ["c.txt: not UTF-8", "d.txt: empty document"]


@pytest.mark.parametrize(
    "name, message", [("nowhere.jsonl", "no text at"), ("x.csv", "neither"), ("empty", "has no .txt")]
)
def test_sources_that_are_none(tmp_path, name, message):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(documents(str(tmp_path / name)))


def test_copies_and_near_copies_fall_and_what_is_contained_in_another():
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    original = " ".join(words)
    near = " ".join([*words[:95], "changed", *words[96:]])
    inside = " ".join(words[20:60])
    different = " ".join(reversed(words))
    kept = drop_near_copies([inside, original, near, original.upper(), different])
    assert len(kept) == 2 and different in kept
    assert sorted(kept) == sorted(drop_near_copies([different, near, original, inside]))


def test_a_split_depends_on_the_words_alone():
    assert all(
        split_of(text) == split_of(text.upper().replace(" ", "\n   ")) == split_of(f"{text} 42") for text in TEXTS
    )
    shares = np.unique([split_of(f"document {'abc' * n}") for n in range(4000)], return_counts=True)
    assert dict(zip(*shares, strict=True))["train"] == pytest.approx(0.96 * 4000, rel=0.02)


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


def test_special_tokens_in_a_text_are_only_letters():
    _, tokenizer = tiny_diffusion()
    (ids,) = encode(tokenizer, ["a [MASK] and <|endoftext|>"])
    assert tokenizer.mask_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a [MASK] and <|endoftext|>"


def test_a_corpus_is_made_once_whole_and_found_again(tmp_path, monkeypatch):
    source = write_lines(
        tmp_path / "t.jsonl", [{"text": f"{text} {'xy' * n}"} for n, text in enumerate(TEXTS * 9)] + [b"{"]
    )
    tokenizer = tiny_tokenizer()
    made = load_corpus(source, tokenizer, cache=tmp_path / "cache")
    assert made.facts["skipped"] == {"not JSON": 1} and sum(made.facts["documents"].values()) == len(TEXTS) * 9
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [made.folder.name]
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


def test_a_failed_build_leaves_nothing(tmp_path):
    source = write_lines(tmp_path / "none.jsonl", [b"{"] * 5)
    with pytest.raises(ValueError, match="no document to train on"):
        load_corpus(source, tiny_tokenizer(), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_docstrings_are_many_and_no_two_alike():
    """The real corpus, from the packages installed here."""
    texts = corpus.clean_documents("docstrings")
    assert len(texts) >= 18_261 and sum(map(len, texts)) >= 17_000_000
    assert len(set(map(corpus.normalise, texts))) == len(texts)
    held_out = {split: {corpus.normalise(t) for t in texts if split_of(t) == split} for split in corpus.SPLITS}
    assert not held_out["train"] & held_out["test"] and not held_out["train"] & held_out["validation"]
    assert any("Parameters\n----------" in text for text in texts)
