"""One training step of one model: times -> corrupt -> attention mask -> loss -> backward -> AdamW.

`Task.draw` draws times and corruption on the host, and `Task.attention_mask` the mask. The rest is one function,
`TrainStep.compute`. It runs eagerly on any number of processes, or, on a single GPU, is replayed as a CUDA graph.
All randomness is a function of (seed, step).
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .backbone import transformer_blocks
from .config import RunConfig
from .cuda_graph import ReplayedStep
from .machine import DTYPES, seed_dropout, send
from .objective import Batch, batch_loss, seeded
from .processes import is_sharded, prepare
from .stability import SATURATED, Watch, saturation
from .tasks import TASKS, Task
from .terminal import warn


class Loss(nn.Module):
    """The loss as a module, so that accelerate's wrappers (DDP, FSDP) see one forward pass."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the block classes that FSDP shards separately

    def forward(self, batch: Batch, attention_mask, teacher, teacher_weight) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the same loss without a teacher, and the number of saturated predictions."""
        loss = batch_loss(self.model, batch, attention_mask, teacher=teacher, teacher_weight=teacher_weight)
        return loss.loss, loss.nll, ((loss.token_nll > SATURATED) & (batch.weights > 0)).sum()


class TrainStep:
    """Takes optimizer steps on a model, in place.

    Attributes:
        watch: decides which steps to skip, and counts them; replaced by `reset`.
        nll_sum: the loss without a teacher, summed over the steps since the last record, on the device.
    """

    def __init__(
        self, task: Task, config: RunConfig, accelerator: Accelerator, precision: str, teacher: PreTrainedModel | None
    ):
        self.task, self.config, self.accelerator, self.teacher = task, config, accelerator, teacher
        self.model, self.device = task.model, accelerator.device
        self.dtype = DTYPES[precision]  # of matrix products, and therefore of attention masks
        _set_dropout(self.model, config.dropout)
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        if config.compile:
            for block in transformer_blocks(self.model):
                block.compile()
        reason = _why_eager(config, accelerator)
        self.replayed = None if reason else ReplayedStep(self.compute, self._recover, self.device)
        if reason and self.device.type == "cuda" and accelerator.is_main_process:
            warn(f"training steps run eagerly, without a CUDA graph: {reason}")

        if self.device.type == "cuda":
            gc.collect()  # reference cycles keep the graphs and the optimizers of earlier runs in this process
            torch.cuda.reset_peak_memory_stats(self.device)
        module = Loss(self.model if is_sharded(accelerator) else self.model.to(self.device))
        self.adamw = _adamw(self.model, config, graph_device=self.device if self.replayed else None)
        self._own_settings = [
            {key: group[key] for key in ("lr", "fused", "capturable")} for group in self.adamw.param_groups
        ]
        self.adamw.register_step_pre_hook(self._skip_if_unusable)
        # A cache of cast weights would leak into a captured step, and keep gathered weights alive under FSDP.
        cache = self.replayed is None and not is_sharded(accelerator)
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=cache)
        self.module, self.optimizer = prepare(accelerator, module, self.adamw)
        self.watch = Watch(config.spike, config.max_skips, self.device)
        zeros = torch.zeros(4, device=self.device)
        self.nll_sum, self.norm, self.unusable, self.teacher_weight = zeros.unbind()

    def __call__(self, step: int, learning_rate: float, teacher_weight: float) -> Tensor:
        """Take step `step` (from 0); returns its gradient norm, a scalar on the device that the next step overwrites.

        Args:
            teacher_weight: of the teacher's prediction in the target, in [0, 1]; the token itself gets the rest.
        """
        batch = self.task.draw(step)  # the tokens of all processes, their times, and which of them are masked
        mask = self.task.attention_mask(step, self.dtype)  # [1, 1, L, L], or None once every edge is open
        self._set_learning_rate(learning_rate)
        self.teacher_weight.fill_(teacher_weight)
        self.watch.count(saturated=0, predictions=batch.count)  # of all processes
        seed_dropout(seeded(self.config.seed, step, f"dropout {self.accelerator.process_index}"), self.device)
        self.module.train()
        self._run(list(self._local_parts(batch)), mask, with_teacher=teacher_weight > 0)
        return self.norm

    def compute(self, parts: list[Batch], mask: Tensor | None, with_teacher: bool) -> None:
        """The device's part of a step. It never waits for the device, and does not branch on a value computed there."""
        for index, batch in enumerate(parts):
            is_last = index == len(parts) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    loss, nll, saturated = self.module(
                        batch, mask, self.teacher if with_teacher else None, self.teacher_weight
                    )
                self.accelerator.backward(loss * self.accelerator.num_processes)  # their gradients are averaged
            self.nll_sum.add_(nll * self.accelerator.num_processes)
            self.watch.count(saturated, predictions=0)  # of this process; summed over all of them when read
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.unusable.copy_(self.watch.judge(norm))  # if set, the optimizer skips the step: `_skip_if_unusable`
        self.norm.copy_(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def trouble_ahead(self, step: int) -> str | None:
        """What is wrong with the current weights, or None, judged by a forward pass on a part of step `step`."""
        batch, mask = self.task.draw(step), self.task.attention_mask(step, self.dtype)
        part = next(self._local_parts(batch)).map(self._send)
        self.module.eval()
        with self.accelerator.autocast():
            loss, _, saturated = self.module(part, None if mask is None else self._send(mask), None, None)
        counts = torch.stack([loss, saturated.float(), torch.full_like(loss, part.count)])
        loss, saturated, predictions = self.accelerator.reduce(counts, "sum").tolist()
        return saturation(saturated / max(predictions, 1)) if math.isfinite(loss) else "the loss is not finite"

    def reset(self) -> None:
        """Discard statistics, gradients and graphs, after weights or optimizer state were loaded."""
        config = self.config
        self.watch = Watch(config.spike, config.max_skips, self.device)
        self.nll_sum.zero_()
        self.optimizer.zero_grad()
        for group, fresh in zip(self.adamw.param_groups, self._own_settings, strict=True):
            group.update(fresh)  # a checkpoint has those of the machine that wrote it
        if self.replayed is not None:
            self.replayed.reset()

    # -- what the step above is made of ------------------------------------------------------------------
    def _run(self, parts: list[Batch], mask: Tensor | None, with_teacher: bool) -> None:
        """`compute` on host tensors: as a CUDA graph, unless a rare batch has more places than its fixed shape."""
        capacity = self.task.capacity(self.config.batch)
        if self.replayed is not None and all(part.count <= capacity for part in parts):
            self.replayed([part.with_capacity(capacity) for part in parts], mask, with_teacher)
        else:
            if not self.config.compile:  # a compiled block would be compiled again for each length
                parts = [part.trimmed() for part in parts]
            self.compute(
                [part.map(self._send) for part in parts], None if mask is None else self._send(mask), with_teacher
            )

    def _local_parts(self, batch: Batch) -> Iterator[Batch]:
        """This process's rows, one part for each forward pass. All parts of all processes are the batch."""
        size, accelerator = self.config.batch, self.accelerator
        for part in range(self.config.accumulate):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            yield batch.rows(start, start + size)

    def _send(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.device)

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place: a captured step reads this tensor
            else:
                group["lr"] = rate

    def _skip_if_unusable(self, adamw: torch.optim.Optimizer, *_) -> None:
        """Make the fused kernel skip an unusable step through `found_inf`, as the FP16 scaler does."""
        adamw.found_inf = self.unusable

    def _recover(self) -> None:
        """Undo a capture that failed halfway."""
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler._per_optimizer_states.clear()  # else it believes that they are unscaled already


def _why_eager(config: RunConfig, accelerator: Accelerator) -> str | None:
    """Why steps are not replayed as a CUDA graph, or None if they are."""
    if accelerator.device.type != "cuda":
        return f"the device is {accelerator.device.type}"
    if accelerator.distributed_type != DistributedType.NO:
        return f"the run is distributed ({accelerator.distributed_type.value})"
    if config.gradient_checkpointing:
        return "gradient_checkpointing is on"
    if not TASKS[config.objective].denoises:
        return f"the objective {config.objective!r} is autoregressive, for which transformers waits for the GPU"
    return None if config.cuda_graph else "cuda_graph is off"


def _adamw(model: nn.Module, config: RunConfig, graph_device: torch.device | None) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    capturable = graph_device is not None
    rate = torch.tensor(config.learning_rate, device=graph_device) if capturable else config.learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, config.beta2), fused=True, capturable=capturable)


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Use one dropout rate everywhere, whatever the checkpoint's config says."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in list(vars(module).items()):  # OPT, Llama and others store rates as numbers, in several names
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and "drop" in name and name not in ("layerdrop", "layer_drop"):
                setattr(module, name, rate)
