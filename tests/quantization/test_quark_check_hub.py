# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on Hugging Face: headers are fetched, weights are not.

A server on this machine answers huggingface_hub as the real one does, as far as the
command asks.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from vllm.model_executor.layers.quantization.quark.quark_check import hub, run
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
    LocalFiles,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.hub import HubFiles

from tests.fixtures.cells import FIXTURES

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
SHARDED = FIXTURES / "step3p5-tiny/sharded"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A repository owner/name of a folder's files, and what was asked of it."""

    folder: Path
    sent: dict[str, int] = field(default_factory=dict)
    revisions: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        if found := re.fullmatch(r"/owner/name/resolve/([^/]+)/([^/]+)", path):
            self.revisions.add(found[1])
            self._file(handler, self.folder / found[2])
        elif found := re.fullmatch(r"/api/models/owner/name/tree/([^/]+)", path):
            self.revisions.add(found[1])
            entries = [
                {
                    "type": "file",
                    "path": each.name,
                    "size": each.stat().st_size,
                    "oid": COMMIT,
                }
                for each in sorted(self.folder.iterdir())
            ]
            self._json(handler, entries)
        elif path.startswith("/api/models/owner/name"):
            info = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT}
            self._json(handler, info | {"siblings": [], "tags": []})
        else:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "RepoNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    def _json(self, handler: BaseHTTPRequestHandler, data: object) -> None:
        body = json.dumps(data).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _file(self, handler: BaseHTTPRequestHandler, path: Path) -> None:
        size = path.stat().st_size
        handler.send_response(200)
        handler.send_header("Content-Length", str(size))
        handler.send_header("ETag", f'"{COMMIT}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        with path.open("rb") as stream:
            while part := stream.read(1 << 16):
                try:
                    handler.wfile.write(part)
                except OSError:
                    handler.close_connection = True
                    return  # the client has what it wants
                self.sent[path.name] = self.sent.get(path.name, 0) + len(part)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    """The sharded export, each shard followed by a hole of 200 MB that is a tensor."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in SHARDED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header, size = json.loads(data[8:end]), 200_000_000
        name = f"vision.{path.name[6:11]}.weight"
        begin = len(data) - end
        header[name] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [begin, begin + size],
        }
        text = json.dumps(header).encode()
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text + data[end:])
            stream.truncate(8 + len(text) + begin + size)
        index["weight_map"][name] = path.name
    index_file.write_text(json.dumps(index))
    found = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield found
    http.shutdown()
    thread.join()
    http.server_close()


def check(server: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(server.folder.parent / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_headers_alone_are_fetched(server: Hub):
    remote = check(server, "owner/name", "--json")
    assert remote.returncode == 1, remote.stdout + remote.stderr
    local = check(server, str(server.folder), "--json")
    there, here = json.loads(remote.stdout), json.loads(local.stdout)
    assert there.pop("model") == "owner/name"
    assert here.pop("model") == "repository"
    assert there == here
    assert there["bytes"] > 800_000_000
    # What the server had sent before it saw that nobody reads on.
    assert sum(server.sent.values()) < 40_000_000


def test_revision(server: Hub):
    said = check(server, "owner/name", "--revision", "v1.2", "--json")
    assert said.returncode == 1, said.stdout
    assert server.revisions == {"v1.2"} or server.revisions == {"v1.2", COMMIT}


def test_no_such_repository(server: Hub):
    said = check(server, "owner/other")
    assert said.returncode == 2
    assert said.stdout.startswith("error: owner/other: expected a repository to read")


@pytest.mark.parametrize("more", [["--deep"], ["--fix", "out"]])
def test_what_needs_a_folder(server: Hub, more):
    said = check(server, "owner/name", *more)
    assert said.returncode == 2 and "download it" in said.stdout


# --- without a server -----------------------------------------------------------------


class Counting(LocalFileSystem):
    """Counts the bytes that are read of each file."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, int] = {}

    def open(self, path, *args, **kwargs):
        stream = super().open(path, *args, **kwargs)
        counts, name, read = self.read, Path(path).name, stream.read

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *args: object) -> None:
                stream.close()

            def read(self, count: int) -> bytes:
                data = read(count)
                counts[name] = counts.get(name, 0) + len(data)
                return data

        return Stream()


def test_same_tensors_as_of_a_folder(monkeypatch):
    """With headers longer than what is read at first, and shorter."""
    for head in (64, 1 << 18):
        monkeypatch.setattr(hub, "HEAD_BYTES", head)
        system = Counting()
        remote = HubFiles(str(SHARDED), system, {})
        assert read_checkpoint(SHARDED, remote) == read_checkpoint(SHARDED)
        for name, size in LocalFiles(SHARDED).sizes().items():
            if name.endswith(".safetensors"):
                with (SHARDED / name).open("rb") as stream:
                    end = 8 + int.from_bytes(stream.read(8), "little")
                assert system.read[name] <= min(size, max(head, end) + head)


def test_hostile_header_lengths_are_not_fetched(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(300_000_000)
    (tmp_path / "config.json").write_text("{}")
    system = Counting()
    with pytest.raises(CheckpointError, match="a header of 100000001"):
        run.check(tmp_path, HubFiles(str(tmp_path), system, {}))
    assert system.read["model.safetensors"] <= hub.HEAD_BYTES


def test_headers_are_bounded_together(monkeypatch):
    monkeypatch.setattr(hub, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_checkpoint(SHARDED, HubFiles(str(SHARDED), Counting(), {}))


def test_whatever_the_client_raises_is_one_error():
    class Broken(LocalFileSystem):
        cachable = False

        def ls(self, *args: object, **kwargs: object) -> list:
            raise KeyError("no such thing")

    with pytest.raises(CheckpointError, match="KeyError"):
        read_checkpoint(SHARDED, HubFiles("owner/name", Broken(), {}))


@pytest.mark.parametrize(
    "model",
    [
        "owner/name/more",
        "/etc/owner",
        "../name",
        "../owner/name",
        "name",
        "owner/na me",
    ],
)
def test_what_is_no_repository(model):
    with pytest.raises(CheckpointError, match="owner/name"):
        hub.find(model, None)


def test_a_folder_has_no_revision():
    with pytest.raises(CheckpointError, match="revision"):
        hub.find(str(SHARDED), "main")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.find("owner/name", None)
