import json
import subprocess
import sys

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from dalm_utils import documents as module
from dalm_utils.documents import LONGEST_LINE, Skips, documents, drop_near_copies, split_of
from tests.helpers import PATIENCE, TEXTS


def write_lines(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_json_lines_with_every_kind_of_damage_are_counted_and_placed(tmp_path):
    source = write_lines(
        tmp_path / "papers.jsonl",
        [{"article": "one"}, b"{broken", {"other": "x"}, {"article": 5}, {"article": "  "},
         b'{"article": "\xff\xfe"}', b"", [1], b"[" * 10**5, {"article": "two"}],
    )  # fmt: skip
    skips = Skips()
    assert list(documents(source, "article", skips)) == ["one", "two"]
    assert skips.reasons == {
        "not JSON": 2, "no field 'article'": 2, "field 'article' is not a string": 1, "empty document": 2,
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
    monkeypatch.setattr(module, "LONGEST_LINE", 100)
    lines = [{"text": "before"}, {"text": "x" * 1000}, {"text": "y" * 87}, {"text": "after"}]
    source = write_lines(tmp_path / "t.jsonl", lines)
    assert len(json.dumps(lines[2])) + 1 == 100  # with its line end just short enough
    skips = Skips()
    assert list(documents(source, skips=skips)) == ["before", "y" * 87, "after"]
    assert skips.places == ["t.jsonl:2: longer than 0 MiB (cut it into documents)"]
    read = list(module._numbered_lines(tmp_path / "t.jsonl"))
    assert [place for place, _, _ in read] == [f"t.jsonl:{n}" for n in (1, 2, 3, 4)] and len(read[1][2]) == 101
    assert [size for _, size, _ in read] == [len(json.dumps(line)) + 1 for line in lines[:3]] + [
        len('{"text": "after"}')
    ]
    assert skips.bytes == (tmp_path / "t.jsonl").stat().st_size == module.size_of(source)


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "deep" / "b.md").write_text("beta\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xff")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "e.txt").write_bytes(b"x" * (LONGEST_LINE + 2))
    (tmp_path / "ignored.png").write_bytes(b"x")
    (tmp_path / "folder.parquet").mkdir()  # as some programs name the folder of their parts
    (tmp_path / ".#a.txt").symlink_to("nowhere")  # an editor's lock
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == ["alpha", "beta"]
    assert skips.places == [
        "c.txt: not UTF-8", "d.txt: empty document", "e.txt: longer than 4 MiB (cut it into documents)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, message", [("nowhere.jsonl", "no text at"), ("x.csv", "neither"), ("empty", "has no .txt")]
)
def test_sources_that_are_none(tmp_path, name, message):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(documents(str(tmp_path / name)))


def test_an_article_is_found_without_its_field_being_named_and_may_be_a_list_of_lines(tmp_path):
    lines = [{"article": "one"}, {"article": "no", "text": "two"}, {"text": ["three", "four"]}, {"text": [5]}]
    skips = Skips()
    source = write_lines(tmp_path / "arxiv_train-1.jsonl", lines)
    assert list(documents(source, skips=skips)) == ["one", "two", "three\nfour"]
    assert skips.reasons == {"field 'text' is not a string": 1}


def test_a_parquet_file_is_itself_whatever_its_name_looks_like(tmp_path):
    wanted = write_parquet(tmp_path / "[arxiv]" / "papers[1].parquet", [{"text": TEXTS[0]}] * 3)
    write_parquet(tmp_path / "[arxiv]" / "papers1.parquet", [{"text": "another"}])
    assert list(documents(wanted)) == [TEXTS[0]] * 3


def test_parquet_files_alone_and_in_a_folder(tmp_path):
    rows = [{"article": text, "abstract": "short"} for text in (*TEXTS, None, " ")]
    one = write_parquet(tmp_path / "set" / "deep" / "b.parquet", rows)
    write_parquet(tmp_path / "set" / "a.parquet", [{"article": ["first", "second"], "abstract": ""}])
    (tmp_path / "set" / "README.md").write_text("what the set is")
    skips = Skips()
    assert list(documents(one, "article", skips)) == TEXTS
    assert skips.places == [
        f"b.parquet:{len(TEXTS) + 1}: field 'article' is not a string",
        f"b.parquet:{len(TEXTS) + 2}: empty document",
    ]
    numbers = write_parquet(tmp_path / "numbers.parquet", [{"text": 5}, {"text": 6}])
    skips = Skips()
    assert not list(documents(numbers, skips=skips)) and skips.reasons == {"field 'text' is not a string": 2}
    assert list(documents(str(tmp_path / "set"))) == ["first\nsecond", *TEXTS]


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=r"bad\.parquet' cannot be read as parquet"):
        list(documents(str(tmp_path / "bad.parquet")))


def test_formulas_are_no_copies_of_each_other_but_of_themselves(tmp_path):
    formulas = [rf"@xmath{n} $\sum_{{i={n}}}^{{\infty}} \frac{{1}}{{i^{{{n}}}}}$ @xcite" for n in range(5)]
    long = " ".join(TEXTS[:4])
    source = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in [*formulas, formulas[2], long, f"{long} 7"]])
    skips = Skips()
    assert list(module.clean_documents(source, skips=skips)) == [*formulas, long]
    assert skips.copies == 2


def test_normalising_ascii_quickly_changes_nothing():
    everything = "".join(map(chr, range(128)))
    for text in (*TEXTS, everything, everything * 2, r"Let $\alpha_1 \in A$; @xmath0", "", "123"):
        assert module.normalise(text) == module.normalise(f"{text} É").removesuffix("é").rstrip()
    assert module.normalise("Naïve É_tude x2 中文") == "naïve é tude x 中文"


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


def test_docstrings_are_many_and_no_two_alike():
    """The real corpus, from the packages installed here."""
    texts = module.clean_documents("docstrings")
    assert len(texts) >= 18_261 and sum(map(len, texts)) >= 17_000_000
    assert len(set(map(module.normalise, texts))) == len(texts)
    held_out = {split: {module.normalise(t) for t in texts if split_of(t) == split} for split in module.SPLITS}
    assert not held_out["train"] & held_out["test"] and not held_out["train"] & held_out["validation"]
    assert any("Parameters\n----------" in text for text in texts)


def test_processes_that_read_docstrings_end_with_the_one_that_was_killed():
    code = "import sys; from dalm_utils.documents import docstrings\n"
    code += "for text in docstrings(['networkx']): print('begun', flush=True); sys.stdin.read()"
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert reader.stdout.readline() == b"begun\n"
    helpers = psutil.Process(reader.pid).children(recursive=True)
    reader.kill()
    reader.communicate()
    assert helpers and not psutil.wait_procs(helpers, timeout=PATIENCE)[1]
