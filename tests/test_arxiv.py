import contextlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import huggingface_hub
import modelscope
import pyarrow
import pyarrow.parquet
import pytest
import requests

from dalm_utils import arxiv
from dalm_utils.arxiv import ArxivSet
from dalm_utils.corpus import load_corpus
from dalm_utils.documents import documents, identify
from tests.helpers import PATIENCE, TEXTS, tiny_tokenizer
from tests.test_documents import write_parquet


@pytest.fixture
def shards(tmp_path):
    """Local parquet files under the set's names, each with texts of its own."""
    for number in range(3):
        rows = [{"article": f"{text} {'shard' * (number + 1)}", "abstract": "short"} for text in TEXTS]
        write_parquet(tmp_path / "section" / f"train-{number:05d}-of-00015.parquet", rows)
    return tmp_path


def test_what_a_name_means():
    assert ArxivSet.parse("arxiv") == ArxivSet("huggingface", *arxiv.HUBS["huggingface"], 15)
    assert ArxivSet.parse("arxiv:2@modelscope").shards == 2
    assert ArxivSet.parse("arxiv@modelscope/some/set") == ArxivSet("modelscope", "some/set", "master", 15)
    assert ArxivSet.parse("arxiv_train-1.jsonl") is ArxivSet.parse("docstrings") is None
    identities = [identify(f"arxiv{rest}", "text") for rest in ("", ":2", "@modelscope", "@modelscope/some/set")]
    assert all(a != b for a in identities for b in identities if a is not b)
    assert identities[0]["revision"] == arxiv.HUBS["huggingface"][1] and identify("arxiv", "x") == identities[0]


@pytest.mark.parametrize("name, message", [("arxiv:0", "1 to 15 shards, not '0'"), ("arxiv:many", "not 'many'"),
                                           ("arxiv:16", "not '16'"), ("arxiv@hug", "no hub 'hug'")])  # fmt: skip
def test_names_that_mean_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        identify(name, "text")


def test_from_huggingface_at_the_pinned_revision(tmp_path, shards, monkeypatch):
    read = []

    def load(kind, *, data_files, **options):
        read.append(data_files)
        prefix = f"hf://datasets/ccdv/arxiv-summarization@{'c' * 40}/"
        assert data_files.startswith(prefix) and options["streaming"]
        return load_dataset(kind, data_files=str(shards / data_files.removeprefix(prefix)), **options)

    def info(self, name, revision, timeout):
        assert (name, revision) == arxiv.HUBS["huggingface"] and timeout == arxiv.PATIENCE
        return SimpleNamespace(sha="c" * 40)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    made = load_corpus("arxiv:2", tiny_tokenizer(), cache=tmp_path / "cache")
    assert [address[-29:] for address in read] == ["/train-00000-of-00015.parquet", "/train-00001-of-00015.parquet"]
    assert sum(made.facts["documents"].values()) == 2 * len(TEXTS) and made.folder.name.startswith("arxiv-")
    monkeypatch.undo()  # no hub is asked for what is in the cache
    for name in ("arxiv:2", "arxiv:2@huggingface"):
        assert load_corpus(name, tiny_tokenizer(), cache=tmp_path / "cache").facts == made.facts


def test_a_shard_without_rows_does_not_end_the_set(tmp_path, shards, monkeypatch):
    empty = pyarrow.schema([("article", pyarrow.string())]).empty_table()
    pyarrow.parquet.write_table(empty, shards / "section" / "train-00000-of-00015.parquet")
    monkeypatch.setattr(requests, "get", lambda *_, timeout: SimpleNamespace(raise_for_status=lambda: None))
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", lambda *_, **__: str(shards))
    assert len(list(documents("arxiv:2@modelscope"))) == len(TEXTS)


def test_from_modelscope_shard_by_shard(tmp_path, shards, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(shards)

    monkeypatch.setattr(requests, "get", lambda *_, timeout: SimpleNamespace(raise_for_status=lambda: None))
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", download)
    made = load_corpus("arxiv:3@modelscope/some/set", tiny_tokenizer(), cache=tmp_path / "cache")
    assert sum(made.facts["documents"].values()) == 3 * len(TEXTS)
    assert asked == [("some/set", "master", [f"section/train-0000{n}-of-00015.parquet"]) for n in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("hub, others", [("huggingface", "arxiv@modelscope"), ("modelscope", "arxiv@huggingface")])
def test_a_hub_that_stalls_is_given_up_after_one_question(tmp_path, hub, others):
    """A server that takes connections and never answers; the hubs' clients would ask again and again."""
    asked, connections, done = [], [], threading.Event()

    def take():
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                connections.append(server.accept()[0])
                asked.append(connections[-1].recv(1000).split(b"\r\n")[0])

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        server.settimeout(0.1)
        pool.submit(take)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        code = "import sys; from dalm_utils import arxiv, __main__; arxiv.PATIENCE = 1; "
        code += f"sys.exit(__main__.main(['data', 'arxiv', '--hub', '{hub}']))"
        places = {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path)}
        environment = {**os.environ, **places, "HF_ENDPOINT": address, "MODELSCOPE_ENDPOINT": address}
        command = [sys.executable, "-c", code]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        finally:
            done.set()
    assert len([line for line in asked if b"ccdv/arxiv-summarization" in line]) == 1, asked
    error = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and error.startswith(f"error: no arXiv articles from {hub}: tried")
    for part in ("ccdv/arxiv-summarization", "timed out", others, "arxiv_train-1.jsonl", "docstrings"):
        assert part in error
