import math

import numpy as np
import pytest
import torch

from dalm_utils import annealed_mask, answer_quality, ar_nll, as_diffusion, by_time, text_quality
from dalm_utils.backbone import hidden_states
from dalm_utils.corpus import Blocks
from dalm_utils.evaluation import standard_error
from dalm_utils.head import logits_of
from dalm_utils.pairs import Pairs
from dalm_utils.quality import _rouge, infilling
from dalm_utils.tokens import encode
from tests.helpers import TEXTS, tiny_diffusion, tiny_model, tiny_tokenizer


def test_quality_sees_repetition():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    varied = torch.arange(1, 33).repeat(2, 1)
    stuck = torch.full((2, 32), 7)
    good, bad = (text_quality(model, tokenizer, tokens) for tokens in (varied, stuck))
    assert good.entropy == pytest.approx(math.log(31)) and bad.entropy == 0
    assert good.repetition == 0 and bad.repetition == pytest.approx(30 / 31)
    assert good.distinct_2 == 1 and bad.distinct_2 == pytest.approx(1 / 30)
    assert good.perplexity == pytest.approx(ar_nll(model, tokenizer, varied).perplexity)


def test_each_measure_of_quality_has_its_standard_error_over_texts():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    texts = torch.stack([torch.arange(1, 33), torch.full((32,), 7), torch.arange(50, 82)])
    quality = text_quality(model, tokenizer, texts)
    entropies = torch.tensor([math.log(31), 0.0, math.log(31)])
    assert quality.stderr["entropy"] == pytest.approx(float(entropies.std() / 3**0.5))
    nll = ar_nll(model, tokenizer, texts)
    assert quality.stderr["perplexity"] == pytest.approx(nll.perplexity * nll.stderr)
    assert quality.stderr.keys() == vars(quality).keys() - {"stderr"}


def test_texts_without_a_pair_of_tokens_are_refused():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    with pytest.raises(ValueError, match="at least 3 positions, the begin token among them, got 2"):
        text_quality(model, tokenizer, torch.ones(4, 2, dtype=torch.long))


# --------------------------------------------------------------------------------------------------- infilling
def knows_by_heart(block, diffusion, shift=True):
    """A model whose prediction is the token of `block` [L] at each place, whatever it sees."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab=len(tokenizer), tied=False)
    if diffusion:
        model, tokenizer = as_diffusion(model, tokenizer, shift=shift)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_f" not in name:
                weight.zero_()
        for place in range(len(block) - (1 if shift else 0)):
            model.transformer.wpe.weight[place, place] = 1.0
            model.lm_head.weight[block[place + (1 if shift else 0)], place] = 20.0
    return model, tokenizer


@pytest.mark.parametrize("diffusion, shift", [(True, True), (True, False), (False, True)])
def test_a_model_that_knows_the_text_restores_every_gap(diffusion, shift):
    tokenizer = tiny_tokenizer()
    block = torch.tensor([tokenizer.bos_token_id, *encode(tokenizer, TEXTS[:1])[0]][:16])
    model, tokenizer = knows_by_heart(block, diffusion, shift)
    quality = infilling(model, tokenizer, block.repeat(6, 1), gap=6, batch_size=4, precision="fp32")
    assert quality.filled.shape == (6, 6) and len(quality.filled.unique(dim=0)) > 1  # gaps at different places
    assert quality.mean == dict.fromkeys(("token_match", "exact_match", "rouge1", "rouge2", "rougeL"), 1.0)
    assert set(quality.stderr.values()) == {0.0}


def test_a_model_that_knows_nothing_restores_next_to_nothing():
    model, tokenizer = tiny_diffusion()
    ids = torch.tensor(encode(tokenizer, [" ".join(TEXTS)])[0][: 20 * 31]).view(20, 31)
    blocks = torch.cat([torch.full((20, 1), tokenizer.bos_token_id), ids], 1)
    quality = infilling(model, tokenizer, blocks, gap=8, precision="fp32")
    assert quality.mean["token_match"] < 0.1 and quality.mean["exact_match"] == 0 and quality.mean["rouge1"] < 0.2
    assert quality.stderr["token_match"] == pytest.approx(quality.per_block["token_match"].std(ddof=1) / 20**0.5)


def test_the_error_of_restored_gaps_counts_documents_where_a_score_is_defined():
    tokens = np.array(encode(tiny_tokenizer(), [" ".join(TEXTS)])[0][: 40 * 31])
    tokens[150::250] = 0
    blocks = Blocks(tokens, length=32, begin=0)
    quality = infilling(*tiny_diffusion(), blocks, gap=8, precision="fp32")
    assert np.array_equal(quality.documents, blocks.documents) and len(set(blocks.documents)) == 6
    scores = quality.per_block["token_match"] = blocks.documents + np.arange(40.0)
    assert quality.stderr["token_match"] == standard_error(scores, blocks.documents)
    scores[:5] = np.nan
    assert quality.stderr["token_match"] == standard_error(scores[5:], blocks.documents[5:])


def test_an_ar_model_sees_the_prefix_alone_and_a_diffusion_model_both_sides():
    tokenizer = tiny_tokenizer()
    blocks = torch.randint(1, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    blocks[:, 0] = tokenizer.bos_token_id
    gap = 18  # starts at 2 to 5
    others = blocks.clone()
    others[:, 6:] = blocks[:, 6:].flip(0)  # what stands in the gap from 6 on, and after it
    filled = {}
    for name, (model, words) in {"ar": (tiny_model(vocab=320), tokenizer), "diffusion": tiny_diffusion()}.items():
        filled[name] = [infilling(model, words, rows, gap=gap, precision="fp32").filled for rows in (blocks, others)]
    assert torch.equal(*filled["ar"]) and not torch.equal(*filled["diffusion"])


def test_a_gap_without_words_has_no_rouge_and_one_that_does_not_fit_is_refused():
    tokenizer = tiny_tokenizer()
    stops = torch.tensor([tokenizer.bos_token_id, *encode(tokenizer, ["." * 9])[0]])
    model, tokenizer = knows_by_heart(stops, diffusion=True)
    quality = infilling(model, tokenizer, stops[None], gap=2, precision="fp32")
    assert quality.mean["exact_match"] == 1 and math.isnan(quality.mean["rouge1"])
    assert math.isnan(quality.stderr["exact_match"])  # one block tells nothing about its spread
    for gap in (0, len(stops) - 2):
        with pytest.raises(ValueError, match=f"1 to {len(stops) - 3}, got {gap}"):
            infilling(model, tokenizer, stops[None], gap=gap)


def test_progress_is_shown_on_request(capsys):
    model, tokenizer = tiny_diffusion()
    blocks = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    for progress in (False, True):
        infilling(model, tokenizer, blocks, gap=2, progress=progress)
        shown = capsys.readouterr()
        assert shown.out == "" and ("infilling" in shown.err) == progress


# ----------------------------------------------------------------------------------------------------- answers
def pairs_of(sequences, prompts, length=24):
    """Pairs of token ids, each sequence cut after so many tokens of a prompt."""
    roles = [
        role for ids, cut in zip(sequences, prompts, strict=True) for role in [0] * cut + [1] * (len(ids) - cut) + [2]
    ]
    return Pairs(np.array([token for ids in sequences for token in (*ids, 0)]), np.array(roles), length, begin=0)


@pytest.mark.parametrize("diffusion, shift", [(True, True), (True, False), (False, True)])
def test_a_model_that_knows_the_answers_gives_every_one_and_stops(diffusion, shift):
    tokenizer = tiny_tokenizer()
    ids = encode(tokenizer, TEXTS[:1])[0][:14]
    model, tokenizer = knows_by_heart(torch.tensor([0, *ids, 0]), diffusion, shift)
    pairs = pairs_of([ids] * 5, prompts=[3, 5, 8, 3, 12], length=16)
    quality = answer_quality(model, tokenizer, pairs, batch_size=3, precision="fp32")
    assert quality.texts == [tokenizer.decode(ids[cut:]) for cut in (3, 5, 8, 3, 12)]
    assert quality.mean == {"exact_match": 1.0, "rougeL": 1.0} and set(quality.stderr.values()) == {0.0}
    assert quality.documents.tolist() == [0, 1, 2, 0, 3]


@torch.no_grad()
def test_an_ar_model_answers_as_a_plain_loop_does():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    draws = np.random.default_rng(0)
    pairs = pairs_of([draws.integers(1, 320, n) for n in (8, 12, 20)], prompts=[5, 3, 15], length=24)
    texts = answer_quality(model, tokenizer, pairs, precision="fp32").texts
    for i, text in enumerate(texts):
        prompt = pairs.pair(i)[0].tolist()
        ids, gap = [0, *prompt], min(pairs.longest_answer, 23 - len(prompt))
        while len(ids) < 1 + len(prompt) + gap and (len(ids) == 1 + len(prompt) or ids[-1] != 0):
            hidden = hidden_states(model, torch.tensor([ids]), annealed_mask(len(ids), 0.0))
            ids.append(int(logits_of(model, hidden)[0, -1].argmax()))
        answer = ids[1 + len(prompt) :]
        assert text == tokenizer.decode(answer[: answer.index(0)] if 0 in answer else answer)


def test_an_answer_that_differs_is_scored_by_its_words():
    tokenizer = tiny_tokenizer()
    right, wrong = (encode(tokenizer, [f"Return the {word} of nodes"])[0] for word in ("sum", "mean"))
    model, tokenizer = knows_by_heart(torch.tensor([0, *wrong, 0]), diffusion=False)
    quality = answer_quality(model, tokenizer, pairs_of([right], prompts=[1]), precision="fp32")
    assert quality.mean["exact_match"] == 0 and quality.mean["rougeL"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "truth, text, expected",
    [
        ("the sum of_all x2", "THE sum, of all x2!", 1.0),  # as rouge-score itself counts
        ("ete", "été", 0.0),
        ("Привет мир", "Привет, мир", 1.0),
        ("答案是42", "错的42", 2 / 7),  # one word in common, of four and of three
        ("...", "...", math.nan),
    ],
)
def test_words_of_every_alphabet_count(truth, text, expected):
    assert _rouge([truth], [text], ("rougeL",))["rougeL"][0] == pytest.approx(expected, nan_ok=True)


def test_scores_of_blocks_refuse_pairs():
    model, tokenizer = tiny_diffusion()
    pairs = pairs_of([torch.arange(1, 15)] * 5, prompts=[3] * 5, length=16)
    for score in (by_time, infilling):
        with pytest.raises(ValueError, match=r"this takes blocks of a text, .* not Pairs"):
            score(model, tokenizer, pairs)


def test_answers_end_where_the_positions_of_the_model_do():
    """Each pair fits, but the longest answer behind the longest prompt would not."""
    pairs = pairs_of([torch.arange(1, 60), torch.arange(1, 60)], prompts=[50, 9], length=128)
    for model, tokenizer in (tiny_diffusion(), (tiny_model(vocab=320), tiny_tokenizer())):
        assert len(answer_quality(model, tokenizer, pairs, precision="fp32").texts) == 2
