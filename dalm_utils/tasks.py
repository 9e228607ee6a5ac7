"""What a run trains for. A `Task` draws the batch of a step, builds its attention mask, and scores held-out text.

Two things make a task: what is read (blocks of a text, or prompt/answer pairs), and what is predicted in it (masked
tokens, or the next one).

`TrainStep` and `Run` use tasks only through this interface, so a new way to train is a new `Task`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import anneal_ratio, annealed_mask
from .backbone import require_mask_id
from .config import RunConfig
from .corpus import load_corpus
from .evaluation import Estimate, ar_nll, nelbo
from .head import is_shifted, mask_id_of
from .objective import Batch, corrupt, default_maskable, place_capacity, sample_times, seeded
from .pairs import is_pairs, load_pairs


class Sequences(NamedTuple):
    """The sequences of a step, of all processes together: G of L tokens. All `[G, L]`."""

    tokens: Tensor  # long
    maskable: Tensor  # bool: may be predicted
    counted: Tensor  # bool: counted in the divisor of the loss
    real: Tensor | None = None  # bool: not padding; None: there is no padding


class Task:
    """Training on the token blocks of a text; subclasses say what is predicted in them.

    Attributes:
        train: the training blocks; `train[[i, j]]` is `[B, L]` long. Or the training pairs.
        held_out: the blocks that `score` uses.
        digest: identifies the tokens; a run resumes only on the same ones.
        metric: what `score` measures, "nelbo" or "nll", in nats per token.
        denoises: whether the model restores masked tokens; only then can it have a teacher and generate samples.
        notes: what the user should know about the text before training begins.
    """

    metric = "nelbo"
    denoises = True
    notes: tuple[str, ...] = ()
    train: Any
    held_out: Any

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, processes: int = 1
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.global_batch = config.batch * config.accumulate * processes
        self.anneals = self.denoises and not getattr(model.config, "annealed", False)  # an open mask stays open
        self.check()
        self.load()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def check(self) -> None:
        """Raise ValueError if the model cannot be trained this way."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the text: set `train`, `held_out`, `digest` and `notes`."""
        config = self.config
        try:
            corpus = load_corpus(config.text, self.tokenizer, field=config.field)  # one process prepares it
        except ValueError as error:
            if not is_pairs(config.text, config.field):
                raise
            raise ValueError(
                f"{config.text!r} has prompt/answer pairs, not documents: train on it with objective='finetune'"
            ) from error
        self.train = corpus.blocks("train", config.length, config.train_blocks)
        self.held_out = corpus.blocks("validation", config.length, config.eval_blocks)
        self.digest = corpus.facts["digest"]
        self.notes = tuple(filter(None, [corpus.about_left_out()]))

    def block_indices(self, step: int) -> list[int]:
        """The training blocks in the global batch of a step; every epoch is in a new random order."""
        return [self._block_at(step * self.global_batch + i) for i in range(self.global_batch)]

    def _block_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train))
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.train), generator=seeded(self.config.seed, epoch, "data")))
        return int(self._order[1][place])

    def sequences(self, step: int) -> Sequences:
        """What the batch of a step is made of."""
        tokens = self.train[self.block_indices(step)]
        maskable = default_maskable(tokens)
        return Sequences(tokens, maskable, maskable)

    def draw(self, step: int) -> Batch:
        """The global batch of a step, on the CPU: a function of seed, step and global batch size alone."""
        raise NotImplementedError

    def capacity(self, sequences: int) -> int:
        """A number of places K that is enough for nearly every draw of this many sequences."""
        return 256 * -(-sequences * (self.config.length - 1) // 256)

    def ratio(self, step: int) -> float:
        """The fraction of look-ahead edges that is open in a step of a task that denoises."""
        return anneal_ratio(step, self.config.anneal_steps) if self.anneals else 1.0

    def attention_mask(self, step: int, dtype: torch.dtype) -> Tensor | None:
        """Additive `[1, 1, L, L]` on the CPU, or None: then the model uses its own attention."""
        return None

    def score(self, precision: str) -> Estimate:
        """The held-out likelihood of the model with its current weights."""
        raise NotImplementedError

    def sample_request(self) -> dict:
        """The arguments of `generate` for the sample that a record shows."""
        return {"length": min(64, self.config.length - 1)}


class MaskedDiffusion(Task):
    """Restore masked tokens while the causal mask opens: the method of arXiv 2410.17891."""

    def check(self) -> None:
        require_mask_id(self.model)
        if is_shifted(self.model) != self.config.shift:
            raise ValueError(
                f"the model was made with shift={is_shifted(self.model)}, the config says shift={self.config.shift}"
            )

    def draw(self, step: int) -> Batch:
        config = self.config
        tokens, maskable, counted, real = self.sequences(step)
        times_rng, mask_rng = (seeded(config.seed, step, purpose) for purpose in ("times", "corruption"))
        times = sample_times(len(tokens), method=config.times, eps=config.eps, generator=times_rng)
        noised, masked = corrupt(tokens, times, require_mask_id(self.model), maskable=maskable, generator=mask_rng)
        counted = masked if config.normalize == "masked" else counted
        return Batch.of(tokens, noised, masked, times, counted.sum().clamp(min=1), real)

    def capacity(self, sequences: int) -> int:
        # the times of a whole batch are stratified, not those of a part of it
        stratified = self.config.times == "stratified" and sequences == self.global_batch
        return place_capacity(sequences, self.most_maskable, stratified=stratified, eps=self.config.eps)

    @property
    def most_maskable(self) -> int:
        """The most maskable tokens that a sequence can have."""
        return self.config.length - 1

    def attention_mask(self, step: int, dtype: torch.dtype) -> Tensor | None:
        rng = seeded(self.config.seed, step, "annealing")
        return annealed_mask(self.config.length, self.ratio(step), dtype=dtype, generator=rng)

    def score(self, precision: str) -> Estimate:
        samples = self.config.eval_samples
        return nelbo(self.model, self.tokenizer, self.held_out, num_samples=samples, precision=precision)


class NextToken(Task):
    """Predict every token from those before it: ordinary AR training, used to make the AR bases."""

    metric = "nll"
    denoises = False

    def check(self) -> None:
        if mask_id_of(self.model) is not None:
            raise ValueError(
                f"objective {self.config.objective!r} needs an AR model; a diffusion model sees the tokens that it "
                "would have to predict"
            )

    def draw(self, step: int) -> Batch:
        tokens, predicted, counted, real = self.sequences(step)
        return Batch.of(tokens, tokens, predicted, torch.ones(len(tokens)), counted.sum(), real)

    def score(self, precision: str) -> Estimate:
        return ar_nll(self.model, self.tokenizer, self.held_out, precision=precision)


class OnPairs(Task):
    """Training on prompt/answer pairs: only answers, and the end token after them, are predicted and counted."""

    def load(self) -> None:
        config = self.config
        corpus = load_pairs(config.text, self.tokenizer, field=config.field)
        self.train = corpus.pairs("train", config.length, config.train_blocks)
        self.held_out = corpus.pairs("validation", config.length, config.eval_blocks)
        self.digest = corpus.facts["digest"]
        splits = {"training": self.train, "validation": self.held_out}
        dropped = (pairs.about_dropped(self.tokenizer, name) for name, pairs in splits.items())
        self.notes = tuple(filter(None, (corpus.about_left_out(), corpus.about_spelled(), *dropped)))

    def sequences(self, step: int) -> Sequences:
        tokens, answers, real = self.train[self.block_indices(step)]
        return Sequences(tokens, answers, answers, real)


class Finetuning(OnPairs, MaskedDiffusion):
    """Restore masked tokens of answers; a prompt is never masked, and never counts.

    The score is the conditional NELBO, in nats per answer token, end token included. In training an answer continues
    with a random number of further end tokens, up to the length of the longest answer, which are masked and predicted
    like its own, but not counted in the loss's divisor. So the number of [MASK] tokens does not tell how long the
    answer is, and the model learns to stop in a gap of any size (as LLaDA, arXiv 2502.09992).
    """

    def check(self) -> None:
        super().check()
        if self.config.distill:
            raise ValueError(f"finetuning on pairs has no teacher, but distill={self.config.distill}; set distill=0")

    def sequences(self, step: int) -> Sequences:
        tokens, answers, real = self.train[self.block_indices(step)]
        room = self.train.longest_answer - answers.sum(1)  # [G]
        draws = torch.rand(len(tokens), generator=seeded(self.config.seed, step, "ends"))
        end = real.sum(1) + (draws * (room + 1)).long()
        inside = torch.arange(tokens.shape[1]) < end[:, None]  # [G, L]; padding holds the end token already
        return Sequences(tokens, answers | (inside & ~real), answers, inside)

    @property
    def most_maskable(self) -> int:
        return self.train.longest_answer

    def sample_request(self) -> dict:
        prompt = self.held_out.prompt(0)
        gap = min(self.train.longest_answer, self.config.length - 1 - len(prompt))
        return {"parts": [torch.tensor(prompt.tolist(), dtype=torch.long), gap], "stop_at_end": True}


class NextTokenFinetuning(OnPairs, NextToken):
    """Predict every token of an answer from those before it: ordinary finetuning of an AR model, to compare with."""

    def attention_mask(self, step: int, dtype: torch.dtype) -> Tensor | None:
        # Padding needs an explicit mask, and that replaces the model's own causal one.
        return annealed_mask(self.config.length, 0.0, dtype=dtype)


TASKS: dict[str, type[Task]] = {  # by `RunConfig.objective`
    "diffusion": MaskedDiffusion,
    "ar": NextToken,
    "finetune": Finetuning,
    "finetune-ar": NextTokenFinetuning,
}
