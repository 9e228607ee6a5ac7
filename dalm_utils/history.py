"""What a run recorded: a list of dictionaries, and the file that holds it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import write_file
from .terminal import warn


@dataclass
class History:
    """What a run recorded, one dictionary per logged step, kept in `history.jsonl` while it grows.

    Keys: step, tokens (positions read so far, padding of pairs included), loss (mean since the last record), ratio,
    lr, grad_norm, seconds, tokens_per_second, memory (GiB), eta (seconds), and on evaluated steps nelbo (nats per
    token), nelbo_stderr, bits_per_byte; a generated text under sample. AR runs have nll instead of nelbo. A value that
    was not finite is None.
    About stability: skipped (steps so far whose gradient was not finite or a spike), spikes, largest_norm (since the
    last record), norm_limit (a larger norm would be a spike now), saturated (fraction of the predictions), loss_scale
    (FP16); and event, a sentence, where a run rolled back or ran out of patience.
    """

    path: Path | None = None
    records: list[dict] = field(default_factory=list)
    behind: bool = False  # the file is not what `records` is, because the disk refused it
    stopped_by: int | None = None  # the signal that stopped training before its last step

    @classmethod
    def load(cls, path: Path) -> History:
        """Read a file; if there is none, the history is empty.

        A last line that a crash cut short is dropped. Other lines that are not records are named on stderr and skipped.
        """
        lines = path.read_bytes().rstrip(b"\n").split(b"\n") if path.exists() else []
        records = [_parse(line) for line in lines]
        if records and records[-1] is None:
            records.pop()
        damaged = [str(number) for number, record in enumerate(records, 1) if record is None]
        if damaged:
            warn(f"{path}: line {', '.join(damaged)} is damaged and was skipped")
        return cls(path, [record for record in records if record is not None])

    def append(self, record: dict) -> None:
        """Add a record, also to the file. If the disk refuses it, that is reported, and the next call tries again."""
        self.records.append(record)
        if self.path is None:
            return
        if self.behind:
            self.save()
        else:
            with self._reporting(self.path), self.path.open("a") as file:
                file.write(_line(record))

    def save(self) -> None:
        """Make the file hold exactly `records`. A disk that refuses is reported, as by `append`."""
        if self.path is not None:
            with self._reporting(self.path):
                self.write(self.path)

    def write(self, path: Path) -> None:
        """Replace the content of a file by `records`, in one move. Raises OSError if the disk refuses."""
        write_file(path, "".join(map(_line, self.records)))

    @contextlib.contextmanager
    def _reporting(self, path: Path) -> Iterator[None]:
        try:
            yield
            self.behind = False
        except OSError as error:
            if not self.behind:
                warn(f"{path.name} could not be written ({error.strerror}); its records are kept in memory")
            self.behind = True

    def series(self, key: str, x: str = "step") -> tuple[list, list]:
        """The points at which `key` was recorded: ([x...], [value...])."""
        points = [(record[x], record[key]) for record in self.records if record.get(key) is not None]
        return [a for a, _ in points], [b for _, b in points]

    def last(self, key: str):
        """The newest value of `key`, or None."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    def window(self, key: str, first: int, last: int) -> float:
        """The mean of `key` over records with first <= step < last, which is steadier than any single value.

        Raises:
            ValueError: no record there has `key`.
        """
        values = [r[key] for r in self.records if first <= r["step"] < last and r.get(key) is not None]
        if not values:
            raise ValueError(f"no record of {key!r} with {first} <= step < {last}")
        return sum(values) / len(values)

    def tokens_until(self, key: str, value: float) -> float | None:
        """How many tokens it took until `key` fell to `value`, by linear interpolation; None if it never did."""
        tokens, values = self.series(key, "tokens")
        for i, reached in enumerate(values):
            if reached <= value:
                if i == 0:
                    return float(tokens[0])
                fraction = (values[i - 1] - value) / (values[i - 1] - reached)
                return tokens[i - 1] + fraction * (tokens[i] - tokens[i - 1])
        return None


def finite(value):
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _parse(line: bytes) -> dict | None:
    """The record in a line of a history, or None if it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record and all(_fits(key, value) for key, value in record.items()) else None


def _fits(key: str, value) -> bool:
    """Whether a record may hold this value: a finite number, a text where one belongs, or None."""
    if value is None or key in ("event", "sample"):
        return value is None or isinstance(value, str)
    return isinstance(value, int | float) and math.isfinite(value)
