import codecs
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from dalm_utils import documents as module
from dalm_utils.corpus import load_corpus
from dalm_utils.documents import LONGEST_LINE, Skips, documents, drop_near_copies, split_of
from tests.helpers import PATIENCE, TEXTS, number_word, tiny_tokenizer

NOT_UTF_8 = "not UTF-8 (convert it, as by iconv -f WINDOWS-1252 -t UTF-8)"


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True)
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
         b'{"article": "\xff\xfe"}', b"", [1], b"null", b'"article"', b"[" * 10**5,
         b'{"article": ' + b"1" * 5000 + b"}", {"article": "two"}],
    )  # fmt: skip
    skips = Skips()
    assert list(documents(source, "article", skips)) == ["one", "two"]
    assert skips.reasons == {
        "not JSON": 3, "no field 'article'": 1, "field 'article' is not a string": 1, "empty document": 2,
        NOT_UTF_8: 1, "not a JSON object": 2, module.AN_ARRAY: 1,
    }  # fmt: skip
    assert skips.places[0] == "papers.jsonl:2: not JSON"


def test_past_the_limit_it_is_an_error_that_names_each_reason_once_with_its_first_place(tmp_path):
    source = write_lines(tmp_path / "bad.jsonl", [b"{", b"", *[b"{"] * 10])
    with pytest.raises(ValueError) as raised:
        list(documents(source, skips=Skips(limit=3)))
    assert str(raised.value) == (
        "4 of 4 documents cannot be read: "
        "3 not JSON (the first at bad.jsonl:1); 1 empty document (the first at bad.jsonl:2)"
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("count", [5, 500])
def test_a_wrong_field_is_named_once_with_the_fields_that_are_there(tmp_path, kind, count):
    records = [{"title": "short", "body": text} for text in TEXTS[:1] * count]
    write = write_lines if kind == "jsonl" else write_parquet
    source = write(tmp_path / f"t.{kind}", records)
    with pytest.raises(ValueError) as raised:
        load_corpus(source, tiny_tokenizer(), field="txt", cache=tmp_path / "cache")
    message = str(raised.value)
    assert message.count("no field 'txt'") == 1 and "\n" not in message and f"t.{kind}:1)" in message
    assert message.endswith("the fields there are 'title', 'body'; choose `field` among them")


def test_the_limit_is_a_fraction_of_what_was_read():
    skips = Skips(limit=2, read=1000)
    for n in range(10):
        skips.add(f"line {n}", ValueError("not JSON"))  # 1% of a thousand
    with pytest.raises(ValueError, match="11 of 1000"):
        skips.add("line 10", ValueError("not JSON"))


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, mark):
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in TEXTS[:3])
    (tmp_path / "joined.jsonl").write_bytes(mark + lines + b"\n" + mark + b'{"text": "\xef\xbb\xbfmarked"}\n')
    skips = Skips()
    assert list(documents(str(tmp_path / "joined.jsonl"), skips=skips)) == [*TEXTS[:3], "marked"] and not skips.reasons
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(mark + b"alpha")
    (folder / "b.md").write_bytes(mark)
    assert list(documents(str(folder), skips=skips)) == ["alpha"] and skips.reasons == {"empty document": 1}


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("utf-16", r"t\.jsonl' is UTF-16, not UTF-8; convert it"),
        ("utf-32", r"t\.jsonl' is UTF-16, not UTF-8; convert it"),
        ("utf-16-le", r"1 UTF-16 or damaged, not UTF-8 \(the first at t\.jsonl:1\)"),
        ("utf-16-be", r"1 UTF-16 or damaged, not UTF-8 \(the first at t\.jsonl:1\)"),
    ],
)
def test_utf_16_is_refused_by_its_name(tmp_path, encoding, message):
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding=encoding)
    (tmp_path / "b.txt").write_text(TEXTS[1])
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == [TEXTS[1]]
    assert skips.places == ["a.txt: UTF-16 or damaged, not UTF-8"]
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n", encoding=encoding)
    with pytest.raises(ValueError, match=message):
        list(documents(str(tmp_path / "t.jsonl"), skips=Skips(limit=0)))


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
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "deep" / "up").symlink_to("..")
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == ["alpha", "beta"]
    assert skips.places == [
        f"c.txt: {NOT_UTF_8}", "d.txt: empty document", "e.txt: longer than 4 MiB (cut it into documents)",
    ]  # fmt: skip


def test_hidden_files_and_folders_are_not_read(tmp_path):
    """As notebooks and Macs leave older versions of a text, and environments the licenses of others."""
    (tmp_path / "a.txt").write_text("alpha")
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "b/.venv/c/d.txt", "__MACOSX/._a.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("older")
    assert list(documents(str(tmp_path))) == ["alpha"]
    assert list(documents(str(tmp_path / "b" / ".venv"))) == ["older"]  # unless it is named itself


def test_a_folder_that_may_not_be_read_is_an_error_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to other users
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("beta")
    assert list(documents(".")) == ["alpha", "beta"]
    tmp_path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(ValueError, match=r"'\./closed' cannot be read \(Permission denied\); permit it, or move"):
            list(documents("."))
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o755)


def test_a_git_lfs_pointer_is_not_taken_for_the_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "b.parquet", "c.jsonl"):
        (tmp_path / name.split(".")[1]).mkdir()
        (tmp_path / name.split(".")[1] / name).write_text(pointer)
    skips = Skips()
    assert not list(documents(str(tmp_path / "txt"), skips=skips))
    assert skips.places == ["a.txt: a Git-LFS pointer, not the file (git lfs pull)"]
    for source in ("parquet", "parquet/b.parquet", "jsonl/c.jsonl"):
        with pytest.raises(ValueError, match=r"'.*/[bc]\.\w+' is a Git-LFS pointer, .* \(git lfs pull\)"):
            list(documents(str(tmp_path / source)))


def test_a_file_that_cannot_be_opened_is_skipped_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    opened = pathlib.Path.open

    def refuse(path, *given):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == ["beta"]
    assert skips.places == ["a.txt: cannot be opened: Permission denied"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.jsonl", "no text at"),
        ("loop.jsonl", "no text at"),
        ("x" * 300, "no text at"),
        ("nul\0.jsonl", "no text at"),
        (
            "x.csv",
            "neither a .jsonl or .parquet file nor a folder: put texts into a folder, one document a file .*zcat",
        ),
        ("pipe", "'.*pipe' is neither a file nor a folder; write what it gives to a .jsonl file"),
        ("empty", "has no .txt"),
        (
            "folder.jsonl",
            r"give one of the \.jsonl files in .*folder\.jsonl' by its path, such as '.*part-0\.jsonl'",
        ),
    ],
)
def test_sources_that_are_none(tmp_path, name, message):
    (tmp_path / "x.csv").write_text("a,b")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    write_lines(tmp_path / "folder.jsonl" / "part-0.jsonl", [{"text": "one"}])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(documents(str(tmp_path / name)))


def test_no_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("alpha")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no text at ''"):
        list(documents(""))
    assert list(documents(".")) == ["alpha"]


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


def test_of_a_parquet_file_only_what_is_asked_for_is_read_and_without_datasets(tmp_path, monkeypatch):
    """Which does not know every type, and writes into the home folder."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    years = pyarrow.array([2**53] * 2, pyarrow.timestamp("ms"))  # beyond what Python's datetime holds
    table = {"year": years, "a.b": ["first", "second"], "text": [b"caf\xc3\xa9", b"caf\xe9"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == ["café"]
    assert skips.places == [f"t.parquet:2: {NOT_UTF_8}"] and skips.bytes > 0
    assert list(documents(str(tmp_path), "a.b")) == ["first", "second"]
    skips = Skips()
    assert not list(documents(str(tmp_path), "body", skips)) and skips.fields == list(table)


def test_parquet_files_without_rows_are_read_as_such(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "0.parquet")  # one row group of no rows
    write_parquet(tmp_path / "1.parquet", [{"text": text} for text in TEXTS[:3]])
    pyarrow.parquet.ParquetWriter(tmp_path / "2.parquet", schema).close()  # no row group
    (tmp_path / "3.parquet").touch()
    skips = Skips()
    assert list(documents(str(tmp_path), skips=skips)) == TEXTS[:3]
    assert skips.places == ["3.parquet: empty document"]
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"no document to train on in .*; skipped: 1 empty document \(the first at 3"):
        load_corpus(str(tmp_path), tiny_tokenizer(), cache=tmp_path / "cache")


def test_rows_of_a_parquet_file_of_many_and_uneven_row_groups_come_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)
    table = pyarrow.Table.from_pylist([{"text": f"document {n}"} for n in range(30)])
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", table.schema) as file:
        for start, length in ((0, 0), (0, 1), (1, 13), (14, 16)):
            file.write_table(table.slice(start, length))
    assert list(documents(str(tmp_path / "t.parquet"))) == [f"document {n}" for n in range(30)]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_text_of_empty_files_alone_says_so(tmp_path, kind):
    for n in range(3):
        (tmp_path / f"{n}.{kind}").touch()
    source = tmp_path if kind == "txt" else tmp_path / "0.jsonl"
    skipped = r"3 empty document \(the first at 0.txt\)" if kind == "txt" else "none"
    with pytest.raises(ValueError, match=f"no document to train on in .*; skipped: {skipped}$"):
        load_corpus(str(source), tiny_tokenizer(), cache=tmp_path / "cache")


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
        assert module.normalize(text) == module.normalize(f"{text} É").removesuffix("é").rstrip()
    assert module.normalize("Naïve É_tude x2 中文") == "naïve é tude x 中文"


def test_signs_are_counted_in_every_script():
    everything = "".join(map(chr, range(128)))
    for text, count in (("", 0), ("a+b = 12", 4), ("é नमस्ते ⠃⠗😀", 3), (everything, 42), (f"{everything}é", 42)):
        assert module._signs(text) == count


def test_documents_that_differ_in_signs_are_no_copies_of_each_other(tmp_path):
    """Mazes, Morse, Braille, emoji, operators: the same words around signs of their own."""
    rng = np.random.default_rng(0)
    puzzles = [
        f"{prose(0)} {kind} " + "".join(rng.choice(list(signs), 100)) + " end"
        for kind, signs in (("maze", "#."), ("Morse", "-. "), ("Braille", "⠃⠗⠁"), ("emoji", "😀🙃"), ("sum", "+-*"))
        for _ in range(20)
    ]
    skips = Skips()
    source = write_lines(tmp_path / "p.jsonl", [{"text": text} for text in (*puzzles, *puzzles[:9])])
    assert list(module.clean_documents(source, skips=skips)) == puzzles and skips.copies == 9


@pytest.mark.parametrize(
    "text", ["Let $\\alpha_1 \\in A$. ", "«Voilà», dit-il: ", "क्या यह एक प्रति है? ", "(see :func:`f`) "]
)
def test_prose_with_punctuation_and_formulas_is_a_copy_of_itself_in_other_signs(tmp_path, text):
    document = f"{text}{prose(0)}"
    source = write_lines(tmp_path / "p.jsonl", [{"text": document}, {"text": f"## {document.replace('.', ' !')} --"}])
    assert len(list(module.clean_documents(source))) == 1


def test_numbers_are_counted_in_every_script():
    for text, count in (("", 0), ("x2 at 12:30, -4.5e3", 6), ("é 12:30 ٣٤ 五", 3), ("".join(map(chr, range(128))), 1)):
        assert module._numbers(text) == count == len(re.findall(r"\d+", text))


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


def test_the_split_of_a_document_is_what_it_has_always_been():
    """The models that ship were trained on these training splits: no document may ever move between them."""
    texts = [f"document {'abc' * n} of {noun}" for n in range(500) for noun in ("one", "another")]
    assert module.digest(" ".join(map(split_of, texts))) == "7cd0c8df91548056e4149f63c2955914"


def numbers(n, words=50):
    """The log of one day: the same words as every other one, around numbers of its own."""
    rng = np.random.default_rng(n)
    line = "at {} the sensor read {:.1f} degrees and {} percent"
    return " ".join(line.format(hour, 30 * rng.random(), rng.integers(100)) for hour in range(words // 7 + 1))


def prose(n, words=60):
    """Words that no other document has."""
    return " ".join(f"{'abcdefghij'[int(d)]}{number_word(n)}" for d in str(7**99)[:words])


def test_documents_whose_content_is_numbers_are_no_copies_of_each_other(tmp_path):
    logs = [numbers(n) for n in range(500)]
    assert len(set(map(module.normalize, logs))) == 1 and len(module.normalize(logs[0]).split()) >= module.MIN_WORDS
    skips = Skips()
    source = write_lines(tmp_path / "logs.jsonl", [{"text": text} for text in (*logs, *logs[:9], logs[9].upper())])
    assert list(module.clean_documents(source, skips=skips)) == logs and skips.copies == 10


def test_prose_that_differs_in_a_number_is_a_copy(tmp_path):
    near = [f"{prose(n)} {year}" for n in range(20) for year in (2023, 2024)]
    skips = Skips()
    source = write_lines(tmp_path / "near.jsonl", [{"text": text} for text in near])
    assert list(module.clean_documents(source, skips=skips)) == near[::2] and skips.copies == 20


def splits_of(texts):
    """The documents of each split by the second rule, and the rule's name."""
    rule = module.split_few(texts)
    splits = {key: [text for text in texts if rule.split_of(text) == key] for key in module.SPLITS}
    assert sum(map(len, splits.values())) == len(texts)
    return rule.name, splits


@pytest.mark.parametrize("count", [3, 4, 9, 10, 40, 199])
@pytest.mark.parametrize("make, name", [(prose, "rank of words"), (numbers, "rank of text")])
def test_a_few_documents_fill_every_split(count, make, name):
    texts = [make(n) for n in range(count)]
    rule, splits = splits_of(texts)
    assert rule == name
    assert [len(splits[key]) for key in ("validation", "test")] == [max(1, count // 10)] * 2
    assert splits_of(texts[::-1])[1] == {key: part[::-1] for key, part in splits.items()}  # in whatever order


@pytest.mark.parametrize("count", [1000, 5000])
def test_many_documents_that_differ_in_numbers_alone_are_held_out_by_the_hundred(count):
    rng = np.random.default_rng(0).integers(1000, size=(count, 2))
    texts = [f"Question {n}: what is {a} plus {b}? Answer: {a + b}" for n, (a, b) in enumerate(rng)]
    rule, splits = splits_of(texts)
    assert rule == "text"
    for key in ("validation", "test"):
        assert 0.01 < len(splits[key]) / count < 0.03


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_documents_than_splits_leave_the_test_split_empty_first(count):
    _, splits = splits_of([prose(n) for n in range(count)])
    assert [len(splits[key]) for key in module.SPLITS] == [1, count - 1, 0]


def test_near_copies_of_short_prose_stay_in_one_split_when_there_are_few_documents():
    texts = [f"{prose(n, words=12)} {page}" for n in range(30) for page in range(2)]
    rule, splits = splits_of(texts)
    assert rule == "rank of words" and [len(splits[key]) for key in module.SPLITS] == [48, 6, 6]
    words = {key: set(map(module.normalize, part)) for key, part in splits.items()}
    assert not words["train"] & (words["validation"] | words["test"]) and not words["validation"] & words["test"]


def test_a_template_that_most_documents_share_is_not_held_out_as_a_whole():
    texts = [f"{verb} {n} and {n * n}" for verb in ("add", "take", "multiply") for n in range(50)]
    rule, splits = splits_of(texts)
    assert rule == "rank of text"
    assert {text.split()[0] for text in splits["train"]} == {"add", "take", "multiply"}


@pytest.mark.slow
def test_docstrings_are_many_and_no_two_alike():
    """The real corpus, from the packages installed here."""
    texts = list(module.clean_documents("docstrings"))
    assert len(texts) >= 18_261 and sum(map(len, texts)) >= 17_000_000
    normal = [module.normalize(text) for text in texts]
    assert len(set(normal)) == len(texts)
    splits = {
        split: {words for words, text in zip(normal, texts, strict=True) if split_of(text) == split}
        for split in module.SPLITS
    }
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"]
    assert all(splits.values())
    assert any("Parameters\n----------" in text for text in texts)


def test_docstrings_stand_at_every_depth_of_a_file_and_what_is_not_python_has_none(tmp_path):
    (tmp_path / "deep.py").write_bytes(
        b'\xef\xbb\xbf"""module"""\n'  # as some Windows editors begin a file
        b"if 1:\n try:\n  class A:\n   '''class'''\n   async def f(self):\n    '''method \\ud800'''\n"
        b" except E:\n  with x:\n   def g():\n    '''in a handler'''\n"
        b"else:\n match x:\n  case 1:\n   def h():\n    '''in a case'''\n    s = '''no docstring'''\n"
    )
    (tmp_path / "template.py").write_text("def {name}():\n    '''docstring'''")
    (tmp_path / "binary.py").write_bytes(b"'''\0\xff'''")
    (tmp_path / "deep_expression.py").write_text("'''unread'''\nx = " + "(" * 10**5)
    files = sorted(map(str, tmp_path.iterdir()))
    assert sorted(module._docstrings_of(files)) == sorted(
        ["module", "class", "method \ud800", "in a handler", "in a case"]
    )


def test_a_text_of_a_package_that_is_not_installed_is_refused_by_its_name(monkeypatch):
    monkeypatch.setitem(module.PACKAGES, "docstrings", ("numpy", "no_such_package"))
    for read in (module.documents, lambda source: module.identify(source, "text")):
        with pytest.raises(FileNotFoundError, match=r"'no_such_package' .* \(pip install no_such_package\)"):
            list(read("docstrings"))


def test_a_reader_of_docstrings_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "__file__", "/nowhere/documents.py")
    with pytest.raises(RuntimeError, match=r"cannot be read: .* ended with 2: .*_docstrings\.py"):
        list(module.docstrings(["numpy"]))


SCRIPT = """
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1], force=True)
from dalm_utils import documents, load_corpus
from tests.helpers import tiny_tokenizer
documents.PACKAGES["docstrings"] = ("accelerate",)
print(load_corpus("docstrings", tiny_tokenizer(), cache=sys.argv[2]).facts["documents"]["train"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method, name", [("spawn", "main.py"), ("forkserver", "main.py"), ("spawn", "-")])
def test_a_script_without_a_guard_prepares_docstrings_under_every_start_method(tmp_path, start_method, name):
    """Processes that import the main script again would wait here for the lock of the one that waits for them."""
    (tmp_path / "main.py").write_text(SCRIPT)
    script = "-" if name == "-" else str(tmp_path / name)
    result = subprocess.run(
        [sys.executable, script, start_method, str(tmp_path / "cache")],
        input=SCRIPT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100


@pytest.mark.slow
def test_processes_that_read_docstrings_end_with_the_one_that_was_killed():
    code = "from dalm_utils.documents import PACKAGES, docstrings; list(docstrings(PACKAGES['docstrings']))"
    reader = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    helpers: list[psutil.Process] = []
    while not helpers:
        assert reader.poll() is None
        for child in psutil.Process(reader.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()  # so that it cannot have finished before its parent is killed
                helpers.append(child)
    reader.kill()
    reader.wait()
    for helper in helpers:
        helper.resume()
    assert not psutil.wait_procs(helpers, timeout=PATIENCE)[1]


def test_endings_are_read_in_any_case(tmp_path):
    (tmp_path / "folder").mkdir()
    for number, name in enumerate(("a.TXT", "b.txt", "c.Md")):
        (tmp_path / "folder" / name).write_text(TEXTS[number])
    assert sorted(module.documents(str(tmp_path / "folder"))) == sorted(TEXTS[:3])
    lines = write_lines(tmp_path / "c.JSONL", [{"text": TEXTS[0]}])
    assert list(module.documents(str(lines))) == [TEXTS[0]]
    assert list(module.documents(str(write_parquet(tmp_path / "d.Parquet", [{"text": TEXTS[1]}])))) == [TEXTS[1]]


def test_a_path_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "t.jsonl", [{"text": TEXTS[0]}])
    assert list(module.documents("~/t.jsonl")) == [TEXTS[0]]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.txt", "b.jsonl"], r"holds files of several kinds \(b\.jsonl, a\.txt\); give the one that holds the text"),
        (["a.md", "b.parquet"], r"holds files of several kinds \(b\.parquet, a\.md\)"),
        (["b.parquet", "c.jsonl", "README.md"], r"several kinds \(b\.parquet, c\.jsonl\)"),
        (
            ["README.md", "LICENSE.txt", "train.jsonl"],
            r"give one of the \.jsonl files .* by its path, such as '.*train\.jsonl'",
        ),
    ],
)
def test_a_folder_of_several_kinds_is_refused_and_not_read_in_part(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text(TEXTS[0])
    with pytest.raises(ValueError, match=message):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json", "train.CSV", "data-00000-of-00001.arrow"])
def test_what_is_about_the_data_is_not_taken_for_them_where_they_cannot_be_read(tmp_path, name):
    for about in ("README.md", "LICENSE.txt", "NOTICE.txt"):
        (tmp_path / about).write_text(about)
    assert len(list(documents(str(tmp_path)))) == 3  # a folder of nothing else is a text like any other
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).touch()
    with pytest.raises(ValueError, match=f"holds {name}, which is not read; decompress it, or write one JSON object a"):
        list(documents(str(tmp_path)))
    (tmp_path / "data" / "a.txt").write_text("alpha")
    assert "alpha" in list(documents(str(tmp_path)))


@pytest.mark.parametrize("source", ["mathematics", "arxiv:2"])
def test_a_folder_named_like_a_text_of_the_project_is_told_apart_once(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    module._say_which.cache_clear()
    module.identify(source, "text")
    assert capsys.readouterr().err == ""
    (tmp_path / source).mkdir()
    (tmp_path / source / "a.txt").write_text("alpha")
    for _ in range(2):
        module.identify(source, "text")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{source!r} is a text that this project brings" in told
    assert list(documents(re.search("'(./.*)'", told)[1])) == ["alpha"]


def test_files_of_one_name_size_and_time_are_told_apart(tmp_path):
    sources = [write_lines(tmp_path / folder / "p.jsonl", [{"text": f"of {folder}"}]) for folder in "ab"]
    for source in sources:
        os.utime(source, (0, 0))
    first, second = (module.identify(source, "text") for source in sources)
    assert first != second and module.identify(sources[0], "text") == first


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("start", ["", "  ", "\ufeff"])
def test_a_json_array_is_refused_with_the_way_to_make_lines_of_it(tmp_path, start, name, indent):
    (tmp_path / name).write_text(start + json.dumps([{"text": text} for text in TEXTS], indent=indent))
    with pytest.raises(ValueError, match=r"a JSON array; write one object a line \(jq -c '\.\[\]' FILE"):
        list(documents(str(tmp_path / name), skips=Skips(limit=0)))
