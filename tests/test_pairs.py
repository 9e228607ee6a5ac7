"""Prompt/answer pairs as text: what is read, what is refused, and which tokens it becomes."""

import codecs
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dalm_utils.documents import SPLITS, Skips
from dalm_utils.pairs import Pairs, chat_prompt, is_pairs, load_pairs, read_pairs
from dalm_utils.tokens import decode, encode
from tests.helpers import END, number_word, tiny_tokenizer
from tests.test_documents import write_lines, write_parquet
from tests.test_tokens import PREFIXING

PAIRS = [{"prompt": f"Return the {number_word(n)} of", "response": f" axis {n % 7}"} for n in range(40)]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHAT) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns: str) -> list[dict]:
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]


def all_pairs(corpus, length=64):
    """Prompt and answer of every pair, as ids."""
    splits = [split for split in SPLITS if corpus.facts["documents"][split]]
    return [
        (split, *(part.tolist() for part in pairs.pair(i)))
        for split in splits
        for pairs in [corpus.pairs(split, length)]
        for i in range(len(pairs))
    ]


# -------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_pairs_are_read_from_json_lines_parquet_and_folders_of_parquet(tmp_path, kind):
    source = tmp_path / {"jsonl": "p.jsonl", "parquet": "p.parquet", "folder": "shards"}[kind]
    if kind == "folder":
        write_parquet(source / "0.parquet", PAIRS[:20])
        write_parquet(source / "1.parquet", PAIRS[20:])
    else:
        (write_lines if kind == "jsonl" else write_parquet)(source, PAIRS)
    read = [pair.pieces for pair in read_pairs(str(source), tiny_tokenizer())]
    assert read == [[(pair["prompt"], False), (pair["response"], True)] for pair in PAIRS]
    assert is_pairs(str(source))


def test_a_first_record_without_an_answer_is_skipped_like_any_other(tmp_path):
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "response": None}, *PAIRS[:3]])
    skips = Skips()
    assert is_pairs(source) and len(list(read_pairs(source, tiny_tokenizer(), skips=skips))) == 3
    assert skips.reasons == {"no field 'response'": 1}


def test_an_empty_list_of_lines_is_no_conversation(tmp_path):
    assert not is_pairs(write_lines(tmp_path / "p.jsonl", [{"lines": []}, {"lines": ["a", "b"]}]), "lines")


def test_a_chat_that_names_mask_is_skipped_by_every_tokenizer(tmp_path):
    """An AR model and the diffusion model that is made from it share one prepared text."""
    source = write_lines(tmp_path / "p.jsonl", [{"messages": conversation("what is [MASK]?", "b")}] * 2)
    tokenizers = chat_tokenizer(), chat_tokenizer()
    tokenizers[1].add_special_tokens({"mask_token": "[MASK]"})
    for tokenizer in tokenizers:
        skips = Skips()
        assert not list(read_pairs(source, tokenizer, skips=skips)) and skips.reasons.total() == 2


def test_a_field_that_is_null_is_none(tmp_path):
    """As a parquet file has it, where records of two kinds stand together."""
    rows = [{**PAIRS[0], "messages": None}, {"prompt": "a", "response": None, "messages": None}]
    skips = Skips()
    assert len(list(read_pairs(write_parquet(tmp_path / "p.parquet", rows), tiny_tokenizer(), skips=skips))) == 1
    assert skips.reasons == {"no field 'response'": 1}
    mixed = [rows[0], {"prompt": None, "response": None, "messages": conversation("a", "b")}]
    with pytest.raises(ValueError, match=r"p\.jsonl:2 has messages, those before it have prompt/response"):
        list(read_pairs(write_lines(tmp_path / "p.jsonl", mixed), tiny_tokenizer()))


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    source = write_lines(tmp_path / "p.jsonl", [codecs.BOM_UTF8 + json.dumps(PAIRS[0]).encode(), PAIRS[1]])
    assert next(read_pairs(source, tiny_tokenizer())).pieces[0][0] == PAIRS[0]["prompt"]


def test_what_cannot_be_read_is_counted_and_placed(tmp_path):
    lines = [
        PAIRS[0], b"{", {"prompt": "a", "response": ""}, {"prompt": " ", "response": "a"}, {"prompt": "a"},
        {"prompt": "a", "response": 5}, PAIRS[0], PAIRS[1],
    ]  # fmt: skip
    skips = Skips()
    assert len(list(read_pairs(write_lines(tmp_path / "p.jsonl", lines), tiny_tokenizer(), skips=skips))) == 2
    assert skips.reasons == {
        "not JSON": 1, "empty 'response'": 1, "empty 'prompt'": 1, "no field 'response'": 1,
        "field 'response' is not a string": 1,
    }  # fmt: skip
    assert skips.copies == 1 and skips.places[0] == "p.jsonl:2: not JSON"


@pytest.mark.parametrize("field", ["question,answer", " question , answer "])
def test_fields_can_be_named(tmp_path, field):
    source = write_lines(tmp_path / "p.jsonl", [{"question": "a", "answer": "b", "prompt": "c", "response": "d"}])
    assert next(read_pairs(source, tiny_tokenizer(), field)).pieces == [("a", False), ("b", True)]
    assert is_pairs(source, field)


@pytest.mark.parametrize(
    "lines, field, message",
    [
        ([{"q": "a", "a": "b"}], "text", "p.jsonl:1 has neither prompt/response nor messages; .*there are 'q', 'a'"),
        ([{**PAIRS[0], "messages": []}], "text", "p.jsonl:1 has prompt/response and messages; name the fields"),
        ([PAIRS[0], {"messages": conversation("a", "b")}], "text", "p.jsonl:2 has messages, those before it"),
        ([PAIRS[0]], "prompt,response,more", "got 'prompt,response,more'"),
        ([PAIRS[0]], "prompt,", "got 'prompt,'"),
        ([{"messages": conversation("a", "b")}], "text", "the tokenizer has no chat template"),
        ([PAIRS[0]], "messages", "no pair to train on .*1 no field 'messages'"),
        ([PAIRS[0]], "question,answer", "no pair to train on .*1 no field 'question'.*the fields there are 'prompt'"),
        ([{"prompt": "a", "response": ""}], "text", "no pair to train on .*1 empty 'response'"),
        ([], "text", "no pair to train on"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_what_to_do(tmp_path, lines, field, message):
    source = write_lines(tmp_path / "p.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        load_pairs(source, tiny_tokenizer(), field=field, cache=tmp_path / "cache")


@pytest.mark.parametrize("source", ["docstrings", "arxiv:1", "folder"])
def test_a_text_without_records_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=rf"{source!r} is .*without records; give a \.jsonl or \.parquet file"):
        list(read_pairs(source, tiny_tokenizer()))


@pytest.mark.parametrize(
    "record, field", [({"text": "a"}, "text"), ({"article": "a"}, "text"), ({"body": "a"}, "body"), ([1], "text")]
)
def test_documents_are_not_taken_for_pairs(tmp_path, record, field):
    assert not is_pairs(write_lines(tmp_path / "t.jsonl", [record]), field)
    assert not is_pairs("docstrings") and not is_pairs("nowhere.jsonl")


# --------------------------------------------------------------------------------------------------- tokens
def test_the_tokens_of_a_pair_are_those_of_its_texts_and_an_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", PAIRS), tokenizer, cache=tmp_path)
    found = {decode(tokenizer, prompt): answer for _, prompt, answer in all_pairs(corpus)}
    assert len(found) == len(PAIRS)
    for pair in PAIRS:
        answer = found[pair["prompt"]]
        assert answer[-1] == tokenizer.bos_token_id  # `generate(stop_at_end=True)` stops there
        assert answer[:-1] == encode(tokenizer, [pair["response"]], inside=True)[0]


@pytest.mark.parametrize("kind", PREFIXING)
def test_no_space_is_added_between_prompt_and_answer_or_lost(tmp_path, kind):
    """Also by tokenizers that put a space before every text."""
    tokenizer = PREFIXING[kind]()
    halves = [("Return the su", "m of a matrix"), ("Return", " the  mean"), ("Return the ", "sum"), (" Return", "ing")]
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": first, "response": rest} for first, rest in halves])
    pairs = all_pairs(load_pairs(source, tokenizer, cache=tmp_path))
    assert {decode(tokenizer, [*prompt, *answer[:-1]]) for _, prompt, answer in pairs} == {a + b for a, b in halves}
    for _, prompt, answer in pairs:
        assert (decode(tokenizer, prompt), decode(tokenizer, answer[:-1], before=prompt)) in halves


def test_rows_begin_with_the_begin_token_and_are_padded_on_the_right():
    tokens, roles = np.array([5, 6, 7, 0, 8, 9, 0]), np.array([0, 0, 1, 2, 0, 1, 2])
    rows = Pairs(tokens, roles, length=6, begin=0)[:]
    assert rows.tokens.tolist() == [[0, 5, 6, 7, 0, 0], [0, 8, 9, 0, 0, 0]]
    assert rows.answers.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]
    assert rows.real.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    one = Pairs(tokens, roles, length=6, begin=0)[[1, 1]]
    assert one.tokens.tolist() == [rows.tokens[1].tolist()] * 2


def test_pairs_that_are_too_long_are_left_out_and_told(tmp_path):
    tokenizer = tiny_tokenizer()
    long = {"prompt": "A very long prompt indeed", "response": " axis" * 50}
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", [*PAIRS, long]), tokenizer, cache=tmp_path)
    split = next(split for split in SPLITS if corpus.pairs(split, 10**3).longest > 50)
    every, short = corpus.pairs(split, 10**3), corpus.pairs(split, 40)
    assert len(short) == len(every) - 1 == len(every) - len(short.dropped)
    assert short.longest == every.longest and every.about_dropped(tokenizer, split) == ""
    said = short.about_dropped(tokenizer, split)
    assert said.startswith(f"1 of {len(every)} {split} pairs are longer than length=40") and "A very long" in said
    assert corpus.pairs(split, 40, limit=1).about_dropped(tokenizer, split) == said
    assert len(corpus.pairs(split, every.longest)) == len(every) > len(corpus.pairs(split, every.longest - 1))
    with pytest.raises(ValueError, match=f"the longest of {len(every)} has {every.longest}: use a greater length"):
        corpus.pairs(split, 3)


def test_a_limit_draws_from_all_over_and_the_same_pairs_every_time(tmp_path):
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", PAIRS), tiny_tokenizer(), cache=tmp_path)
    few, more = corpus.pairs("train", 64, limit=5), corpus.pairs("train", 64, limit=8)
    assert len(few) == 5 and few[:].tokens.equal(more[:5].tokens)
    assert few.starts.max() > 5 * few.sizes.max() and len(set(few.starts)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("letters", [True, False])
@pytest.mark.parametrize("count", [3, 40, 1500])
def test_equal_prompts_lie_in_one_split_and_every_split_has_pairs(tmp_path, count, letters):
    """Also where prompts share their words and differ in numbers, as sums do."""
    prompts = [f"{number_word(n)} of" if letters else f"{n} + {n} =" for n in range(count)]
    lines = [{"prompt": prompt, "response": f" {answer}"} for prompt in prompts for answer in "ab"]
    tokenizer = tiny_tokenizer()
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", lines), tokenizer, cache=tmp_path)
    assert sum(corpus.facts["documents"].values()) == len(lines) and all(corpus.facts["documents"].values())
    splits = {}
    for split, prompt, _ in all_pairs(corpus):
        splits.setdefault(decode(tokenizer, prompt), []).append(split)
    assert len(splits) == count and all(len(where) == 2 and len(set(where)) == 1 for where in splits.values())


@pytest.mark.parametrize("prompts", [1, 3])
def test_prompts_that_share_their_words_are_held_out_by_the_tenth(tmp_path, prompts):
    """As where a long system prompt comes before a short question."""
    lines = [
        {"prompt": f"{number_word(system)} " * 60 + f"Is {n} even?", "response": f" {answer}"}
        for system in range(prompts) for n in range(100) for answer in ("yes", "no")
    ]  # fmt: skip
    tokenizer = tiny_tokenizer()
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", lines), tokenizer, cache=tmp_path)
    assert corpus.facts["split_by"] == "rank of exact prompt"
    assert corpus.facts["documents"] == {"train": 160 * prompts, "validation": 20 * prompts, "test": 20 * prompts}
    found = {
        split: {tuple(prompt) for where, prompt, _ in all_pairs(corpus, 10**4) if where == split} for split in SPLITS
    }
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == prompts * 100


def test_a_prompt_with_many_answers_is_not_held_out_if_smaller_ones_fill_a_tenth(tmp_path):
    lines = [
        {"prompt": f"{number_word(n)} of", "response": f" {a}"} for n in range(9) for a in range(91 if n == 4 else 6)
    ]
    corpus = load_pairs(write_lines(tmp_path / "p.jsonl", lines), tiny_tokenizer(), cache=tmp_path)
    assert corpus.facts["documents"] == {"train": 115, "validation": 12, "test": 12}


def test_pairs_with_one_prompt_count_as_one_document(tmp_path):
    lines = [{"prompt": pair["prompt"], "response": f" {answer}"} for pair in PAIRS for answer in "abc"]
    pairs = load_pairs(write_lines(tmp_path / "p.jsonl", lines), tiny_tokenizer(), cache=tmp_path).pairs("train", 64)
    assert np.bincount(pairs.documents).tolist() == [3] * (len(pairs) // 3)


def test_prepared_pairs_are_taken_from_the_cache_until_file_or_template_change(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "p.jsonl", PAIRS)
    first = load_pairs(source, tiny_tokenizer(), cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("dalm_utils.pairs._write", None)
        assert load_pairs(source, tiny_tokenizer(), cache=tmp_path / "cache") == first
    assert load_pairs(source, chat_tokenizer(), cache=tmp_path / "cache").folder != first.folder
    write_lines(tmp_path / "p.jsonl", PAIRS[:30])
    assert load_pairs(source, tiny_tokenizer(), cache=tmp_path / "cache").facts["digest"] != first.facts["digest"]


# ---------------------------------------------------------------------------------------------------- chats
def test_every_answer_of_a_conversation_is_maskable_and_nothing_else(tmp_path):
    tokenizer = chat_tokenizer()
    turns = conversation("Return the sum", "of an array", "along", "the axis")
    source = write_lines(
        tmp_path / "c.jsonl", [{"messages": turns}, *({"messages": conversation(f"{n}", "a")} for n in range(9))]
    )
    corpus = load_pairs(source, tokenizer, cache=tmp_path)
    (row,) = [
        (rows.tokens[i], rows.answers[i], rows.real[i])
        for split in SPLITS
        for rows in [corpus.pairs(split, 64)[:]]
        for i in range(len(rows.tokens))
        if tokenizer.decode(rows.tokens[i]).count("user") == 2
    ]
    tokens, answers, real = row
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(tokens[real]) == END + rendered + END
    assert tokenizer.decode(tokens[answers]) == f"of an array<|im_end|>\nthe axis<|im_end|>\n{END}"
    assert tokens[1] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_chat_prompt_is_what_training_shows_before_the_answer(tmp_path):
    tokenizer = chat_tokenizer()
    turns = conversation("Return the sum", "of an array")
    source = write_lines(
        tmp_path / "c.jsonl", [{"messages": turns}] + [{"messages": conversation(f"{n}", "a")} for n in range(9)]
    )
    prompts = [prompt for _, prompt, _ in all_pairs(load_pairs(source, tokenizer, cache=tmp_path))]
    assert chat_prompt(tokenizer, turns[:1]).tolist() in prompts


def test_a_template_that_writes_the_begin_token_does_not_double_it(tmp_path):
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHAT)
    ids = chat_prompt(tokenizer, conversation("a")).tolist()
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    source = write_lines(tmp_path / "c.jsonl", [{"messages": conversation(f"{n}", "a")} for n in range(9)])
    for _, prompt, _ in all_pairs(load_pairs(source, tokenizer, cache=tmp_path)):
        assert prompt[0] == ids[0]


@pytest.mark.parametrize(
    "messages, reason",
    [
        (conversation("a"), "no turn of the assistant"),
        (conversation("a", " "), "an empty answer"),
        (conversation("a <|im_end|>", "b"), "a message contains the special token '<|im_end|>'"),
        ([{"role": "user"}], "a message without a role and a content that are strings"),
        ("a", "messages are not a list of turns"),
        ([], "messages are not a list of turns"),
    ],
)
def test_conversations_that_cannot_be_used_are_counted(tmp_path, messages, reason):
    source = write_lines(tmp_path / "c.jsonl", [{"messages": conversation("a", "b")}, {"messages": messages}])
    skips = Skips()
    assert len(list(read_pairs(source, chat_tokenizer(), skips=skips))) == 1
    assert skips.reasons == {reason: 1}


@pytest.mark.parametrize(
    "template, reason",
    [
        (CHAT.replace("{% for", "{{ messages | length }}{% for", 1), "renders earlier turns anew"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses it: roles must alternate"),
    ],
)
def test_a_template_that_cannot_be_cut_into_turns_is_named(tmp_path, template, reason):
    source = write_lines(tmp_path / "c.jsonl", [{"messages": conversation("a", "b")}])
    with pytest.raises(ValueError, match=f"no pair to train on.*{reason}"):
        load_pairs(source, chat_tokenizer(template), cache=tmp_path)


@pytest.mark.parametrize("form, date", [("%d %b %Y", "26 Jul 2024"), ("%A, %B %d, %Y", "Friday, July 26, 2024")])
def test_a_template_that_prints_the_date_gives_the_same_text_every_day(tmp_path, monkeypatch, form, date):
    """Llama's does, and a text that is prepared anew must be the one that a run began with."""
    tokenizer = chat_tokenizer("{{ strftime_now('" + form + "') if strftime_now is defined }}\n" + CHAT)
    turns = conversation("Return the sum", "of an array")
    source = write_lines(tmp_path / "c.jsonl", [{"messages": turns}] * 2)
    before = next(read_pairs(source, tokenizer)).pieces
    monkeypatch.setattr(chat_template_utils, "datetime", None)
    assert next(read_pairs(source, tokenizer)).pieces == before
    assert before[0][0] == tokenizer.decode(chat_prompt(tokenizer, turns[:1]))
    assert before[0][0].startswith(f"{date}\n<|im_start|>user")


def test_a_prompt_for_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(tiny_tokenizer(), conversation("a"))


def test_chat_markup_in_prompts_is_read_as_letters_and_said(tmp_path):
    tokenizer = chat_tokenizer()
    marked = [{"prompt": f"<|im_start|>user\n{number_word(n)}<|im_end|>\n", "response": "yes"} for n in range(30)]
    source = write_lines(tmp_path / "marked.jsonl", [*marked, *PAIRS])
    corpus = load_pairs(source, tokenizer, cache=tmp_path)
    assert corpus.facts["spelled"] == {"<|im_start|>": 30, "<|im_end|>": 30}
    assert corpus.about_spelled() == (
        "special tokens named by pairs are read as letters: '<|im_start|>' in 30, '<|im_end|>' in 30; write chats as "
        "`messages`"
    )
    plain = load_pairs(write_lines(tmp_path / "plain.jsonl", PAIRS), tokenizer, cache=tmp_path)
    assert plain.about_spelled() == ""
