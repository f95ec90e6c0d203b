# SPDX-License-Identifier: Apache-2.0

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import download
from tools.download import cache_folder, fetch
from tools.errors import ForkError
from tools.upstream import BaseWheel, release

FILENAME = "vllm-0.20.2-cp38-abi3-manylinux_2_35_x86_64.whl"


class Handler(BaseHTTPRequestHandler):
    """A file server that can cut a transfer off, or know nothing of ranges."""

    def do_GET(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        asked = self.headers.get("Range")
        state.ranges.append(asked)
        start = 0
        if asked and state.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if state.status:
            self.send_error(state.status)
            return
        if start >= len(state.content):
            self.send_error(416)
            return
        body = state.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: state.cut_after])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    state = SimpleNamespace(
        content=os.urandom(3_000_000),
        cut_after=None,
        knows_ranges=True,
        status=None,
        ranges=[],
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.state = state  # type: ignore[attr-defined]
    state.url = f"http://127.0.0.1:{http.server_port}/{FILENAME}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache/wheels"


def wheel_of(content: bytes | None) -> BaseWheel:
    sha256 = hashlib.sha256(content).hexdigest() if content is not None else None
    return BaseWheel(FILENAME, sha256, release(), "cuda")


def parts(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def test_download_is_cached(server: SimpleNamespace, cache: Path):
    path = fetch(wheel_of(server.content), server.url)
    assert path.name == FILENAME
    assert path.is_relative_to(cache)
    assert path.read_bytes() == server.content
    assert fetch(wheel_of(server.content), server.url) == path
    assert server.ranges == [None]
    assert parts(cache) == []


def test_cut_off_download_goes_on(server: SimpleNamespace, cache: Path):
    server.cut_after = 1_234_567
    with pytest.raises(ForkError, match="the download broke off.*\n.*go on from"):
        fetch(wheel_of(server.content), server.url)
    [part] = parts(cache)
    arrived = part.stat().st_size
    assert 0 < arrived <= 1_234_567
    server.cut_after = None
    path = fetch(wheel_of(server.content), server.url)
    assert server.ranges == [None, f"bytes={arrived}-"]
    assert path.read_bytes() == server.content
    assert parts(cache) == []


def test_part_that_is_already_whole(server: SimpleNamespace, cache: Path):
    wheel = wheel_of(server.content)
    part = cache / str(wheel.sha256) / f"{FILENAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.content)
    assert fetch(wheel, server.url).read_bytes() == server.content


def test_server_without_ranges_sends_all_again(server: SimpleNamespace, cache: Path):
    server.knows_ranges = False
    server.cut_after = 1_000_000
    with pytest.raises(ForkError, match="broke off"):
        fetch(wheel_of(server.content), server.url)
    server.cut_after = None
    path = fetch(wheel_of(server.content), server.url)
    assert path.read_bytes() == server.content


def test_wrong_sha256_names_both_and_keeps_nothing(
    server: SimpleNamespace, cache: Path
):
    expected = wheel_of(b"something else")
    with pytest.raises(ForkError, match="wrong sha256") as error:
        fetch(expected, server.url)
    assert str(expected.sha256) in str(error.value)
    assert hashlib.sha256(server.content).hexdigest() in str(error.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_damaged_cache_is_found(server: SimpleNamespace):
    path = fetch(wheel_of(server.content), server.url)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ForkError, match=f"{FILENAME}: wrong sha256"):
        fetch(wheel_of(server.content), server.url)


def test_own_wheel_of_another_url_is_another_wheel(server: SimpleNamespace):
    first = fetch(wheel_of(None), server.url)
    server.content = os.urandom(1000)
    second = fetch(wheel_of(None), server.url.replace("/vllm", "/other/vllm"))
    assert first != second
    assert second.read_bytes() == server.content


@pytest.mark.parametrize("status", [403, 404, 500])
def test_http_error(server: SimpleNamespace, cache: Path, status: int):
    server.status = status
    with pytest.raises(ForkError, match=f"broke off: {status}"):
        fetch(wheel_of(server.content), server.url)
    assert parts(cache) == []


def test_full_disk_is_found_before_the_download(
    server: SimpleNamespace, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ForkError, match="needs 2 MiB, 0 MiB are free.*VLLM_CACHE_ROOT"):
        fetch(wheel_of(server.content), server.url)
    assert parts(cache) == []


def test_path_and_file_url(tmp_path: Path):
    folder = tmp_path / "with space"
    folder.mkdir()
    path = folder / FILENAME
    path.write_bytes(b"content")
    assert fetch(wheel_of(b"content"), str(path)) == path
    assert fetch(wheel_of(b"content"), path.as_uri()) == path
    with pytest.raises(ForkError, match="wrong sha256"):
        fetch(wheel_of(b"other"), str(path))
    with pytest.raises(ForkError, match="no such file: /missing.whl"):
        fetch(wheel_of(None), "/missing.whl")


def test_index_lookup(server: SimpleNamespace, tmp_path: Path, monkeypatch):
    """The file is found by its name on the index that pip is configured for."""
    page = f'<a href="{server.url}">{FILENAME}</a>'.encode()
    wheel, content = wheel_of(server.content), server.content
    monkeypatch.setenv("PIP_INDEX_URL", server.url.rsplit("/", 1)[0] + "/simple/")

    def urls(filename: str) -> str:
        server.content = page
        try:
            return download.index_url(filename)
        finally:
            server.content = content

    # The page is HTML for any project: the handler names no content type.
    monkeypatch.setattr(Handler, "end_headers", _html_end_headers)
    assert urls(FILENAME) == server.url
    with pytest.raises(ForkError, match="has vllm but not this file"):
        urls(FILENAME.replace("x86_64", "aarch64"))
    assert fetch(wheel, server.url).read_bytes() == content


def _html_end_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.send_header("Content-Type", "text/html")
    BaseHTTPRequestHandler.end_headers(handler)


def test_index_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(ForkError, match="cannot ask the package index for vllm"):
        fetch(wheel_of(b""))


def test_cache_folder_is_vllms(monkeypatch: pytest.MonkeyPatch):
    assert str(cache_folder()).endswith("/cache/wheels")
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vllm/wheels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/vllm/wheels").expanduser()
