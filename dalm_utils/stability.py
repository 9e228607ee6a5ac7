"""Numerical stability: which steps to skip, and when to roll back.

A step whose gradient is not finite, or far larger than usual, is skipped and counted. Several skipped steps in a row, a
collapsed loss scale, or saturated predictions make the run roll back to its newest checkpoint with a lower learning
rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

SATURATED = 30.0  # nats: no healthy model, not even a random one, gives the true token a probability of e^-30
SATURATED_FRACTION = 0.01  # with more than this fraction of saturated predictions, a model no longer learns
SMALLEST_SCALE = 1.0  # below this loss scale, gradients overflow float16 even unscaled
ROLLBACK_LR_FACTOR = 0.5  # the learning rate after a rollback, relative to the one before
MAX_ROLLBACKS = 3  # then the run is given up
NORM_DECAY = 0.05  # of the running mean of gradient norms, which covers about twenty steps


class Unstable(RuntimeError):
    """Rolling back did not help, or there was no checkpoint to roll back to."""


class Watch:
    """Judges each step on its device, in place and without waiting for it. Only the methods that return numbers wait.

    Args:
        spike: a gradient norm of more than this many times the running mean is a spike (None: never).
        max_skips: this many skipped steps in a row cause a rollback.
        device: where the gradients are.
    """

    COUNTS = ("skipped", "spikes", "in_a_row")  # over the whole run
    WINDOW = ("largest_norm", "saturated", "predictions")  # since the last record

    def __init__(self, spike: float | None, max_skips: int, device: torch.device | str = "cpu"):
        self.spike, self.max_skips = spike, max_skips
        names = (*self.COUNTS, *self.WINDOW, "usual_norm")
        self.values = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def judge(self, norm: Tensor) -> Tensor:
        """Count the step with this gradient norm, and say whether to skip it: a scalar bool on the norm's device."""
        value, finite = self.values, torch.isfinite(norm)
        usual = value["usual_norm"]
        spiked = finite & (usual > 0) & (norm > (self.spike or torch.inf) * usual)
        skip = ~finite | spiked
        value["skipped"].add_(skip)
        value["spikes"].add_(spiked)
        value["in_a_row"].add_(1).mul_(skip)
        value["largest_norm"].copy_(torch.where(finite, norm, 0).maximum(value["largest_norm"]))
        moved = torch.where(usual > 0, usual + NORM_DECAY * (norm - usual), norm)
        usual.copy_(torch.where(skip, usual, moved))
        return skip

    def count(self, saturated: Tensor, predictions: Tensor | int) -> None:
        """Add the number of tokens that a step predicted, and how many of them were saturated."""
        self.values["saturated"].add_(saturated)
        self.values["predictions"].add_(predictions)

    def read(self, saturated: float, loss_scale: float | None) -> tuple[dict, str | None]:
        """The figures of a record and what is wrong, or None; resets the window.

        Args:
            saturated: the window's count, summed over all processes.
            loss_scale: of an FP16 run.
        """
        value = {name: tensor.item() for name, tensor in self.values.items()}
        fraction = self._fraction(saturated)
        figures = {
            "skipped": int(value["skipped"]),
            "spikes": int(value["spikes"]),
            "largest_norm": value["largest_norm"] or None,  # no norm was finite
            "saturated": fraction,
        }
        if self.spike is not None:
            figures["norm_limit"] = self.spike * value["usual_norm"]
        if loss_scale is not None:
            figures["loss_scale"] = loss_scale
        for name in self.WINDOW:
            self.values[name].zero_()
        return figures, self._trouble(value["in_a_row"], fraction, loss_scale)

    def _trouble(self, in_a_row: float, fraction: float, loss_scale: float | None) -> str | None:
        if in_a_row >= self.max_skips:
            return f"{in_a_row:.0f} steps in a row were skipped"
        if loss_scale is not None and loss_scale < SMALLEST_SCALE:
            return f"the loss scale fell to {loss_scale:g}"
        return saturation(fraction)

    def is_calm(self, saturated: float) -> bool:
        """Whether the last step was not skipped, and the window is not saturated (a count over all processes)."""
        return self.skipped_in_a_row() == 0 and saturation(self._fraction(saturated)) is None

    def skipped_in_a_row(self) -> int:
        """How many of the latest steps were skipped, up to and including the last one."""
        return int(self.values["in_a_row"].item())

    def _fraction(self, saturated: float) -> float:
        return saturated / max(self.values["predictions"].item(), 1)

    def state(self) -> dict[str, float]:
        """Everything as numbers, for `load`."""
        return {name: tensor.item() for name, tensor in self.values.items()}

    def load(self, state: dict[str, float]) -> None:
        """Restore what `state` returned."""
        for name, number in state.items():
            self.values[name].fill_(number)

    def forgive(self, other: Watch) -> None:
        """Take over the totals of `other`, and clear the row of skipped steps."""
        for name in ("skipped", "spikes"):
            self.values[name].copy_(other.values[name])
        self.values["in_a_row"].zero_()


def saturation(fraction: float) -> str | None:
    """What is wrong if this fraction of the predictions is saturated, or None."""
    if fraction > SATURATED_FRACTION:
        return f"{fraction:.1%} of the predictions are saturated (more than {SATURATED:g} nats off)"
    return None
