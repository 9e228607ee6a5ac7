"""The quality of generated text: perplexity under a judge beside diversity, and gaps in real text restored."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import annealed_mask
from .backbone import check_fits, eval_mode, hidden_states, max_length, predicting_states
from .evaluation import ar_nll, documents_of, mean_and_error, stack, standard_error
from .head import mask_id_of
from .machine import autocast
from .objective import seeded
from .pairs import Pairs
from .sampling import Head, generate
from .tokens import begin_id, decode


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
    starts = torch.randint(2, length - gap, (len(blocks),), generator=seeded(seed, gap, "gaps"))
    parts = [[block[1:at], gap, block[at + gap :]] for block, at in zip(blocks, starts, strict=True)]
    truth = torch.stack([block[at : at + gap] for block, at in zip(blocks, starts, strict=True)])
    options = dict(temperature=temperature, precision=precision, order=order, **how)
    written: list[Tensor] = []
    for start in tqdm(range(0, len(parts), batch_size), "infilling", leave=False, disable=not progress):
        number = start // batch_size
        written += _fill(model, tokenizer, parts[start : start + batch_size], seed=seed + number, **options)
    filled = torch.stack(written)
    return InfillQuality(_gap_scores(tokenizer, filled, truth), filled, documents)


def _fill(model, tokenizer, parts: list[list], *, temperature, seed, precision, **how) -> list[Tensor]:
    """What a model writes into gaps. Each of `parts`: the ids before a gap, its size, and perhaps the ids after it.

    An AR model continues what stands before the gap; `how` is for `generate`, with a diffusion model.
    """
    with eval_mode(model):
        if mask_id_of(model) is None:
            tokens = _continue(model, tokenizer, parts, temperature, seed, precision)
        else:
            options = dict(temperature=temperature, seed=seed, precision=precision)
            tokens = generate(model, tokenizer, parts=parts, **options, **how).tokens
    return [row[1 + len(before) :][:gap] for row, (before, gap, *_) in zip(tokens, parts, strict=True)]


def _continue(model, tokenizer, parts: list[list], temperature, seed, precision) -> Tensor:
    """`[B, L]`: the begin token, the ids before each gap, and what an AR model writes after them."""
    starts = torch.tensor([1 + len(before) for before, *_ in parts])
    gaps = torch.tensor([gap for _, gap, *_ in parts])
    tokens = torch.full((len(parts), int((starts + gaps).max())), begin_id(tokenizer))
    for row, (before, *_) in zip(tokens, parts, strict=True):
        row[1 : 1 + len(before)] = before
    tokens, rows = tokens.to(model.device), torch.arange(len(parts), device=model.device)
    causal = annealed_mask(tokens.shape[1], 0.0, dtype=model.dtype, device=model.device)
    head = Head(model, tokenizer, temperature, None, None, 1.0, seeded(seed, 0, "continue"))
    with autocast(model.device, precision):
        for offset in range(int(gaps.max())):
            # a row whose gap is shorter, and ends at the right edge, draws its last token again
            columns = (starts + offset).clamp(max=tokens.shape[1] - 1).to(model.device)
            states = predicting_states(model, hidden_states(model, tokens, causal), rows * tokens.shape[1] + columns)
            tokens[rows, columns] = head.draw(states, rows, tokens).to(model.device)
    return tokens.cpu()


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
    parts = [[prompt, min(pairs.longest_answer, room - 1 - len(prompt))] for prompt, _ in given]
    options = dict(temperature=temperature, precision=precision, order=order, block_length=block_length)
    answers: list[Tensor] = []
    for start in tqdm(range(0, len(parts), batch_size), "answering", leave=False, disable=not progress):
        some = parts[start : start + batch_size]
        answers += _fill(model, tokenizer, some, seed=seed + start, stop_at_end=True, **options)
    texts = [_until_end(tokenizer, ids, prompt) for ids, (prompt, _) in zip(answers, given, strict=True)]
    truth = [_until_end(tokenizer, ids, prompt) for prompt, ids in given]
    match = np.array([float(wanted.strip() == got.strip()) for wanted, got in zip(truth, texts, strict=True)])
    return AnswerQuality({"exact_match": match, **_rouge(truth, texts, ("rougeL",))}, texts, pairs.documents)


def _until_end(tokenizer, ids: Tensor, prompt: Tensor) -> str:
    """The text of an answer up to its end token."""
    end = (ids == begin_id(tokenizer)).nonzero()
    return decode(tokenizer, ids[: int(end[0])].tolist() if len(end) else ids.tolist(), before=prompt.tolist())
