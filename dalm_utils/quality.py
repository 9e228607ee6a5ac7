"""The quality of generated text: perplexity under a judge beside diversity, and gaps in real text restored."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import annealed_mask
from .backbone import check_fits, eval_mode, hidden_states, max_length, predicting_states
from .evaluation import ar_nll, documents_of, mean_and_error, stack, standard_error
from .head import logits_of, mask_id_of
from .machine import autocast
from .objective import seeded
from .pairs import Pairs
from .sampling import draw, generate
from .tokens import begin_id, decode, unused_ids


@dataclass(frozen=True)
class TextQuality:
    """Perplexity under a judge, never without diversity: a text that repeats itself has a low perplexity."""

    perplexity: float  # of the text under an AR model
    entropy: float  # of a sample's unigram distribution in nats, mean over samples
    distinct_2: float  # distinct pairs of adjacent tokens / all pairs, mean over samples
    repetition: float  # fraction of tokens that occur among the 16 before them, mean over samples
    stderr: dict[str, float]  # the standard error of each, over samples


def text_quality(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> TextQuality:
    """Perplexity under `judge`, an AR model with the same tokens, beside three measures of diversity.

    Args:
        tokens: `[N, L]` long, position 0 the begin token; samples, or real text to compare them with.

    Raises:
        ValueError: rows of fewer than two tokens after the begin token, which hold no pair.
    """
    if tokens.shape[1] < 3:
        raise ValueError(f"text quality needs at least 3 positions, the begin token among them, got {tokens.shape[1]}")
    rows = tokens[:, 1:].tolist()
    nll = ar_nll(judge, tokenizer, tokens)
    diversity: dict[str, list[float]] = {
        "entropy": [_entropy(row) for row in rows],
        "distinct_2": [len(set(itertools.pairwise(row))) / (len(row) - 1) for row in rows],
        "repetition": [sum(t in row[max(0, i - 16) : i] for i, t in enumerate(row)) / len(row) for row in rows],
    }
    means = {name: float(np.mean(values)) for name, values in diversity.items()}
    errors = {name: standard_error(np.array(values)) for name, values in diversity.items()}
    errors["perplexity"] = nll.perplexity * nll.stderr
    return TextQuality(nll.perplexity, means["entropy"], means["distinct_2"], means["repetition"], errors)


def _entropy(row: list[int]) -> float:
    frequencies = np.array(list(Counter(row).values())) / len(row)
    return float(-(frequencies * np.log(frequencies)).sum())


class _Averaged:
    """Scores with their means and errors."""

    per_block: dict[str, np.ndarray]
    documents: np.ndarray | None

    @property
    def mean(self) -> dict[str, float]:
        return {name: mean_and_error(scores, self.documents)[0] for name, scores in self.per_block.items()}

    @property
    def stderr(self) -> dict[str, float]:
        return {name: mean_and_error(scores, self.documents)[1] for name, scores in self.per_block.items()}


@dataclass(frozen=True)
class InfillQuality(_Averaged):
    """How well gaps in held-out text are restored: scores between 0 and 1, higher is better.

    token_match is the fraction of a gap's tokens that are right, exact_match is 1 where all are; rouge1, rouge2 and
    rougeL are F1 on the words of the gap (the package rouge-score, without stemming).
    """

    per_block: dict[str, np.ndarray]  # [N] of each score; NaN where a gap holds no word, or pair of words, to compare
    filled: Tensor  # [N, gap] long: the tokens that the model generated
    documents: np.ndarray | None = None  # [N] equal for blocks of the same document; None where it is not known


@torch.no_grad()
def infilling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Tensor] | Tensor,
    *,
    gap: int = 16,
    order: str = "confidence",
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
    progress: bool = False,
    **how,
) -> InfillQuality:
    """Cut a gap into each block and let the model restore it.

    A diffusion model sees the text on both sides and reveals one token per step, unless `order` says otherwise; an AR
    model continues the prefix. Both take the most probable token (temperature 0), or sample at the same temperature.
    The same seed gives every model the same gaps.

    Args:
        blocks: `[N, L]` long, or a sequence of `[L]` such as `Blocks`; position 0 is the begin token.
        gap: tokens to cut out, at a place drawn uniformly from those that leave a token on either side.
        order: in which a diffusion model reveals tokens; see `generate`.
        how: further arguments of `generate`, for a diffusion model: block_length, cache.

    Raises:
        ValueError: a gap that does not fit between a prefix and a suffix.
    """
    documents, blocks = documents_of(blocks), stack(blocks)
    length = blocks.shape[1]
    if not 1 <= gap <= length - 3:
        raise ValueError(f"a gap in blocks of {length} tokens has 1 to {length - 3}, got {gap}")
    check_fits(model, tokenizer, length)
    starts = torch.randint(2, length - gap, (len(blocks), 1), generator=seeded(seed, gap, "gaps"))
    columns = starts + torch.arange(gap)  # [N, gap]
    fill: Callable = _continue if mask_id_of(model) is None else partial(_fill, order=order, **how)
    pieces = enumerate(zip(blocks.split(batch_size), columns.split(batch_size), strict=True))
    bar = tqdm(pieces, "infilling", -(-len(blocks) // batch_size), leave=False, disable=not progress)
    with eval_mode(model):
        filled = [fill(model, tokenizer, *piece, temperature, seed + number, precision) for number, piece in bar]
    filled = torch.cat(filled)
    return InfillQuality(_gap_scores(tokenizer, filled, blocks.gather(1, columns)), filled, documents)


def _fill(model, tokenizer, blocks, columns, temperature, seed, precision, **how) -> Tensor:
    """A diffusion model's tokens at `columns` `[B, gap]` of `blocks` `[B, L]`, given all the others: `[B, gap]`."""
    gap = columns.shape[1]
    parts = [[row[1 : at[0]], gap, row[at[-1] + 1 :]] for row, at in zip(blocks, columns, strict=True)]
    options = dict(temperature=temperature, seed=seed, precision=precision)
    return generate(model, tokenizer, parts=parts, **options, **how).tokens.gather(1, columns)


def _continue(model, tokenizer, blocks, columns, temperature, seed, precision) -> Tensor:
    """An AR model's tokens there, given those to the left: `[B, gap]`."""
    given = torch.arange(blocks.shape[1]) < columns[:, :1]
    tokens = blocks.where(given, begin_id(tokenizer)).to(model.device)
    causal = annealed_mask(tokens.shape[1], 0.0, dtype=model.dtype, device=model.device)
    rows = torch.arange(len(tokens), device=model.device)
    unused = unused_ids(tokenizer, len(model.get_output_embeddings().weight)).to(model.device)
    draws = seeded(seed, 0, "continue")
    with autocast(model.device, precision):
        for column in columns.T.to(model.device):  # [B]
            hidden = predicting_states(model, hidden_states(model, tokens, causal), rows * tokens.shape[1] + column)
            logits = logits_of(model, hidden).index_fill_(-1, unused, -torch.inf)
            tokens[rows, column] = draw(logits, temperature, None, None, draws).to(model.device)
    return tokens.cpu().gather(1, columns)


def _gap_scores(tokenizer, filled: Tensor, truth: Tensor) -> dict[str, np.ndarray]:
    """Every score of every gap; both `[N, gap]`."""
    right = (filled == truth).double()
    scores = {"token_match": right.mean(1).numpy(), "exact_match": right.prod(1).numpy()}
    wanted, got = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (truth, filled))
    return scores | _rouge(wanted, got, ("rouge1", "rouge2", "rougeL"))


def _rouge(truth: list[str], texts: list[str], kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """F1 of each kind; NaN for a true text without such n-grams, which scores 0 against itself."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and nothing else needs it

    scorer = RougeScorer(kinds, tokenizer=_Words())
    rouge = [
        (scorer.score(wanted, got), scorer.score(wanted, wanted)) for wanted, got in zip(truth, texts, strict=True)
    ]
    return {
        kind: np.array([got[kind].fmeasure if best[kind].fmeasure else math.nan for got, best in rouge])
        for kind in kinds
    }


class _Words:
    """The words of a text: those of rouge-score, which knows ASCII alone, and those of other alphabets.

    Chinese and Japanese, which put no space between words, count by the character.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.lower())


# ------------------------------------------------------------------------------------------------ answers
@dataclass(frozen=True)
class AnswerQuality(_Averaged):
    """How well prompts are answered: scores between 0 and 1, higher is better.

    exact_match is 1 where the answer is the expected one, apart from space around it; rougeL is the F1 of the longest
    common subsequence of words (the package rouge-score, without stemming).
    """

    per_block: dict[str, np.ndarray]  # [N] of each score, one for each pair; NaN where an answer has no words
    texts: list[str]  # the answers that the model gave
    documents: np.ndarray | None = None  # [N] equal for pairs with the same prompt


@torch.no_grad()
def answer_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    order: str = "confidence",
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
    progress: bool = False,
) -> AnswerQuality:
    """Let a model answer prompts, and compare its answers with those of the pairs; of a chat the last one.

    Every answer has room for the longest one of the pairs, and ends where the model ends it. A diffusion model reveals
    one token per step, unless `order` says otherwise; an AR model continues the prompt.

    Args:
        order, block_length: in which a diffusion model reveals tokens; see `generate`.
        temperature: 0 takes the most probable token.

    Raises:
        ValueError: as `generate`.
    """
    given = [tuple(torch.tensor(part.tolist(), dtype=torch.long) for part in pairs.pair(i)) for i in range(len(pairs))]
    check_fits(model, tokenizer, max(1 + len(prompt) + len(answer) for prompt, answer in given))
    room = min(pairs.length, max_length(model))
    answer_all: Callable = partial(_answer, order=order, block_length=block_length)
    answer_all = _answer_in_order if mask_id_of(model) is None else answer_all
    pieces = range(0, len(given), batch_size)
    answers: list[Tensor] = []
    for start in tqdm(pieces, "answering", leave=False, disable=not progress):
        prompts = [prompt for prompt, _ in given[start : start + batch_size]]
        gaps = [min(pairs.longest_answer, room - 1 - len(prompt)) for prompt in prompts]
        with eval_mode(model):
            answers += answer_all(model, tokenizer, prompts, gaps, temperature, seed + start, precision)
    texts = [_until_end(tokenizer, ids, prompt) for ids, (prompt, _) in zip(answers, given, strict=True)]
    truth = [_until_end(tokenizer, ids, prompt) for prompt, ids in given]
    match = np.array([float(wanted.strip() == got.strip()) for wanted, got in zip(truth, texts, strict=True)])
    return AnswerQuality({"exact_match": match, **_rouge(truth, texts, ("rougeL",))}, texts, pairs.documents)


def _answer(model, tokenizer, prompts, gaps, temperature, seed, precision, order, block_length) -> list[Tensor]:
    """The tokens with which a diffusion model fills a gap behind each prompt."""
    parts = [[prompt, gap] for prompt, gap in zip(prompts, gaps, strict=True)]
    how = dict(order=order, block_length=block_length, temperature=temperature, seed=seed, precision=precision)
    tokens = generate(model, tokenizer, parts=parts, stop_at_end=True, **how).tokens
    return [row[1 + len(prompt) :][:gap] for row, prompt, gap in zip(tokens, prompts, gaps, strict=True)]


def _answer_in_order(model, tokenizer, prompts, gaps, temperature, seed, precision) -> list[Tensor]:
    """The tokens with which an AR model continues each prompt."""
    width = 1 + max(len(prompt) + gap for prompt, gap in zip(prompts, gaps, strict=True))
    blocks = torch.full((len(prompts), width), begin_id(tokenizer))
    for row, prompt in zip(blocks, prompts, strict=True):
        row[1 : 1 + len(prompt)] = prompt
    columns = torch.tensor([1 + len(prompt) for prompt in prompts])[:, None] + torch.arange(max(gaps))
    columns = columns.clamp(max=width - 1)  # a row whose gap ends there draws its last token again
    filled = _continue(model, tokenizer, blocks, columns, temperature, seed, precision)
    return [row[:gap] for row, gap in zip(filled, gaps, strict=True)]


def _until_end(tokenizer, ids: Tensor, prompt: Tensor) -> str:
    """The text of an answer up to its end token."""
    end = (ids == begin_id(tokenizer)).nonzero()
    return decode(tokenizer, ids[: int(end[0])].tolist() if len(end) else ids.tolist(), before=prompt.tolist())
