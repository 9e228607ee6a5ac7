"""The one training loop: adapts, trains from scratch, and (objective="ar") makes the AR bases too."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoint
from .annealing import anneal_ratio, annealed_mask
from .backbone import as_diffusion, load_base, pick_device, pick_precision, randomize, save_diffusion
from .checkpoint import History
from .config import FREE_FIELDS, RunConfig
from .corpus import Blocks, load_corpus
from .evaluation import ar_nll, nelbo
from .objective import corrupt, default_maskable, diffusion_loss, sample_times, seeded
from .sampling import generate

OnLog = Callable[[History, RunConfig], None]


# --------------------------------------------------------------------------------------------- the public
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    resume: str = "auto",
    on_log: OnLog | None = None,
) -> History:
    """Train in place and return what was recorded; the run's folder holds checkpoints, `best` and history.

    Interrupting (Ctrl-C, the stop button, SIGTERM) finishes the step, writes a checkpoint and returns.
    Called again with the same config it continues there, and what it then does is what it would have done.

    Args:
        model: from `as_diffusion` (or a plain AR model if `config.objective` is "ar").
        resume: "auto" continues from the newest whole checkpoint, if there is one; "never" starts afresh and
            moves an earlier run of that name aside.
        on_log: called with (history, config) after each record, to draw it.

    Raises:
        ValueError: the earlier run of that name had another config (the difference is spelled out), the
            model has too few positions, or the text too few tokens.
    """
    run = _Run(model, tokenizer, config, _accelerator(config), resume)
    steps_taken = sum(1 for _ in _steps({config.name: run}, on_log))
    if steps_taken == 0 and on_log is not None and run.history.records:
        on_log(run.history, config)  # a finished run shows its curve again
    return run.history


def train_arms(
    configs: dict[str, RunConfig], *, resume: str = "auto", on_log: Callable[[dict[str, History]], None] | None = None
) -> dict[str, History]:
    """Train several arms step by step in turn, in one process: same batches, times, masks and annealing draws.

    Each arm builds its own model with `build` and keeps its own folder, `<config.name>-<arm>`; arms with the same
    seed, text, length and batch are paired.
    """
    accelerator = _accelerator(next(iter(configs.values())))
    runs = {}
    for name, config in configs.items():
        runs[name] = _Run(*build(config), config.replace(name=f"{config.name}-{name}"), accelerator, resume)
    for _ in _steps(runs):
        if on_log is not None:
            on_log({name: run.history for name, run in runs.items()})
    return {name: run.history for name, run in runs.items()}


def build(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a config describes: base, from scratch or not, made a diffusion model, on its device."""
    model, tokenizer = load_base(config.base, hub=config.hub, device=config.device)
    if config.scratch:
        model = randomize(model, config.seed)
    return (model, tokenizer) if config.objective == "ar" else as_diffusion(model, tokenizer, shift=config.shift)


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak down to `final_lr` times the peak at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# ------------------------------------------------------------------------------------------------ the loop
def _steps(runs: dict[str, _Run], on_log: OnLog | None = None) -> Iterator[None]:
    """Advance all runs by one step, again and again, until they are done or the user stops them."""
    some = next(iter(runs.values()))
    bar = tqdm(total=some.total, initial=some.step, desc=" + ".join(runs), unit="step", disable=not some.is_main)
    with _stop_at_step_end() as stopped, bar:
        while any(run.step < run.total for run in runs.values()) and not stopped:
            for run in runs.values():
                if run.step < run.total and run.advance() and on_log is not None:
                    on_log(run.history, run.config)
            bar.update()
            bar.set_postfix({key: f"{value:.3f}" for key in ("loss", "nelbo") if (value := some.history.last(key))})
            yield
    for run in runs.values():
        run.save()
        if stopped:
            print(f"stopped at step {run.step} of {run.total}; run it again to continue from there", file=sys.stderr)


@contextlib.contextmanager
def _stop_at_step_end() -> Iterator[list]:
    """A list that is empty until Ctrl-C or SIGTERM asks for an end; a step is never cut in two."""
    stopped: list = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread receives signals
        return
    old = {kind: signal.signal(kind, lambda *_: stopped.append(True)) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


class _Objective(nn.Module):
    """The loss as a module, so that accelerate's wrappers (autocast, DDP, FSDP) see one forward pass."""

    def __init__(self, model: PreTrainedModel, shift: bool):
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, tokens, noised, masked, times, attention_mask):
        loss = diffusion_loss(
            self.model, tokens, noised, masked, times, attention_mask=attention_mask, shift=self.shift
        )
        return loss.total


class _Run:
    """One model, its optimizer and where it stands."""

    def __init__(self, model, tokenizer, config: RunConfig, accelerator: Accelerator, resume: str):
        self.model, self.tokenizer, self.config, self.accelerator = model, tokenizer, config, accelerator
        self.folder, self.is_main = config.folder, accelerator.is_main_process
        self.is_ar = config.objective == "ar"
        self._check_model()
        corpus = load_corpus(config.text, tokenizer, field=config.field)
        self.blocks = corpus.blocks("train", config.length, config.train_blocks)
        self.held_out = _first(corpus.blocks("validation", config.length), config.eval_blocks)
        self.global_batch = config.batch * config.accumulate * accelerator.num_processes
        self.total = config.steps or math.ceil(config.epochs * len(self.blocks) / self.global_batch)

        _set_dropout(model, config.dropout)
        model.to(accelerator.device)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if config.compile:
            for block in _transformer_blocks(model):
                block.compile()
        self.adamw = _adamw(model, config)
        module = _Objective(model, config.shift or self.is_ar)
        self.objective, self.optimizer = accelerator.prepare(module, self.adamw)
        self.precision = pick_precision(config.precision, accelerator.device)
        self.mask_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

        self.step, self.seconds, self.best, self.window_steps = 0, 0.0, math.inf, 0
        self.window_loss = torch.zeros((), device=accelerator.device)
        self.skipped = torch.zeros((), dtype=torch.long, device=accelerator.device)
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
        settings = {name: value for name, value in vars(config).items() if name not in FREE_FIELDS}
        if self.is_main:
            checkpoint.open_run(self.folder, settings, resume)
        accelerator.wait_for_everyone()
        self._restore(checkpoint.newest(self.folder))

    # -- one step ---------------------------------------------------------------------------------------
    def advance(self) -> bool:
        """One optimizer step, and the evaluation, record and checkpoint that are due. True if it recorded."""
        start = time.perf_counter()
        norm = self._optimize()
        self.step += 1
        log, evaluate, save = (self._is_due(every) for every in ("log_every", "eval_every", "save_every"))
        sample = self.config.sample_every > 0 and self.step % self.config.sample_every == 0 and not self.is_ar
        if log:
            norm = norm.item()  # waits for the device, so that the clock is honest
        self.seconds += time.perf_counter() - start
        if log or evaluate or sample:
            record = {"step": self.step, "tokens": self.step * self.global_batch * self.config.length}
            record |= self._progress(norm, record["tokens"]) if log else {}
            record |= self._evaluate() if evaluate else {}
            record |= self._sample() if sample else {}
            if self.is_main:
                self.history.append(record)
        if save:
            self.save()
        return log or evaluate or sample

    def _is_due(self, every: str) -> bool:
        return self.step % getattr(self.config, every) == 0 or self.step == self.total

    def _optimize(self) -> Tensor:
        """One optimizer step, without waiting for the device; returns the gradient norm."""
        config, accelerator = self.config, self.accelerator
        tokens, noised, masked, times, count = self._batch()
        attention_mask = self._attention_mask()
        torch.manual_seed(seeded(config.seed, self.step, f"dropout {accelerator.process_index}").initial_seed())
        self.objective.train()
        for part, share in enumerate(self._shares(tokens, noised, masked, times)):
            last = part == config.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                total = self.objective(*share, attention_mask)
                loss = total * (accelerator.num_processes / count)  # gradients are averaged over processes
                accelerator.backward(loss)
            self.window_loss += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.total)
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), config.clip)
        unusable = ~torch.isfinite(norm)
        if accelerator.scaler is None:
            self.adamw.found_inf = unusable.float()  # as the FP16 scaler does: the fused kernel then changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped += unusable
        self.window_steps += 1
        return norm

    def _attention_mask(self) -> Tensor | None:
        if self.is_ar:
            return None  # a causal model is causal by itself
        return annealed_mask(
            self.config.length,
            anneal_ratio(self.step, self.config.anneal_steps),
            dtype=self.mask_dtype,
            device=self.accelerator.device,
            generator=seeded(self.config.seed, self.step, "annealing"),
        )

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """The global batch of this step, whatever the number of processes: tokens, noised, masked, times, count."""
        config, step = self.config, self.step
        tokens = self.blocks[[self._block_at(step * self.global_batch + i) for i in range(self.global_batch)]]  # [G, L]
        maskable = default_maskable(tokens)
        if self.is_ar:  # nothing hidden, everything predicted, causal attention: the next-token loss
            return tokens, tokens, maskable, torch.ones(len(tokens)), int(maskable.sum())
        draws = {purpose: seeded(config.seed, step, purpose) for purpose in ("times", "corruption")}
        times = sample_times(len(tokens), method=config.times, eps=config.eps, generator=draws["times"])
        noised, masked = corrupt(tokens, times, self.model.config.mask_token_id, generator=draws["corruption"])
        count = int((maskable if config.normalize == "maskable" else masked).sum())
        return tokens, noised, masked, times, max(count, 1)

    def _block_at(self, position: int) -> int:
        """The block at a position in the endless stream of shuffled epochs."""
        epoch, place = divmod(position, len(self.blocks))
        if self.order[0] != epoch:
            self.order = (epoch, torch.randperm(len(self.blocks), generator=seeded(self.config.seed, epoch, "data")))
        return int(self.order[1][place])

    def _shares(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """This process's part of each forward pass."""
        size, accelerator = self.config.batch, self.accelerator
        for part in range(self.config.accumulate):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            yield [tensor[start : start + size].to(accelerator.device, non_blocking=True) for tensor in tensors]

    # -- records ----------------------------------------------------------------------------------------
    def _progress(self, norm: float, tokens: int) -> dict:
        loss = self.accelerator.reduce(self.window_loss, "mean").item() / self.window_steps
        self.window_loss.zero_()
        self.window_steps = 0
        ratio = {} if self.is_ar else {"ratio": anneal_ratio(self.step - 1, self.config.anneal_steps)}
        return {
            "loss": loss,
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            **ratio,
            "skipped": int(self.skipped),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds),
        }

    def _evaluate(self) -> dict:
        key, measure = (
            ("nll", ar_nll) if self.is_ar else ("nelbo", partial(nelbo, num_samples=self.config.eval_samples))
        )
        score = measure(self.model, self.tokenizer, self.held_out, precision=self.precision)
        if score.mean < self.best:
            self.best = score.mean
            self._write(self.folder / "best", lambda folder: save_diffusion(self.model, self.tokenizer, folder))
        return {key: score.mean, f"{key}_stderr": score.stderr, "bits_per_byte": score.bits_per_byte}

    def _sample(self) -> dict:
        length = min(64, self.config.length - 1)
        written = generate(
            self.model, self.tokenizer, length=length, steps=32, seed=self.config.seed, precision=self.precision
        )
        return {"sample": written.text[0]}

    # -- the folder -------------------------------------------------------------------------------------
    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there, and prune older ones."""
        folder = self.folder / f"step-{self.step:06d}"
        if not checkpoint.is_whole(folder):
            self._write(folder, self._fill)
            if self.is_main:
                checkpoint.prune(self.folder, self.config.keep)

    def _write(self, folder: Path, fill: Callable[[Path], None]) -> None:
        if self.is_main:
            checkpoint.write_whole(folder, fill)
        self.accelerator.wait_for_everyone()

    def _fill(self, folder: Path) -> None:
        save_diffusion(self.model, self.tokenizer, folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        state = {name: getattr(self, name) for name in ("step", "seconds", "best", "window_steps")}
        state |= {"window_loss": self.window_loss.item(), "skipped": self.skipped.item()}
        state["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        (folder / "state.json").write_text(json.dumps(state))

    def _restore(self, folder: Path | None) -> None:
        until = 0 if folder is None else int(folder.name.removeprefix("step-"))
        self.history = History.load(self.folder / "history.jsonl", until)
        if self.is_main:
            self.history.rewrite()
        if folder is None:
            return
        load_model(self.model, folder / "model.safetensors")
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        state = json.loads((folder / "state.json").read_text())
        for name in ("step", "seconds", "best", "window_steps"):
            setattr(self, name, state[name])
        self.window_loss.fill_(state["window_loss"])
        self.skipped.fill_(state["skipped"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _check_model(self) -> None:
        config, model = self.config, self.model
        room = getattr(model.config, "max_position_embeddings", config.length)
        if config.length > room:
            raise ValueError(f"length {config.length} is more than the model's {room} positions; lower `length`")
        if self.is_ar and getattr(model.config, "mask_token_id", None) is not None:
            raise ValueError(
                "objective 'ar' needs an AR model; a diffusion model sees the tokens it would have to predict"
            )
        if not self.is_ar and getattr(model.config, "mask_token_id", None) is None:
            raise ValueError(
                "this model has no [MASK] token; make it a diffusion model first: as_diffusion(model, tokenizer)"
            )
        if not self.is_ar and model.config.shift != config.shift:
            raise ValueError(
                f"the model was made with shift={model.config.shift}, the config says shift={config.shift}"
            )
        if len(self.tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model's embedding "
                f"{model.get_input_embeddings().weight.shape[0]} rows; they do not belong together"
            )


# ------------------------------------------------------------------------------------------------- helpers
def _accelerator(config: RunConfig) -> Accelerator:
    """One accelerator serves all arms of a call; a later call in the same process may want another precision."""
    device = pick_device(config.device)
    precision = {"fp32": "no"}.get(name := pick_precision(config.precision, device), name)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def _set_dropout(model: nn.Module, share: float) -> None:
    """Dropout everywhere at one rate, whatever the checkpoint's config asked for."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in ("dropout", "attention_dropout"):  # OPT and Llama keep a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


def _transformer_blocks(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def _first(blocks: Blocks, count: int) -> Tensor:
    return blocks[list(range(min(count, len(blocks))))]
