"""Tokenizers of many makes: pieces of a text, gaps in the ids, and what texts may hold."""

import json
import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from dalm_utils import (
    as_diffusion,
    continuation_nelbo,
    generate,
    infilling,
    load_base,
    load_corpus,
    save_diffusion,
    train,
)
from dalm_utils.harness import Responder
from dalm_utils.tokens import decode, encode, token_ids, tokenizer_digest, unused_ids
from tests.helpers import END, TEXTS, tiny_config, tiny_model, tiny_tokenizer
from tests.test_documents import write_lines


def bpe(pre_tokenizer, decoder, normalizer=None, texts=TEXTS, size=320, **options):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoder
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def metaspace(scheme="always", **options):
    return bpe(pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme), **options)


def unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = dict(special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=200, show_progress=False, **special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_bytes(make):
    """A tokenizer that spells a character it does not know in bytes."""
    model = json.loads(make().backend_tokenizer.to_str())["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **names)


def with_gaps(moved_by):
    """The usual tokenizer, its two highest ids moved up."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for token in sorted(vocab, key=vocab.get)[-2:]:
        vocab[token] += moved_by
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=END, eos_token=END)


LLAMA_2 = dict(
    normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    decoder=decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
)
PREFIXING = {
    "metaspace": metaspace,
    "metaspace of the first word": lambda: metaspace("first"),
    "metaspace after digits": lambda: bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()]), decoders.Metaspace()
    ),
    "prepended, as Llama 2": lambda: bpe(None, **LLAMA_2),
    "bytes, and the space stays": lambda: bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), clean_up_tokenization_spaces=True
    ),
    "spaces at the end are stripped": lambda: metaspace(normalizer=normalizers.Strip(left=False, right=True)),
    "unigram": lambda: unigram("always"),
    "unigram, the first word": lambda: unigram("first"),
    "llama, and unknown characters as bytes": lambda: with_bytes(lambda: bpe(None, **LLAMA_2)),
}
PLAIN = {
    "no prefix": lambda: metaspace("never"),
    "unigram without a prefix": lambda: unigram("never"),
    "bytes": tiny_tokenizer,
}


@pytest.mark.parametrize("kind", [*PREFIXING, *PLAIN])
def test_pieces_of_a_text_cut_anywhere_decode_to_the_text(kind):
    tokenizer = (PREFIXING | PLAIN)[kind]()
    before = tokenizer.backend_tokenizer.to_str()
    for text in ("Return the sum of a matrix along", " Return the", "a  array : int .", "mean ", " ", ""):
        for cut in range(len(text) + 1):
            begin, rest = text[:cut], text[cut:]
            ids = encode(tokenizer, [begin])[0], encode(tokenizer, [rest], inside=bool(begin))[0]
            assert decode(tokenizer, [*ids[0], *ids[1]]) == text
            assert not begin or decode(tokenizer, ids[1], before=ids[0]) == rest
    assert tokenizer.backend_tokenizer.to_str() == before
    usual = tokenizer.backend_tokenizer.encode("Return the sum", add_special_tokens=False).ids
    assert encode(tokenizer, ["Return the sum"])[0] == usual  # a text that begins is tokenized as in the corpus


def prefixing_model(tokenizer):
    return as_diffusion(tiny_model("llama", vocab=len(tokenizer)), tokenizer)


@pytest.mark.parametrize("kind", [*PREFIXING, *PLAIN])
def test_given_text_comes_out_unchanged_also_inside_of_a_word(kind):
    model, tokenizer = prefixing_model((PREFIXING | PLAIN)[kind]())
    for parts in (["mat", 1, "ix along"], [2, "ix along", 1, " the"], ["", 1, "a"], ["ma", "trix", 1], [" a ", 1, " "]):
        pattern = "".join(re.escape(part) if isinstance(part, str) else ".*" for part in parts)
        assert re.fullmatch(pattern, generate(model, tokenizer, parts=parts).text[0], re.DOTALL)
    samples = generate(model, tokenizer, prompt=["Return", " Return the"], suffix="of it", length=3)
    for text, prompt in zip(samples.text, ["Return", " Return the"], strict=True):
        assert text.startswith(prompt) and text.endswith("of it")


def test_the_gap_is_what_lies_between_the_given_texts():
    model, tokenizer = prefixing_model(metaspace())
    before, after = "Return the ma", "ix along"
    samples = generate(model, tokenizer, parts=[before, 2, after])
    first = len(encode(tokenizer, [before])[0]) + 1
    filled = decode(tokenizer, samples.tokens[0, first : first + 2].tolist(), samples.tokens[0, :first].tolist())
    assert samples.text[0][len(before) : len(samples.text[0]) - len(after)] == filled


def test_a_tokenizer_that_forgets_spaces_keeps_the_rest():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = dict(special_tokens=["<s>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, show_progress=False, **special))
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model, tokenizer = prefixing_model(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))
    text = generate(model, tokenizer, parts=["Return the  sum", 1, "of a matrix."]).text[0]
    assert text.startswith("Return the sum") and text.endswith("of a matrix.")


@pytest.mark.parametrize("kind", PREFIXING)
def test_a_continuation_is_scored_without_a_space_that_it_does_not_have(kind):
    model, tokenizer = prefixing_model(PREFIXING[kind]())
    options = dict(num_samples=4, precision="fp32")
    before, after = encode(tokenizer, ["Return the ma"])[0], encode(tokenizer, ["trix"], inside=True)[0]
    assert decode(tokenizer, [*before, *after]) == "Return the matrix"
    bound = continuation_nelbo(model, tokenizer, before, after, **options)
    assert continuation_nelbo(model, tokenizer, "Return the ma", "trix", **options) == bound
    alone = encode(tokenizer, ["Return the"])[0]
    assert continuation_nelbo(model, tokenizer, "", "Return the", **options) == continuation_nelbo(
        model, tokenizer, [], alone, **options
    )


def test_text_that_the_harness_asks_for_keeps_its_first_space():
    model, tokenizer = prefixing_model(metaspace())
    bias = torch.full((len(tokenizer),), -50.0)
    bias[tokenizer.convert_tokens_to_ids("▁of")] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    asked = [("Return", {"max_gen_toks": 3}), ("", {"max_gen_toks": 3})]
    assert Responder(model, tokenizer, precision="fp32").generate_until(asked) == [" of of of", "of of of"]


@pytest.mark.parametrize("moved_by", [1, 100])
def test_mask_gets_an_id_that_no_token_has(moved_by, tmp_path):
    tokenizer = with_gaps(moved_by)
    before, digest = dict(tokenizer.get_vocab()), tokenizer_digest(tokenizer)
    assert int(token_ids(tokenizer)[-1]) == 319 + moved_by and len(tokenizer) == 320
    assert unused_ids(tokenizer, 330).tolist() == [i for i in range(330) if i not in before.values()]
    model, tokenizer = as_diffusion(tiny_model(vocab=320 + moved_by), tokenizer)
    assert tokenizer.mask_token_id == model.config.mask_token_id == 320 + moved_by
    assert tokenizer.get_vocab() == before | {"[MASK]": 320 + moved_by} and tokenizer_digest(tokenizer) == digest
    assert 320 + moved_by not in encode(tokenizer, ["Return [MASK]"])[0]

    train(model, tokenizer, tiny_config(tmp_path, steps=2, eval_every=2))
    save_diffusion(model, tokenizer, tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.get_vocab() == tokenizer.get_vocab() and again.mask_token_id == 320 + moved_by


def test_only_ids_that_have_a_token_are_sampled():
    model, tokenizer = as_diffusion(tiny_model(vocab=500, tied=False), with_gaps(100))
    unused = unused_ids(tokenizer, 500)
    with torch.no_grad():
        model.lm_head.weight[unused] *= 1e3  # ever so likely, if they may be sampled
    samples = generate(model, tokenizer, length=40, num_samples=4).tokens
    assert not torch.isin(samples, unused).any()
    blocks = samples[:, :12]
    assert not torch.isin(infilling(model, tokenizer, blocks, gap=4).filled, unused).any()
    base = tiny_model(vocab=500, tied=False)
    with torch.no_grad():
        base.lm_head.weight[unused] *= 1e3
    assert not torch.isin(infilling(base, tokenizer, blocks, gap=4).filled, unused).any()


def test_a_mask_that_texts_may_contain_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("[MASK]", normalized=True)])
    with pytest.raises(ValueError, match=r"'\[MASK\]' is an ordinary token .* pass another special token"):
        as_diffusion(tiny_model(vocab=321), tokenizer)


def test_half_characters_do_not_stop_a_text():
    model, tokenizer = as_diffusion(tiny_model(vocab=320), tiny_tokenizer())
    assert encode(tokenizer, ["a\ud83d\ude00", "a\ud800b"]) == encode(tokenizer, ["a\N{GRINNING FACE}", "a\ufffdb"])
    assert generate(model, tokenizer, prompt="a\ud800b", length=2).text[0].startswith("a\ufffdb")
    responder = Responder(model, tokenizer, num_samples=1)
    assert responder.loglikelihood([("a\ud800", "b\udc00")])[0][0] < 0
    assert responder.loglikelihood_rolling([("a\ud800",)])[0] < 0


def test_a_tokenizer_without_a_rust_backend_is_refused(tmp_path):
    model, tokenizer = tiny_model(vocab=400), ByT5Tokenizer()
    message = "ByT5Tokenizer is written in Python and has no backend in Rust"
    for act in (as_diffusion, lambda *_: encode(tokenizer, ["a"]), lambda *_: tokenizer_digest(tokenizer)):
        with pytest.raises(ValueError, match=message):
            act(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("")  # so that the folder seems to hold one
    with pytest.raises(ValueError, match=message):
        load_base(str(tmp_path))


def nucleotides():
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def unknown_words():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "A": 2, "C": 3, "G": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(bos_token="<s>", eos_token="<s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("make", [nucleotides, unknown_words])
def test_without_the_usual_word_mask_starts_as_the_mean_of_the_tokens(make):
    model = tiny_model(vocab=7)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = 100.0  # rows that only pad
    model, tokenizer = as_diffusion(model, make())
    table = model.get_input_embeddings().weight
    assert tokenizer.mask_token_id == 5 and torch.allclose(table[5], table[:5].mean(0))
    assert generate(model, tokenizer, length=4).tokens.max() < 5


@pytest.mark.parametrize("name", ["<s>", "</s>", "[MASK]"])
def test_a_unigram_tokenizer_spells_special_tokens_in_texts_too(tmp_path, name):
    """Special tokens are pieces of such a vocabulary, and its model would find them."""
    tokenizer = unigram("always")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] += [[letter, -9.0] for letter in "[MASK]<>/s"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="[MASK]",
    )  # fmt: skip
    special = tokenizer.convert_tokens_to_ids(name)
    ids = encode(tokenizer, [f"the sum {name} of a{name}b"])[0]
    assert special not in ids and name in decode(tokenizer, ids)
    text = write_lines(tmp_path / "t.jsonl", [{"text": f"{text} {name} {text}"} for text in TEXTS])
    blocks = load_corpus(text, tokenizer, cache=tmp_path).blocks("train", 16)[:]
    assert (blocks[:, 1:] == special).any() == (name == "<s>")  # which ends the documents
    assert tokenizer.encode(name, add_special_tokens=False) == [special]  # as before, outside of this project
