"""One run: a model, its optimizer, and where it stands; on one process or many, and the same on all of them.

Everything random in a step is a function of (seed, step): data order, times, corruption, annealing mask, dropout.
So a run needs no generator state to be continued, and a run spread over processes sees the noise of a single one
(but for dropout, which each process draws for itself).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import AutocastKwargs, broadcast_object_list
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import anneal_ratio, annealed_block_mask, annealed_mask
from .backbone import DTYPES, as_diffusion, load_base, mask_id_of, pick_precision, randomize, save_diffusion
from .checkpoint import History, RunFolder
from .config import FREE_FIELDS, RunConfig
from .corpus import load_corpus, tokenizer_digest
from .evaluation import ar_nll, nelbo
from .objective import corrupt, default_maskable, diffusion_loss, require_mask_id, sample_times, seeded
from .sampling import generate
from .stability import MOST_ROLLBACKS, SATURATED, SLOWER, Unstable, Watch

COUNTERS = ("step", "seconds", "best", "window_steps", "rollbacks", "stale")  # what a checkpoint keeps of them
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same file from one process and from many


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


class Objective(nn.Module):
    """The loss as a module, so that accelerate's wrappers (autocast, DDP, FSDP) see one forward pass."""

    def __init__(self, model: PreTrainedModel, shift: bool):
        super().__init__()
        self.model, self.shift = model, shift
        self._no_split_modules = model._no_split_modules  # what FSDP wraps one by one

    def forward(self, tokens, noised, masked, times, num_masked, attention_mask, teacher, share):
        """What is minimised, the weighted sum of negative log-likelihoods, and how many of them are saturated."""
        loss = diffusion_loss(
            self.model, tokens, noised, masked, times, attention_mask=attention_mask, shift=self.shift,
            num_masked=num_masked, teacher=teacher, share=share,
        )  # fmt: skip
        return loss.total, loss.nll, (loss.token_nll > SATURATED).sum()


class Run:
    """One model in training. `advance` takes a step; `save` writes a checkpoint; `close` gives the folder back.

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
        self.model, self.tokenizer, self.config, self.accelerator = model, tokenizer, config, accelerator
        self.is_main, self.is_ar = accelerator.is_main_process, config.objective == "ar"
        self._check_model()
        corpus = load_corpus(config.text, tokenizer, field=config.field)  # one process prepares it, the others wait
        self.blocks = corpus.blocks("train", config.length, config.train_blocks)
        self.held_out = corpus.blocks("validation", config.length, config.eval_blocks)
        self.global_batch = config.batch * config.accumulate * accelerator.num_processes
        self.total = config.steps or math.ceil(config.epochs * len(self.blocks) / self.global_batch)
        self.precision = pick_precision(config.precision, accelerator.device)
        self.dtype = DTYPES[self.precision]  # of matrix products, and so of attention masks
        self.teacher = self._load_teacher() if config.distill and not (config.scratch or self.is_ar) else None

        self.step, self.seconds, self.best, self.window_steps = 0, 0.0, math.inf, 0
        self.window_loss = torch.zeros((), device=accelerator.device)
        self.watch = Watch(config.spike, config.max_skips, accelerator.device)
        self.unusable = torch.zeros((), device=accelerator.device)  # 1 where the step in hand must change nothing
        self.rollbacks, self.stale = 0, 0  # times gone back; evaluations since the best one
        self.saved_step = -1
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

        self.folder = RunFolder(config.folder)
        newest = self._on_main(lambda: self.folder.open(self._settings(corpus), resume))
        try:
            if newest is not None:
                load_model(model, newest / "model.safetensors")
            self._prepare()
            self._restore(newest)
        except BaseException:
            self.close()
            raise

    def _settings(self, corpus) -> dict:
        """What a run that is continued must have in common with the one it continues."""
        fields = {name: value for name, value in vars(self.config).items() if name not in FREE_FIELDS}
        kind = f"{type(self.model).__name__} with {self.model.num_parameters()} parameters"
        resolved = {"precision": self.precision, "global_batch": self.global_batch, "total_steps": self.total}
        teacher = None if self.teacher is None else _digest(self.teacher)
        return {**fields, **resolved, "model": kind, "corpus": corpus.facts["digest"], "teacher": teacher}

    def _prepare(self) -> None:
        """Hand model and optimizer to accelerate."""
        config, model, accelerator = self.config, self.model, self.accelerator
        _set_dropout(model, config.dropout)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if config.compile:
            for block in _transformer_blocks(model):
                block.compile()
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self.casting = AutocastKwargs(cache_enabled=not sharded)  # the cache would hold whole matrices of shards
        if sharded:
            _whole_and_exact(accelerator.state.fsdp_plugin)
        module = Objective(model if sharded else model.to(accelerator.device), config.shift or self.is_ar)
        self.adamw = _adamw(model, config)
        self.adamw.register_step_pre_hook(self._leave_out)
        self.objective, self.optimizer = accelerator.prepare(module, self.adamw)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)  # of a run before this one

    def _load_teacher(self) -> PreTrainedModel:
        """The base as it was, frozen; every process has a whole one."""
        config = self.config
        with self.accelerator.main_process_first():
            teacher, tokenizer = load_base(
                config.base, hub=config.hub, device=self.accelerator.device, dtype=self.dtype
            )
        same = tokenizer_digest(tokenizer) == tokenizer_digest(self.tokenizer)
        sizes = [len(model.get_output_embeddings().weight) for model in (teacher, self.model)]
        if mask_id_of(teacher) is not None or not same or sizes[0] > sizes[1]:
            raise ValueError(
                f"distill={config.distill} needs the AR model that this one was made from, and base={config.base!r} "
                "is none or has other tokens; set `base`, or distill=0"
            )
        return teacher.requires_grad_(False)

    def _leave_out(self, adamw: torch.optim.Optimizer, *_) -> None:
        """Do to every unusable step what the FP16 scaler does to one that overflowed: the fused kernel passes."""
        adamw.found_inf = self.unusable

    def _on_main(self, do: Callable):
        """Do something on the main process alone; every process gets its result, or its error."""
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = do()
            except Exception as error:
                if self.accelerator.num_processes == 1:
                    raise
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # -- one step ---------------------------------------------------------------------------------------
    @property
    def is_done(self) -> bool:
        """At its last step, or out of patience."""
        return self.step >= self.total or self.stale >= (self.config.patience or math.inf)

    def advance(self) -> bool:
        """One optimizer step, and the evaluation, record and checkpoint that are due. True if it recorded.

        Raises:
            Unstable: going back does not help, or is not possible.
        """
        start = time.perf_counter()
        norm = self._optimize()
        self.step += 1
        log, evaluate, save = (self._is_due(every) for every in ("log_every", "eval_every", "save_every"))
        sample = self.config.sample_every > 0 and self.step % self.config.sample_every == 0 and not self.is_ar
        if log:
            norm = norm.item()  # waits for the device, so that the clock is honest
        self.seconds += time.perf_counter() - start
        record, trouble = self._progress(norm) if log else ({}, None)
        if trouble is not None:
            self._go_back(trouble)
            return True
        record |= self._evaluate() if evaluate else {}
        record |= self._sample() if sample else {}
        if record:
            self._record(record)
        if self.is_done and self.step < self.total:
            self._record({"event": f"finished: no better NELBO in {self.stale} evaluations"})
        if self.is_done or (save and self.watch.is_calm(self._saturated())):  # a good checkpoint is one to go back to
            self.save()
        return bool(record)

    def _saturated(self) -> float:
        """Saturated predictions since the last record, of all processes."""
        return self.accelerator.reduce(self.watch.values["saturated"], "sum").item()

    def _is_due(self, every: str) -> bool:
        return self.step % getattr(self.config, every) == 0 or self.step == self.total

    def _optimize(self) -> Tensor:
        """One optimizer step, without waiting for the device; returns the gradient norm."""
        config, accelerator = self.config, self.accelerator
        tokens, noised, masked, times, count = self._batch()
        attention_mask = self._attention_mask()
        taught = max(0.0, 1 - self.step / (config.distill_steps or self.total))
        weight = config.distill * taught  # of what the base says, beside 1 for the token
        share = weight / (1 + weight)
        torch.manual_seed(seeded(config.seed, self.step, f"dropout {accelerator.process_index}").initial_seed())
        self.objective.train()
        saturated = torch.zeros((), dtype=torch.long, device=accelerator.device)
        with _attending(self.model, attention_mask):
            for part, rows in enumerate(self._shares(tokens, noised, masked, times)):
                last = part == config.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                    with accelerator.autocast(self.casting):  # FSDP's own wrapper has none
                        total, nll, lost = self.objective(*rows, attention_mask, self.teacher, share)
                    scale = accelerator.num_processes / count  # gradients are averaged over processes
                    accelerator.backward(total * scale)
                self.window_loss += nll * scale
                saturated += lost
        self.watch.count(saturated, int(masked.sum()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.total) * SLOWER**self.rollbacks
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.unusable = self.watch.judge(norm).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.window_steps += 1
        return norm

    def _attention_mask(self) -> Tensor | BlockMask | None:
        if self.is_ar:
            return None  # a causal model is causal by itself
        length, ratio = self.config.length, anneal_ratio(self.step, self.config.anneal_steps)
        draws = seeded(self.config.seed, self.step, "annealing")
        if self.config.attention == "flex":
            return annealed_block_mask(length, ratio, seed=draws.initial_seed(), device=self.accelerator.device)
        mask = annealed_mask(length, ratio, dtype=self.dtype, generator=draws)
        return None if mask is None else send(mask, self.accelerator.device)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """The global batch of this step, whatever the number of processes: tokens, noised, masked, times, count."""
        config, step = self.config, self.step
        tokens = self.blocks[[self._block_at(step * self.global_batch + i) for i in range(self.global_batch)]]  # [G, L]
        maskable = default_maskable(tokens)
        if self.is_ar:  # nothing hidden, everything predicted, causal attention: the next-token loss
            return tokens, tokens, maskable, torch.ones(len(tokens)), int(maskable.sum())
        draws = {purpose: seeded(config.seed, step, purpose) for purpose in ("times", "corruption")}
        times = sample_times(len(tokens), method=config.times, eps=config.eps, generator=draws["times"])
        noised, masked = corrupt(tokens, times, mask_id_of(self.model), generator=draws["corruption"])
        count = int((maskable if config.normalize == "maskable" else masked).sum())
        return tokens, noised, masked, times, max(count, 1)

    def _block_at(self, position: int) -> int:
        """The block at a position in the endless stream of shuffled epochs."""
        epoch, place = divmod(position, len(self.blocks))
        if self.order[0] != epoch:
            self.order = (epoch, torch.randperm(len(self.blocks), generator=seeded(self.config.seed, epoch, "data")))
        return int(self.order[1][place])

    def _shares(self, tokens: Tensor, noised: Tensor, masked: Tensor, times: Tensor) -> Iterator[tuple]:
        """This process's part of each forward pass: the parts of all processes are the batch, each row once."""
        size, accelerator = self.config.batch, self.accelerator
        for part in range(self.config.accumulate):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            share = [tensor[start : start + size] for tensor in (tokens, noised, masked, times)]
            yield *(send(tensor, accelerator.device) for tensor in share), int(share[2].sum())

    # -- records ----------------------------------------------------------------------------------------
    def _record(self, record: dict) -> None:
        """Into the history, on every process, and to the main one's disk and trackers."""
        record = {"step": self.step, "tokens": self.step * self.global_batch * self.config.length, **record}
        self.history.append(record)
        if self.accelerator.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
            self.accelerator.log({f"{self.config.name}/{k}": v for k, v in numbers.items()}, step=self.step)

    def _progress(self, norm: float) -> tuple[dict, str | None]:
        """How training goes, and what is wrong with it, if anything."""
        tokens = self.step * self.global_batch * self.config.length
        scaler = self.accelerator.scaler
        stability, trouble = self.watch.read(self._saturated(), scaler.get_scale() if scaler else None)
        loss = self.accelerator.reduce(self.window_loss, "mean").item() / self.window_steps
        self.window_loss.zero_()
        self.window_steps = 0
        ratio = {} if self.is_ar else {"ratio": anneal_ratio(self.step - 1, self.config.anneal_steps)}
        figures = {
            "loss": _finite(loss),
            "grad_norm": _finite(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            **ratio,
            **stability,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds),
            "memory": round(_memory(self.accelerator.device), 2),
            "eta": round(self.seconds / self.step * (self.total - self.step)),
        }
        return figures, trouble

    def _evaluate(self) -> dict:
        samples = {} if self.is_ar else {"num_samples": self.config.eval_samples}
        key, measure = ("nll", ar_nll) if self.is_ar else ("nelbo", nelbo)
        with self._readable():
            score = measure(self.model, self.tokenizer, self.held_out, precision=self.precision, **samples)
        score = self._on_main(lambda: score)  # all processes must agree on what is best
        if score.mean < self.best:
            self.stale = 0
            if self._write("best", self._model_writer()):
                self.best = score.mean
        else:
            self.stale += 1
        figures = {key: score.mean, f"{key}_stderr": score.stderr, "bits_per_byte": score.bits_per_byte}
        return {name: _finite(value) for name, value in figures.items()}

    def _sample(self) -> dict:
        length = min(64, self.config.length - 1)
        with self._readable():
            written = generate(
                self.model, self.tokenizer, length=length, steps=32, seed=self.config.seed, precision=self.precision
            )
        return {"sample": written.text[0]}

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Use the model outside of a training step: FSDP gathers the weights that no block holds."""
        if isinstance(self.objective, FSDPModule):
            self.objective.unshard()
        yield
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()

    # -- the folder -------------------------------------------------------------------------------------
    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there, and prune older ones."""
        if self.saved_step == self.step:
            return
        write_model = self._model_writer()
        optimizer = get_optimizer_state_dict(self.objective, self.adamw, options=WHOLE)
        state = {name: getattr(self, name) for name in COUNTERS}
        state["window_loss"] = self.accelerator.reduce(self.window_loss, "mean").item()
        state["watch"] = self.watch.state()
        state["watch"]["saturated"] = self.accelerator.reduce(self.watch.values["saturated"], "mean").item()
        state["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None

        def fill(folder: Path) -> None:
            write_model(folder)
            torch.save(optimizer, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(state))
            self.history.write(folder / "history.jsonl")

        if self._write(f"step-{self.step:06d}", fill):
            self.saved_step = self.step
            if self.is_main:
                self.folder.prune(self.config.keep)

    def close(self) -> None:
        """Give the run's folder back."""
        self.folder.close()

    def _write(self, name: str, fill: Callable[[Path], None]) -> bool:
        return self._on_main(lambda: self.folder.write(name, fill))

    def _model_writer(self) -> Callable[[Path], None]:
        """What writes the model as it is now; all processes ask for it, since FSDP gathers the weights from all."""
        weights = None
        if isinstance(self.objective, FSDPModule):
            gathered = get_model_state_dict(self.objective, options=WHOLE)
            tied = {f"model.{name}" for name in self.model.all_tied_weights_keys}  # they are written once
            weights = {name.removeprefix("model."): gathered[name] for name in gathered.keys() - tied}
        return lambda folder: save_diffusion(self.model, self.tokenizer, folder, weights)

    def _restore(self, newest: Path | None) -> None:
        """Continue from a checkpoint whose weights are loaded already; from None, begin."""
        self.history = History() if newest is None else History.load(newest / "history.jsonl")
        self.history.path = self.folder.path / "history.jsonl" if self.is_main else None  # one process writes
        if self.is_main:
            self.history.write(self.history.path)
        if newest is None:
            return
        optimizer = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.objective, self.adamw, optimizer, options=WHOLE)
        state = json.loads((newest / "state.json").read_text())
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.window_loss.fill_(state["window_loss"])
        self.watch.load(state["watch"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.saved_step = self.step

    def _go_back(self, trouble: str) -> None:
        """Continue from the newest checkpoint with a lower learning rate, and say so."""
        was, rollbacks, seconds, best = self.step, self.rollbacks + 1, self.seconds, self.best
        newest = self._on_main(self.folder.newest)
        if newest is None or rollbacks > MOST_ROLLBACKS:
            tried = f"after going back {rollbacks - 1} times" if self.rollbacks else "before the first checkpoint"
            raise Unstable(
                f"training is unstable: at step {was}, {tried}, {trouble}. Lower learning_rate, or lengthen "
                "warmup_steps" + ("" if newest else "; a smaller save_every gives a checkpoint to go back to")
            )
        counted = self.watch
        self.watch = Watch(self.config.spike, self.config.max_skips, self.accelerator.device)
        self._load_weights(newest)
        self._restore(newest)
        self.watch.forgive(counted)
        self.rollbacks, self.seconds, self.best = rollbacks, seconds, best
        event = f"at step {was} {trouble}: back to step {self.step}, learning rate x {SLOWER**rollbacks:g}"
        self._record({"event": event})
        if self.is_main:
            tqdm.write(event, file=sys.stderr)

    def _load_weights(self, checkpoint: Path) -> None:
        if isinstance(self.objective, FSDPModule):
            weights = {f"model.{name}": w for name, w in load_file(checkpoint / "model.safetensors").items()}
            set_model_state_dict(self.objective, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            load_model(self.model, checkpoint / "model.safetensors")

    def _check_model(self) -> None:
        config, model = self.config, self.model
        room = getattr(model.config, "max_position_embeddings", config.length)
        if config.length > room:
            raise ValueError(f"length {config.length} is more than the model's {room} positions; lower `length`")
        window = getattr(model.config, "sliding_window", None)
        if window and getattr(model.config, "use_sliding_window", True) and config.length > window:
            raise ValueError(
                f"length {config.length} is more than this model's attention window of {window}, and outside of it "
                "nothing is seen; lower `length`"
            )
        if config.attention == "flex" and self.accelerator.device.type != "cuda":
            raise ValueError("attention 'flex' learns on CUDA only (torch has no backward pass for it elsewhere)")
        if config.attention == "flex" and not model._supports_flex_attn:
            raise ValueError(f"{type(model).__name__} has no flex attention in transformers; leave attention='sdpa'")
        if self.is_ar and mask_id_of(model) is not None:
            raise ValueError(
                "objective 'ar' needs an AR model; a diffusion model sees the tokens it would have to predict"
            )
        if not self.is_ar:
            require_mask_id(model)
        if not self.is_ar and model.config.shift != config.shift:
            raise ValueError(
                f"the model was made with shift={model.config.shift}, the config says shift={config.shift}"
            )
        rows, largest = len(model.get_input_embeddings().weight), max(self.tokenizer.get_vocab().values())
        if largest >= rows:
            raise ValueError(
                f"the tokenizer's ids go up to {largest}, but the model's embedding has {rows} rows; "
                "they do not belong together"
            )
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f"the weights {name} of the model are not finite; load it again from a whole copy")


# ------------------------------------------------------------------------------------------------- helpers
def send(tensor: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, without waiting for it: a GPU copies from pinned memory while it computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def _whole_and_exact(plugin: FullyShardedDataParallelPlugin) -> None:
    """Every process holds the weights already: on accelerate's way through empty ones the head would lose its tie to
    the embeddings. And FSDP casts nothing: autocast does, as on one process; losses, times and sums stay in FP32."""
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None


def _digest(model: nn.Module) -> str:
    """Of the weights."""
    hashed = hashlib.blake2b(digest_size=8)
    for weight in model.parameters():
        hashed.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


@contextlib.contextmanager
def _attending(model: PreTrainedModel, mask: Tensor | BlockMask | None) -> Iterator[None]:
    """Flex attention under a mask of its kind; otherwise, and in evaluation, what the model was loaded with."""
    usual = model.config._attn_implementation
    if isinstance(mask, BlockMask):
        model.config._attn_implementation = "flex_attention"
    try:
        yield
    finally:
        model.config._attn_implementation = usual


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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _memory(device: torch.device) -> float:
    """GiB: the most that was allocated on a GPU, or what this process holds now."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 2**30
