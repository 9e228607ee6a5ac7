"""The arXiv articles as parquet files, from a hub: which set, which revision, which shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .hubs import PATIENCE
from .terminal import first_line

FIELD = "article"  # holds the text
SHARDS = 15  # of the training split, about 230 MB each
HUBS = {  # the set's id on each, and the revision that is meant
    "huggingface": ("ccdv/arxiv-summarization", "240aaf1a969b3f8cd0ade6986bfad0cd730ee288"),
    "modelscope": ("ccdv/arxiv-summarization", "master"),
}


@dataclass(frozen=True)
class ArxivSet:
    """What a source named `arxiv[:SHARDS][@HUB[/OWNER/NAME]]` means; its fields identify a text made from it."""

    hub: str
    id: str
    revision: str
    shards: int

    @classmethod
    def parse(cls, source: str) -> ArxivSet | None:
        """The set that a source names; None where the source is no such name.

        Raises:
            ValueError: a number of shards or a hub that does not exist.
        """
        match = re.fullmatch(r"arxiv(?::([^@]*))?(?:@([^/]*)(?:/(.+))?)?", source)
        if match is None:
            return None
        shards, hub, other_id = match[1] or str(SHARDS), match[2] or "huggingface", match[3]
        if not (shards.isdecimal() and 1 <= int(shards) <= SHARDS):
            raise ValueError(f"{source!r}: the set has 1 to {SHARDS} shards, not {shards!r}; arxiv:2 takes the first 2")
        if hub not in HUBS:
            raise ValueError(f"{source!r}: no hub {hub!r}; choose one of {', '.join(HUBS)}")
        set_id, revision = HUBS[hub]
        if other_id:
            set_id, revision = other_id, {"huggingface": "main", "modelscope": "master"}[hub]
        return cls(hub, set_id, revision, int(shards))

    def files(self) -> Iterator[str]:
        """Addresses (`hf://`) or paths of the parquet files, in order. The hub is asked first, and not for long.

        Raises:
            Exception: whatever the hub's client raises.
        """
        names = [f"section/train-{number:05d}-of-{SHARDS:05d}.parquet" for number in range(self.shards)]
        return {"huggingface": self._on_huggingface, "modelscope": self._on_modelscope}[self.hub](names)

    def _on_huggingface(self, names: list[str]) -> Iterator[str]:
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(self.id, revision=self.revision, timeout=PATIENCE).sha
        for name in names:
            yield f"hf://datasets/{self.id}@{commit}/{name}"

    def _on_modelscope(self, names: list[str]) -> Iterator[str]:
        import requests
        from modelscope import HubApi, dataset_snapshot_download

        requests.get(f"{HubApi().endpoint}/api/v1/datasets/{self.id}", timeout=PATIENCE).raise_for_status()
        for name in names:  # one by one, so that reading begins when the first is here
            folder = dataset_snapshot_download(self.id, revision=self.revision, allow_patterns=[name])
            yield f"{folder}/{name}"

    def unreachable(self, error: Exception) -> ConnectionError:
        """What to tell when the hub does not give the files: what was tried, and what else works."""
        others = " or ".join(f"text='arxiv@{hub}'" for hub in HUBS if hub != self.hub)
        reason = first_line(error)
        return ConnectionError(
            f"no arXiv articles from {self.hub}: tried the parquet files of {self.id!r}, revision {self.revision}: "
            f"{reason}. Instead, try {others}; or name a file with one JSON object a line and a field {FIELD!r} "
            "(arxiv_train-1.jsonl), or the set's parquet files, by a path; or take text='docstrings', which needs no "
            "network."
        )
