"""Models of the Hub, from a server of our own that answers as it does: what is fetched, from where it goes on, what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import moejax
from moejax.checkpoint.hub import choose_files, is_id, locate
from moejax.checkpoint.source import open_source, read_tree
from moejax.checkpoint.store import read_metadata
from moejax.config import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server of one model, org/tiny, whose revisions main and v2 are one commit; org/gated shows its files and gives none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sent: Counter[str] = Counter()  # bytes of each file
        self.cut: dict[str, int] = {}  # file -> bytes after which the connection breaks, once
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        words = urlsplit(request.path).path.strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        name, rest = "/".join(words[2:4] if is_api else words[:2]), words[4:] if is_api else words[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if name not in ("org/tiny", "org/gated"):
            self.send(request, 404, {"X-Error-Code": "RepoNotFound"}, b"Repository not found", with_body)
        elif revision not in ("main", "v2", COMMIT):
            self.send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id", with_body)
        elif is_api:
            files = [(path.name, path.stat().st_size) for path in sorted(self.directory.iterdir())]
            if rest and rest[0] == "tree":
                listing: object = [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in files]
            else:
                listing = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file, "size": size} for file, size in files]}
            self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(listing).encode(), with_body)
        elif name == "org/gated":
            self.send(request, 403, {"X-Error-Code": "GatedRepo"}, b"Access to model org/gated is restricted", with_body)
        else:
            self.send_file(request, rest[2], with_body)

    def send_file(self, request: BaseHTTPRequestHandler, name: str, with_body: bool) -> None:
        data = (self.directory / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        limit = self.cut.pop(name, len(body)) if with_body else len(body)
        self.sent[name] += min(limit, len(body)) if with_body else 0
        self.send(request, 206 if start else 200, headers, body, with_body, limit)

    def send(self, request, status: int, headers: dict[str, str], body: bytes, with_body: bool, limit: int | None = None) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body[:limit])
            if limit is not None and limit < len(body):
                request.close_connection = True


@pytest.fixture
def hub(tmp_path, golden, monkeypatch):
    """The server, with a model that lies there in two layouts, as Mistral publishes them, and a cache of its own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    directory = tmp_path / "served"
    shutil.copytree(golden("mixtral_hf_sharded").directory, directory)
    for name in ("expected.npz", "inputs.npz", "meta.json", "grads.npz"):
        (directory / name).unlink(missing_ok=True)
    for name in ("README.md", "pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "params.json"):
        (directory / name).write_text("x")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    server = Hub(directory)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with contextlib.closing(server):
        yield server


def test_the_files_that_are_needed_once(hub, assert_equal_trees, tmp_path):
    said: list[str] = []
    directory, name = locate("org/tiny", say=said.append)
    assert name == f"org/tiny@{COMMIT}"
    assert "fetches org/tiny: 9 files" in said[0]
    shards = {path.name for path in hub.directory.glob("model-*.safetensors")}
    needed = {"config.json", "generation_config.json", "params.json", "model.safetensors.index.json", *shards}
    assert {path.name for path in directory.iterdir()} == needed
    assert hub.sent == {name: (hub.directory / name).stat().st_size for name in needed}
    with open_source(directory) as fetched, open_source(hub.directory) as served:
        assert_equal_trees(read_tree(fetched), read_tree(served))
    model, variables, _ = moejax.load("org/tiny", revision="v2")
    assert model.config.eos_token_ids == (2, 4)
    with open_source(hub.directory) as served:
        assert_equal_trees(variables["params"], read_tree(served))
    assert sum(hub.sent.values()) == sum((hub.directory / name).stat().st_size for name in needed)
    moejax.convert("org/tiny", tmp_path / "a", verify=True)
    assert read_metadata(tmp_path / "a").source["name"] == f"org/tiny@{COMMIT}"


def test_a_broken_download_goes_on(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is received is kept in pieces of this size
    shard = sorted(hub.directory.glob("model-*.safetensors"))[0]
    size = shard.stat().st_size
    hub.cut[shard.name] = size // 2
    with contextlib.suppress(UserError):
        locate("org/tiny")
    directory, _ = locate("org/tiny")
    assert (directory / shard.name).read_bytes() == shard.read_bytes()
    assert size <= hub.sent[shard.name] < size + 1000


def test_without_a_network_what_was_fetched_before(hub, monkeypatch):
    directory, _ = locate("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    said: list[str] = []
    assert locate("org/tiny", say=said.append)[0] == directory
    assert said[0].startswith(f"the Hub cannot be reached; org/tiny is read as it was fetched before: {directory} (")
    with pytest.raises(UserError, match=r"^org/other is no directory here, and the Hub cannot be reached to fetch it"):
        moejax.load("org/other")


def test_refusals_are_one_message(hub, tmp_path):
    for name, revision, message in (
        ("org/none", None, "org/none is neither a directory here nor a model on the Hub that may be read"),
        ("org/gated", None, "org/gated is gated: its conditions must be accepted first"),
        ("org/tiny", "v3", "org/tiny has no revision 'v3' on the Hub"),
        (str(hub.directory), "main", "only models of the Hub .* have revisions"),
    ):
        with pytest.raises(UserError, match=message):
            moejax.convert(name, tmp_path / "a", revision=revision)
    with pytest.raises(UserError, match=r"org/x has no safetensors .* found pytorch_model\.bin"):
        choose_files("org/x", ["pytorch_model.bin", "onnx/model.safetensors"])
    assert not (tmp_path / "a").exists()


def test_a_dry_run_fetches_nothing(hub, tmp_path):
    said: list[str] = []
    moejax.convert("org/tiny", tmp_path / "a", dry_run=True, say=said.append)
    assert said[0].startswith("fetches org/tiny: 9 files, ")
    assert not hub.sent
    assert not (tmp_path / "a").exists()


def test_mistrals_files_where_there_are_no_others():
    assert choose_files("o/m", ["params.json", "consolidated.safetensors", "consolidated.00.pth", "tokenizer.model.v3", "LICENSE"]) == [
        "consolidated.safetensors", "params.json", "tokenizer.model.v3",
    ]  # fmt: skip


def test_what_is_there_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_id("mistralai/Mixtral-8x7B-v0.1")
    assert not any(map(is_id, ("/a/b", "./a", "a", "a/b/c", "~/a", "../a", "a/", "https://a/b")))
    (tmp_path / "runs").mkdir()
    assert not is_id("runs/typo")
    with pytest.raises(UserError, match=r"runs/typo does not exist"):
        moejax.load("runs/typo")
