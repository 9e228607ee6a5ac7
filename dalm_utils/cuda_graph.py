"""Replays a training step as a CUDA graph: the host fills the inputs and launches one graph, not some 850 kernels.

Launched one by one, these kernels leave a fast GPU idle for about two thirds of a step of GPT-2's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .machine import pinned
from .objective import Batch
from .terminal import first_line, warn

WARM_UP = 3  # eager steps before a capture: meanwhile libraries allocate workspaces and choose kernels


def capture(compute: Callable[[], None]) -> Callable[[], None]:
    """Record what `compute` does on the current CUDA device, without running it. Calling the result runs it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    try:
        with _backward_in_capture(), torch.cuda.graph(graph):
            compute()
    except BaseException:
        torch.cuda.set_stream(stream)  # a capture that CUDA ends leaves its own
        raise
    return graph.replay


@contextlib.contextmanager
def _backward_in_capture() -> Iterator[None]:
    """Let a backward pass be captured where an earlier loss of the same weights is alive, such as a notebook's.

    That loss remembers the stream on which it was computed, and autograd refuses to draw another stream into a capture.
    Versions of torch without this setting still refuse, and the step runs eagerly.
    """
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", lambda enabled: None)
    override(True)
    try:
        yield
    finally:
        override(False)


class ReplayedStep:
    """Runs a step eagerly at first, and then as a CUDA graph on static inputs.

    `compute(parts, mask, with_teacher)` must work in place, keep no tensor that it allocates, and never wait for the
    device. Batches have fixed shapes. When the mask has opened, or the teacher has faded, the step is another one: the
    old graph is dropped and a new one is captured. If a capture fails, everything runs eagerly from then on.

    Args:
        compute: `TrainStep.compute`.
        recover: called after a failed capture, to undo what `compute` left half done.
        device: where the step runs.
    """

    def __init__(self, compute: Callable[..., None], recover: Callable[[], None], device: torch.device):
        self.compute, self.recover, self.device = compute, recover, device
        self.enabled = True
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        """Drop the graph: a tensor that it refers to was replaced, or the step has become another one."""
        self.key: tuple | None = None
        self.graph: Callable[[], None] | None = None
        self.inputs: tuple[list[Batch], Tensor | None, bool] | None = None
        self.calls = 0

    def __call__(self, parts: list[Batch], mask: Tensor | None, with_teacher: bool) -> None:
        """Take one step on these host tensors, queued without waiting for the step before."""
        key = (mask is None, with_teacher)
        if key != self.key:
            self.reset()
            self.key = key
        if self.inputs is None:
            static = [part.map(self._buffer) for part in parts]
            self.inputs = (static, None if mask is None else self._buffer(mask), with_teacher)
        for buffer, part in zip(self.inputs[0], parts, strict=True):
            tensors = part.tensors()
            for name, static_tensor in buffer.tensors().items():
                self._fill(static_tensor, tensors[name])
        if mask is not None:
            self._fill(self.inputs[1], mask)
        if self.graph is None and self.enabled and self.calls >= WARM_UP:
            self._capture()
        if self.graph is not None:
            self.graph()
        else:
            self.calls += 1
            self._run_eagerly()

    def _buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.device)

    def _fill(self, buffer: Tensor | None, tensor: Tensor) -> None:
        assert buffer is not None  # a key with a mask has a buffer for it
        buffer.copy_(pinned(tensor, self.device), non_blocking=True)

    def _run_eagerly(self) -> None:
        assert self.inputs is not None
        if self.side_stream is None or not self.enabled:
            self.compute(*self.inputs)
            return
        # torch requires that the steps before a capture run on another stream than the default one
        self.side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side_stream):
            self.compute(*self.inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.side_stream)

    def _capture(self) -> None:
        inputs = self.inputs
        assert inputs is not None
        try:
            self.graph = capture(lambda: self.compute(*inputs))
        except Exception as error:  # whatever the model, the driver or torch does not support in a capture
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of the capture fails too, and says less
                cause = cause.__context__
            warn(f"capturing the step as a CUDA graph failed, so steps run eagerly: {first_line(cause)}")
            self.enabled = False
            self.recover()
