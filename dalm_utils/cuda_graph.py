"""A training step as a CUDA graph: the host only fills the inputs, and one launch replays some 850 kernels.

Launched one by one, these kernels keep a fast GPU waiting for its host for two thirds of a step of GPT-2's size.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from .objective import Batch

WARM_UP = 3  # eager steps before a capture: libraries allocate workspaces and choose kernels in them


def capture(compute: Callable[[], None], pool) -> Callable[[], None]:
    """Record what `compute` does on the current CUDA device, without doing it; the result does it.

    Args:
        pool: memory that graphs share. None of ours leaves anything in it that the next one needs.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        compute()
    return graph.replay


class ReplayedStep:
    """Runs a step eagerly at first, and then as a CUDA graph on static inputs.

    `compute(parts, mask, with_teacher)` must work in place, let nothing it allocates outlive it, and never wait for the
    device. Batches have fixed shapes. There is one graph for each combination of with or without a mask, with or
    without a teacher, captured when it is first needed. If a capture fails, everything runs eagerly from then on.

    Args:
        compute: `TrainStep.compute`.
        recover: called after a failed capture, to undo what `compute` left half done.
        device: where the step runs.
    """

    def __init__(self, compute: Callable[..., None], recover: Callable[[], None], device: torch.device):
        self.compute, self.recover, self.device = compute, recover, device
        self.enabled = True
        self.reset()

    def reset(self) -> None:
        """Forget all graphs, because a tensor that they use was replaced."""
        self.graphs: dict[tuple, Callable[[], None]] = {}
        self.inputs: dict[tuple, tuple[list[Batch], Tensor | None, bool]] = {}
        self.calls: Counter = Counter()
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def __call__(self, parts: list[Batch], mask: Tensor | None, with_teacher: bool) -> None:
        """Take one step on these host tensors; they are copied while the device still works on the step before."""
        key = (mask is None, with_teacher)
        if key not in self.inputs:
            static = [part.map(self._buffer) for part in parts]
            self.inputs[key] = (static, None if mask is None else self._buffer(mask), with_teacher)
        inputs = self.inputs[key]
        for buffer, part in zip(inputs[0], parts, strict=True):
            for name, tensor in part.tensors().items():
                self._fill(buffer.tensors()[name], tensor)
        if mask is not None:
            self._fill(inputs[1], mask)
        if key not in self.graphs and self.enabled and self.calls[key] >= WARM_UP:
            self._capture(key, inputs)
        if key in self.graphs:
            self.graphs[key]()
        else:
            self.calls[key] += 1
            self._run_eagerly(inputs)

    def _buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.device)

    def _fill(self, buffer: Tensor, tensor: Tensor) -> None:
        buffer.copy_(tensor.pin_memory() if self.device.type == "cuda" else tensor, non_blocking=True)

    def _run_eagerly(self, inputs: tuple) -> None:
        if self.device.type != "cuda":
            self.compute(*inputs)
            return
        side = torch.cuda.Stream(self.device)  # gradients must not be tied to the default stream before a capture
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.compute(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)

    def _capture(self, key: tuple, inputs: tuple) -> None:
        try:
            self.graphs[key] = capture(lambda: self.compute(*inputs), self.pool)
        except Exception as error:  # whatever the model, the driver or torch does not allow in a capture
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"the step cannot be captured as a CUDA graph and runs eagerly: {reason}", file=sys.stderr)
            self.enabled = False
            self.recover()
