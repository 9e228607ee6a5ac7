"""One run: a model in training, its records and its checkpoints; on one process or many, and the same on all of them.

Everything random in a step is a function of (seed, step), see `step.py`. So a run needs no generator state to be
resumed, and processes that share the same global batch see the noise of a single one (except for dropout, which each
process draws for itself).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_model, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import as_diffusion, check_finite, check_fits, load_base, randomize, save_diffusion
from .checkpoint import RunFolder
from .config import FREE_FIELDS, RunConfig
from .distillation import fit_distill
from .evaluation import Estimate
from .head import mask_id_of
from .history import History, finite
from .lora import Adapter
from .machine import DTYPES, pick_device, pick_precision
from .processes import (
    full_weights,
    gathered,
    host_copy,
    is_sharded,
    load_optimizer,
    load_weights,
    on_main,
    optimizer_state,
)
from .sampling import NotFinite, generate
from .stability import MAX_ROLLBACKS, ROLLBACK_LR_FACTOR, Unstable
from .step import TrainStep
from .tasks import TASKS
from .terminal import first_line, warn
from .tokens import tokenizer_digest

ADAPTER = "adapter.safetensors"  # in a checkpoint of a run with `lora_rank`, in place of the model
SAVED = ("step", "seconds", "best", "window_steps", "rollbacks", "stale", "distill")  # in each checkpoint


def build(config: RunConfig, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a config describes, on its device: the base, or random weights of its shape, as a diffusion model.

    A base that is a diffusion model already is taken as it is. A device or precision that this machine lacks is found
    before anything is downloaded.

    Args:
        device: where to put the model instead, for example "cpu" for `train`, which moves it.

    Raises:
        ValueError, RuntimeError: as `load_base`, `as_diffusion`, `pick_device` and `pick_precision`.
    """
    pick_precision(config.precision, pick_device(config.device))
    model, tokenizer = load_base(config.base, hub=config.hub, device=device or config.device)
    if config.scratch:
        model = randomize(model, config.seed)
        if mask_id_of(model) is not None:
            model.config.annealed = False  # random weights have everything to learn, whatever the base was
    if not TASKS[config.objective].denoises or mask_id_of(model) is not None:
        return model, tokenizer
    return as_diffusion(model, tokenizer, shift=config.shift)


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine that reaches `final_lr` times the peak after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def teacher_weight(distill: float, step: int, steps: int) -> float:
    """The teacher's weight in the target, r / (1 + r), where r falls linearly from `distill` to 0 over the steps."""
    ratio = distill * max(0.0, 1 - step / steps)
    return ratio / (1 + ratio)


class Run:
    """One model in training. `advance` takes a step; `save` writes a checkpoint; `close` releases the folder.

    Raises:
        ValueError: the run of that name had other settings, the model does not fit the config or the tokenizer,
            or the text is too short.
        RuntimeError: another process is writing to the same run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        accelerator: Accelerator,
        resume: str = "auto",
    ):
        check_model(model, tokenizer, config)
        if config.lora_rank and is_sharded(accelerator):
            raise ValueError(f"lora_rank={config.lora_rank} is not for FSDP; launch with --multi_gpu, or lora_rank=0")
        self.model, self.tokenizer, self.config, self.accelerator = model, tokenizer, config, accelerator
        self.is_main = accelerator.is_main_process
        self.task = TASKS[config.objective](model, tokenizer, config, processes=accelerator.num_processes)
        self.total = config.steps or math.ceil(config.epochs * len(self.task.train) / self.task.global_batch)
        self.precision = pick_precision(config.precision, accelerator.device)
        teacher = self._load_teacher() if config.distill and self.task.denoises and not config.scratch else None
        self.distill = config.distill if teacher is not None else 0.0

        self.step, self.seconds, self.best, self.window_steps = 0, 0.0, math.inf, 0
        self.rollbacks, self.stale = 0, 0  # rollbacks so far; evaluations since the best one
        self.saved_step = -1
        self.in_background = saves_in_background(accelerator)
        self.adapter: Adapter | None = None

        self.folder = RunFolder(config.folder)
        newest = on_main(accelerator, lambda: self.folder.open(self._settings(teacher), resume))
        try:
            if config.lora_rank:
                self.adapter = Adapter(model, config.lora_rank, config.seed)
            if newest is not None and self.adapter is not None:
                self.adapter.load(newest / ADAPTER)
            elif newest is not None:
                load_model(model, newest / "model.safetensors")
            self.train_step = TrainStep(self.task, config, accelerator, self.precision, teacher)
            self._restore(newest)
            if newest is None and teacher is not None and config.distill_fit:
                self.distill = on_main(  # every process gets the same
                    accelerator,
                    lambda: fit_distill(teacher, self.task.train, self.task.held_out, config.distill),
                )
            self._announce(newest)
        except BaseException:
            self.close()
            raise

    def _settings(self, teacher: PreTrainedModel | None) -> dict:
        """What a resumed run must have in common with the run it resumes; `text` and `field` only say where it was."""
        fields = {name: value for name, value in vars(self.config).items() if name not in FREE_FIELDS}
        return fields | {
            "text": self.config.text,
            "field": self.config.field,
            "precision": self.precision,
            "global_batch": self.task.global_batch,
            "total_steps": self.total,
            "model": f"{type(self.model).__name__} with {self.model.num_parameters()} parameters",
            "mask_id": mask_id_of(self.model),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "corpus": self.task.digest,
            "train_blocks_are": "sampled" if self.config.train_blocks else "the first",
            "teacher": None if teacher is None else _digest(teacher),
            "adapted": _digest(self.model) if self.config.lora_rank else None,  # checkpoints hold the adapter alone
        }

    def _load_teacher(self) -> PreTrainedModel:
        """The base, frozen; every process has a whole copy."""
        config = self.config
        with self.accelerator.main_process_first():
            teacher, tokenizer = load_base(
                config.base, hub=config.hub, device=self.accelerator.device, dtype=DTYPES[self.precision]
            )
        same = tokenizer_digest(tokenizer) == tokenizer_digest(self.tokenizer)
        rows, own_rows = (len(model.get_output_embeddings().weight) for model in (teacher, self.model))
        if mask_id_of(teacher) is not None or not same or rows > own_rows:
            raise ValueError(
                f"distill={config.distill} needs the AR model that this model was made from, but base={config.base!r} "
                "is a diffusion model or has other tokens; set `base`, or distill=0"
            )
        return teacher.requires_grad_(False)

    def _announce(self, newest: Path | None) -> None:
        """Say where a resumed run starts, and which parts of a schedule do not fit into the run."""
        config, said = self.config, list(self.task.notes)
        if newest is not None:
            said += [f"{config.name}: resuming from step {self.step} of {self.total}"]
        if self.distill < 0.99 * config.distill and self.train_step.teacher is not None:
            said += [
                f"distill lowered from {config.distill:g} to {self.distill:.3g}: on this text the base {config.base!r} "
                f"predicts little better than token frequencies; distill_fit=false keeps {config.distill:g}"
            ]
        if self.adapter is not None:
            trained = sum(weight.numel() for weight in self.adapter.trained().values())
            whole = self.model.num_parameters() - trained
            said += [f"LoRA of rank {config.lora_rank}: {trained:,} weights are trained, {trained / whole:.2%} of all"]
        if self.task.denoises and not self.task.anneals and newest is None:
            said += [f"the mask of {config.base!r} is open already: anneal_steps={config.anneal_steps} is not used"]
        if self.task.anneals and config.anneal_steps > self.total:
            said += [
                f"anneal_steps={config.anneal_steps} is longer than the run of {self.total} steps: its mask will be "
                f"only {self.task.ratio(self.total - 1):.0%} open at the end; to open it fully, lower anneal_steps"
            ]
        if config.warmup_steps >= self.total:
            said += [f"warmup_steps={config.warmup_steps} leaves no step after the warm-up in a run of {self.total}"]
        if self.is_main and said:
            warn("\n".join(said))

    # -- one step ---------------------------------------------------------------------------------------
    @property
    def is_done(self) -> bool:
        """Whether the last step was taken, or patience has run out."""
        return self.step >= self.total or self.stale >= (self.config.patience or math.inf)

    @property
    def watch(self):
        """Counts skipped steps and saturated predictions."""
        return self.train_step.watch

    def advance(self) -> bool:
        """One optimizer step, and the evaluation, record and checkpoint that are due. True if it recorded.

        Raises:
            Unstable: rolling back does not help, or is not possible.
        """
        if not self.history.records:
            if isinstance(self.train_step.module, FSDPModule):  # it sets itself up in its first pass
                self.train_step.trouble_ahead(self.step)
            self._record(self._figures(self._score()))  # where the held-out curve begins
        config, start = self.config, time.perf_counter()
        rate = learning_rate(config, self.step, self.total) * ROLLBACK_LR_FACTOR**self.rollbacks
        norm = self.train_step(self.step, rate, self._teacher_weight())
        self.step += 1
        self.window_steps += 1
        log, evaluate, save = (
            self._is_due(every) for every in (config.log_every, config.eval_every, config.save_every)
        )
        if log:
            norm = norm.item()  # waits for the device, so that the clock is honest
        self.seconds += time.perf_counter() - start

        record, trouble = self._progress(norm, rate) if log else ({}, None)
        if evaluate or save:
            self.folder.wait()  # so that host memory holds the copies of one step, not of several
        if evaluate and trouble is None:
            scores, trouble = self._evaluate()
            record |= scores
        if trouble is None and self.is_done:
            trouble = self.train_step.trouble_ahead(self.step)
        if trouble is not None:
            self._roll_back(trouble)
            return True
        if config.sample_every and self.step % config.sample_every == 0 and self.task.denoises:
            record |= self._sample()
        if record:
            self._record(record)
        if self.is_done and self.step < self.total:
            self._record({"event": f"finished: no better {self.task.metric.upper()} in {self.stale} evaluations"})
        if self.is_done:
            self._write_checkpoint()  # its weights are sound, or the run would have rolled back above
        elif save and self.watch.is_calm(self._saturated()):
            self._save_if_sound()
        return bool(record)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _teacher_weight(self) -> float:
        return teacher_weight(self.distill, self.step, self.config.distill_steps or self.total)

    def _saturated(self) -> float:
        """Saturated predictions since the last record, summed over all processes."""
        return self.accelerator.reduce(self.watch.values["saturated"], "sum").item()

    # -- records ----------------------------------------------------------------------------------------
    def _record(self, record: dict) -> None:
        """Add to the history, on every process, and to the main one's disk and trackers."""
        record = {"step": self.step, "tokens": self.step * self.task.global_batch * self.config.length, **record}
        self.history.append(record)
        if self.accelerator.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
            try:
                self.accelerator.log({f"{self.config.name}/{k}": v for k, v in numbers.items()}, step=self.step)
            except Exception as error:  # of any tracker: a full disk, a server that has gone
                self.accelerator.trackers.clear()  # in place, since all arms share them
                warn(f"the trackers failed ({first_line(error)}); training goes on without them")

    def _progress(self, norm: float, rate: float) -> tuple[dict, str | None]:
        """How training goes, and what is wrong with it, if anything."""
        tokens = self.step * self.task.global_batch * self.config.length
        scaler = self.accelerator.scaler
        stability, trouble = self.watch.read(self._saturated(), scaler.get_scale() if scaler else None)
        if trouble is None and self.watch.skipped_in_a_row() >= self.total:
            trouble = "every step was skipped"
        loss = self.accelerator.reduce(self.train_step.nll_sum, "mean").item() / self.window_steps
        self.train_step.nll_sum.zero_()
        self.window_steps = 0
        figures = {
            "loss": finite(loss),
            "grad_norm": finite(norm),
            "lr": rate,
            **({"ratio": self.task.ratio(self.step - 1)} if self.task.denoises else {}),
            **stability,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds),
            "memory": round(_memory(self.accelerator.device), 2),
            "eta": round(self.seconds / self.step * (self.total - self.step)),
        }
        return figures, trouble

    def _score(self) -> Estimate:
        """The held-out likelihood of the current weights, the same number on every process."""
        with gathered(self.train_step.module):
            score = self.task.score(self.precision)
        return on_main(self.accelerator, lambda: score)  # all processes must agree on what is best

    def _figures(self, score: Estimate) -> dict:
        key = self.task.metric
        figures = {key: score.mean, f"{key}_stderr": score.stderr, "bits_per_byte": score.bits_per_byte}
        return {name: finite(value) for name, value in figures.items()}

    def _evaluate(self) -> tuple[dict, str | None]:
        """The held-out score, the best model saved, and what is wrong, if anything."""
        score = self._score()
        if not math.isfinite(score.mean):
            skipped = self.watch.skipped_in_a_row()
            since = f"; from step {self.step - skipped + 1} on, every step was skipped" if skipped else ""
            return {}, f"the held-out {self.task.metric.upper()} is not finite{since}"
        if score.mean < self.best:
            self.stale = 0
            self._write("best", self._model_writer(), then=partial(setattr, self, "best", score.mean))
        else:
            self.stale += 1
        return self._figures(score), None

    def _sample(self) -> dict:
        """A generated text; none from broken weights, which are for `watch` to notice."""
        request = self.task.sample_request()
        try:
            with gathered(self.train_step.module):
                samples = generate(
                    self.model, self.tokenizer, **request, steps=32, seed=self.config.seed, precision=self.precision
                )
        except NotFinite as error:
            if self.is_main:
                warn(f"no sample at step {self.step}: {first_line(error)}")
            return {}
        return {"sample": samples.text[0]}

    # -- checkpoints ------------------------------------------------------------------------------------
    def save(self) -> str | None:
        """Write a checkpoint of this step, unless it is there, prune older ones, and wait until that is done.

        Weights are saved only if the next training step could use them: a checkpoint is something to roll back to.

        Returns:
            What is wrong with the weights, if they were not saved for that reason.
        """
        self.folder.wait()
        trouble = None if self.saved_step == self.step else self._save_if_sound()
        self.folder.wait()
        return trouble

    def _save_if_sound(self) -> str | None:
        trouble = self.train_step.trouble_ahead(self.step)
        if trouble is None:
            self._write_checkpoint()
        return trouble

    def _write_checkpoint(self) -> None:
        train_step, accelerator, step = self.train_step, self.accelerator, self.step
        if self.adapter is None:
            write_model = self._model_writer(published_names=False)  # they are read back into this module
        else:
            write_model = self._adapter_writer(self.adapter)
        optimizer = optimizer_state(train_step.module, train_step.adamw, copy=self.in_background)
        history = History(records=list(self.history.records))
        state = {name: getattr(self, name) for name in SAVED}
        state["anneals"] = self.task.anneals
        state["window_loss"] = accelerator.reduce(train_step.nll_sum, "mean").item()
        state["watch"] = self.watch.state()
        state["watch"]["saturated"] = self._saturated()
        state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None

        def fill(folder: Path) -> None:
            write_model(folder)
            torch.save(optimizer, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(state | {"best": self.best}))  # `best` is written by now
            history.write(folder / "history.jsonl")

        def then() -> None:
            self.saved_step = step
            if self.is_main:
                self.folder.prune(self.config.keep)

        self._write(f"step-{step:06d}", fill, then)

    def close(self) -> None:
        """Release the run's folder, once everything is written; the model takes in what its adapter learned."""
        self.folder.close()
        if self.adapter is not None:
            self.adapter.merge()
            self.adapter = None

    def _write(self, name: str, fill: Callable[[Path], None], then: Callable[[], None]) -> None:
        """Write a folder of the run, and do `then` if the disk took it; perhaps in the background, in this order."""
        if self.in_background:
            self.folder.write_later(name, fill, then)
        elif on_main(self.accelerator, lambda: self.folder.write(name, fill)):
            then()

    def _model_writer(self, published_names: bool = True) -> Callable[[Path], None]:
        """A function that writes the model as it is now. All processes must ask for it, since FSDP gathers from all."""
        if self.task.denoises:  # a model whose mask has opened is trained further without closing it
            self.model.config.annealed = self.task.ratio(max(0, self.step - 1)) == 1.0
        if self.adapter is None:
            weights = full_weights(self.train_step.module, self.model.all_tied_weights_keys, copy=self.in_background)
        else:
            weights = self.adapter.merged()
        return lambda folder: save_diffusion(
            self.model, self.tokenizer, folder, weights, published_names=published_names
        )

    def _adapter_writer(self, adapter: Adapter) -> Callable[[Path], None]:
        """A function that writes the adapter as it is now."""
        weights = host_copy({name: weight.detach() for name, weight in adapter.trained().items()})
        return lambda folder: save_file(weights, folder / ADAPTER)

    def _restore(self, checkpoint: Path | None) -> None:
        """Continue from a checkpoint whose weights are loaded already; from None, begin."""
        self.history = History() if checkpoint is None else History.load(checkpoint / "history.jsonl")
        self.history.path = self.folder.path / "history.jsonl" if self.is_main else None  # one process writes
        self.history.save()
        if checkpoint is not None:
            state = json.loads((checkpoint / "state.json").read_text())
            for name in SAVED:
                setattr(self, name, state.get(name, getattr(self, name)))  # older checkpoints lack some
            self.task.anneals = state.get("anneals", self.task.anneals)
            load_optimizer(self.train_step.module, self.train_step.adamw, checkpoint / "optimizer.pt")
            self.train_step.reset()
            self.train_step.nll_sum.fill_(state["window_loss"])
            self.watch.load(state["watch"])
            self.watch.values["saturated"].div_(self.accelerator.num_processes)  # its sum over all of them was saved
            if state["scaler"] and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.saved_step = self.step

    def _roll_back(self, trouble: str) -> None:
        """Continue from the newest checkpoint with a lower learning rate, and say so, on the disk too."""
        self.folder.wait()
        was, rollbacks, seconds, best, counted = self.step, self.rollbacks + 1, self.seconds, self.best, self.watch
        newest = on_main(self.accelerator, self.folder.newest)
        if newest is None or rollbacks > MAX_ROLLBACKS:
            tried = f"after {rollbacks - 1} rollbacks" if self.rollbacks else "before the first checkpoint"
            raise Unstable(
                f"training is unstable: at step {was}, {tried}, {trouble}. Start over with a lower learning_rate or "
                "more warmup_steps, under another `name` or with resume='never' (in a terminal --fresh)"
                + ("" if newest else "; a smaller save_every leaves a checkpoint to roll back to")
            )
        if self.adapter is not None:
            self.adapter.load(newest / ADAPTER)
        else:
            load_weights(self.train_step.module, self.model, newest / "model.safetensors")
        self._restore(newest)
        self.watch.forgive(counted)
        self.rollbacks, self.seconds, self.best = rollbacks, seconds, best
        factor = ROLLBACK_LR_FACTOR**rollbacks
        event = f"at step {was} ({trouble}): rolled back to step {self.step}, learning rate x {factor:g}"
        self._record({"event": event})
        if self.is_main:
            warn(event)
        self._write_checkpoint()  # so that a run stopped right now remembers that it rolled back


# ------------------------------------------------------------------------------------------------- helpers
def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    """Raise ValueError if model, tokenizer and config do not belong together."""
    check_fits(model, tokenizer, config.length)
    if not config.lora_rank and (half := {w.dtype for w in model.parameters()} & {torch.bfloat16, torch.float16}):
        raise ValueError(
            f"the weights are in {', '.join(sorted(map(str, half)))}, too coarse for small updates; load them with "
            "dtype=torch.float32 (`precision` only sets that of matrix products)"
        )
    check_finite(model)


def saves_in_background(accelerator: Accelerator) -> bool:
    """Whether training goes on while a checkpoint is written. On a CPU the copies would cost what that saves."""
    return accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO


def _digest(model: nn.Module) -> str:
    """A hash of the weights."""
    hashed = hashlib.blake2b(digest_size=8)
    for weight in model.parameters():
        hashed.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _memory(device: torch.device) -> float:
    """GiB: the most that was allocated on a GPU, or what this process holds now."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 2**30
