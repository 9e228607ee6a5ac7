"""Numerical stability: which steps may count, and when a run has to go back.

A step whose gradient is not finite, or far larger than usual, changes nothing and is counted. Several in a row, a
loss scale that has collapsed, or saturated logits send the run back to its newest checkpoint with a lower rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

SATURATED = 30.0  # nats: no healthy model, not even a random one, gives the truth a probability of e^-30...
SATURATED_SHARE = 0.01  # ...and one that does so to more predictions than this learns nothing from them
SMALLEST_SCALE = 1.0  # a loss scale below 1 means that gradients overflow float16 even when nothing magnifies them
SLOWER = 0.5  # the learning rate after going back, as a share of the one before
MOST_ROLLBACKS = 3  # then the run is given up
MEMORY = 0.05  # of the running mean of gradient norms: about the last twenty steps


class Unstable(RuntimeError):
    """Going back did not help, or there was nothing to go back to."""


class Watch:
    """Judges each step on its device, without waiting for it; `read` waits, and is called where a record is written.

    Args:
        spike: a gradient norm of more than this many times the running mean is a spike (None: nothing is).
        max_skips: so many unusable steps in a row are trouble.
        device: where the gradients are.
    """

    COUNTS = ("skipped", "spikes", "in_a_row")  # since the run began; steps that did not count, and why
    WINDOW = ("largest_norm", "saturated", "predictions")  # since the last record

    def __init__(self, spike: float | None, max_skips: int, device: torch.device | str = "cpu"):
        self.spike, self.max_skips = spike, max_skips
        names = (*self.COUNTS, *self.WINDOW, "usual_norm")
        self.values = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def judge(self, norm: Tensor) -> Tensor:
        """Whether the step with this gradient norm is unusable: a scalar bool on the norm's device."""
        value, finite = self.values, torch.isfinite(norm)
        usual = value["usual_norm"]
        spiked = finite & (usual > 0) & (norm > (self.spike or torch.inf) * usual)
        unusable = ~finite | spiked
        value["skipped"] += unusable
        value["spikes"] += spiked
        value["in_a_row"] = (value["in_a_row"] + 1) * unusable
        value["largest_norm"] = torch.where(finite, norm, 0).maximum(value["largest_norm"])
        moved = torch.where(usual > 0, usual + MEMORY * (norm - usual), norm)
        value["usual_norm"] = torch.where(unusable, usual, moved)
        return unusable

    def count(self, saturated: Tensor, predictions: int) -> None:
        """Add how many tokens a step predicted, over all processes, and how many of this one's were saturated."""
        self.values["saturated"] += saturated
        self.values["predictions"] += predictions

    def read(self, saturated: float, loss_scale: float | None) -> tuple[dict, str | None]:
        """The figures of a record, and what is wrong, if anything; the window begins anew.

        Args:
            saturated: the window's count over all processes.
            loss_scale: of an FP16 run.
        """
        value = {name: tensor.item() for name, tensor in self.values.items()}
        share = self._share(saturated)
        figures = {
            "skipped": int(value["skipped"]),
            "spikes": int(value["spikes"]),
            "largest_norm": value["largest_norm"] or None,  # no norm was finite
            "saturated": share,
        }
        if self.spike is not None:
            figures["norm_limit"] = self.spike * value["usual_norm"]
        if loss_scale is not None:
            figures["loss_scale"] = loss_scale
        for name in self.WINDOW:
            self.values[name].zero_()
        return figures, self._trouble(value["in_a_row"], share, loss_scale)

    def _trouble(self, in_a_row: float, share: float, loss_scale: float | None) -> str | None:
        if in_a_row >= self.max_skips:
            return f"{in_a_row:.0f} steps in a row were unusable"
        if loss_scale is not None and loss_scale < SMALLEST_SCALE:
            return f"the loss scale fell to {loss_scale:g}"
        if share > SATURATED_SHARE:
            return f"{share:.1%} of the predictions are saturated (more than {SATURATED:g} nats off)"
        return None

    def is_calm(self, saturated: float) -> bool:
        """Whether the latest step was usable, and the window is not saturated (a count over all processes)."""
        return self.values["in_a_row"].item() == 0 and self._share(saturated) <= SATURATED_SHARE

    def _share(self, saturated: float) -> float:
        return saturated / max(self.values["predictions"].item(), 1)

    def state(self) -> dict[str, float]:
        """Everything, as numbers; `load` takes it back."""
        return {name: tensor.item() for name, tensor in self.values.items()}

    def load(self, state: dict[str, float]) -> None:
        """Continue from what `state` gave."""
        for name, number in state.items():
            self.values[name].fill_(number)

    def forgive(self, other: Watch) -> None:
        """The trouble that `other` saw is over, but what it counted stays counted."""
        for name in ("skipped", "spikes"):
            self.values[name].copy_(other.values[name])
        self.values["in_a_row"].zero_()
