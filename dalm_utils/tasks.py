"""What a run trains for. A `Task` draws the batch of a step, builds its attention mask, and scores held-out text.

`TrainStep` and `Run` use tasks only through this interface, so a new way to train is a new `Task`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import anneal_ratio, annealed_mask
from .backbone import require_mask_id
from .config import RunConfig
from .corpus import load_corpus
from .evaluation import Estimate, ar_nll, nelbo
from .head import mask_id_of
from .objective import Batch, corrupt, default_maskable, place_capacity, sample_times, seeded


class Task:
    """Training on the token blocks of a text; subclasses say what is predicted in them.

    Attributes:
        train: the training blocks; `train[[i, j]]` is `[B, L]` long.
        held_out: the blocks that `score` uses.
        digest: identifies the tokens; a run resumes only on the same ones.
        metric: what `score` measures, "nelbo" or "nll", in nats per token.
        denoises: whether the model restores masked tokens; only then can it have a teacher and generate samples.
    """

    metric = "nelbo"
    denoises = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, processes: int = 1
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.global_batch = config.batch * config.accumulate * processes
        self.anneals = self.denoises
        self.check()
        self.load()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def check(self) -> None:
        """Raise ValueError if the model cannot be trained this way."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the text: set `train`, `held_out` and `digest`."""
        config = self.config
        corpus = load_corpus(config.text, self.tokenizer, field=config.field)  # one process prepares it
        self.train = corpus.blocks("train", config.length, config.train_blocks)
        self.held_out = corpus.blocks("validation", config.length, config.eval_blocks)
        self.digest = corpus.facts["digest"]

    def rows(self, step: int) -> list[int]:
        """The training blocks in the global batch of a step; every epoch is in a new random order."""
        return [self._block_at(step * self.global_batch + i) for i in range(self.global_batch)]

    def _block_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train))
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.train), generator=seeded(self.config.seed, epoch, "data")))
        return int(self._order[1][place])

    def draw(self, step: int) -> Batch:
        """The global batch of a step, on the CPU: a function of seed and step, whatever the number of processes."""
        raise NotImplementedError

    def capacity(self, rows: int) -> int:
        """A number of places K that is enough for nearly every draw of this many sequences."""
        return 256 * -(-rows * (self.config.length - 1) // 256)

    def ratio(self, step: int) -> float:
        """The fraction of look-ahead edges that is open in a step."""
        return anneal_ratio(step, self.config.anneal_steps) if self.anneals else 1.0

    def attention_mask(self, step: int, dtype: torch.dtype) -> Tensor | None:
        """Additive `[1, 1, L, L]` on the CPU, or None: then the model uses its own attention."""
        return None

    def score(self, precision: str) -> Estimate:
        """The held-out likelihood of the model with its current weights."""
        raise NotImplementedError


class MaskedDiffusion(Task):
    """Restore masked tokens while the causal mask opens: the method of arXiv 2410.17891."""

    def check(self) -> None:
        require_mask_id(self.model)
        if self.model.config.shift != self.config.shift:
            raise ValueError(
                f"the model was made with shift={self.model.config.shift}, the config says shift={self.config.shift}"
            )

    def draw(self, step: int) -> Batch:
        config, tokens = self.config, self.train[self.rows(step)]  # [G, L]
        times_rng, mask_rng = (seeded(config.seed, step, purpose) for purpose in ("times", "corruption"))
        times = sample_times(len(tokens), method=config.times, eps=config.eps, generator=times_rng)
        noised, masked = corrupt(tokens, times, require_mask_id(self.model), generator=mask_rng)
        counted = masked if config.normalize == "masked" else default_maskable(tokens)
        return Batch.of(tokens, noised, masked, times, counted.sum().clamp(min=1))

    def capacity(self, rows: int) -> int:
        stratified = self.config.times == "stratified" and rows == self.global_batch
        return place_capacity(rows, self.config.length - 1, stratified=stratified, eps=self.config.eps)

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
                "objective 'ar' needs an AR model; a diffusion model sees the tokens that it would have to predict"
            )

    def draw(self, step: int) -> Batch:
        tokens = self.train[self.rows(step)]
        predicted = default_maskable(tokens)
        return Batch.of(tokens, tokens, predicted, torch.ones(len(tokens)), predicted.sum())

    def score(self, precision: str) -> Estimate:
        return ar_nll(self.model, self.tokenizer, self.held_out, precision=precision)


TASKS: dict[str, type[Task]] = {"diffusion": MaskedDiffusion, "ar": NextToken}  # by `RunConfig.objective`
