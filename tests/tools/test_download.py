# SPDX-License-Identifier: Apache-2.0

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import download
from tools.download import cache_folder, fetch
from tools.errors import ForkError
from tools.upstream import ROOT, BaseWheel, release

FILENAME = "vllm-0.20.2-cp38-abi3-manylinux_2_35_x86_64.whl"
FIRST, SECOND = "Sun, 22 Nov 2026 12:00:00 GMT", "Mon, 23 Nov 2026 12:00:00 GMT"


class Handler(BaseHTTPRequestHandler):
    """A file server whose manners can be changed."""

    def do_GET(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        with state.lock:
            state.ranges.append(self.headers.get("Range"))
            state.headers.append(dict(self.headers))
        content = state.content
        names = {"ETag": state.etag, "Last-Modified": state.last_modified}
        names = {header: value for header, value in names.items() if value}
        if state.status:
            self.send_error(state.status)
            return
        known = (self.headers["If-None-Match"], self.headers["If-Modified-Since"])
        if known[0] and known[0] == state.etag:
            self.answer(304, names)
            return
        if not known[0] and known[1] and known[1] == state.last_modified:
            self.answer(304, names)
            return
        start = 0
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        if asked and state.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if state.knows_if_range and condition not in names.values():
                start = 0
        if start and start >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[start:]
        if start:
            last = len(content) - 1
            names["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self.answer(206 if start else 200, names, len(body))
        for place in range(0, len(body), 1 << 16):
            if state.cut_after is not None and place >= state.cut_after:
                return
            if place + (1 << 16) >= len(body):
                # Before: the client may be done while this thread waits for its turn.
                with state.lock:
                    state.bodies += 1
            try:
                self.wfile.write(body[place : place + (1 << 16)])
            except ConnectionError:
                return
            time.sleep(state.seconds * (1 << 16) / len(content))

    def answer(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        if status != 304:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """`seconds` is how long it takes to send; `bodies` counts what was sent whole."""
    state = SimpleNamespace(
        content=os.urandom(3_000_000),
        etag='"first"',
        last_modified=None,
        cut_after=None,
        knows_ranges=True,
        knows_if_range=True,
        status=None,
        seconds=0.0,
        ranges=[],
        headers=[],
        bodies=0,
        lock=threading.Lock(),
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.state = state  # type: ignore[attr-defined]
    state.url = f"http://127.0.0.1:{http.server_port}/{FILENAME}"
    state.stop = http.server_close
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache/wheels"


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_of(content: bytes | None) -> BaseWheel:
    sha256 = sha256_of(content) if content is not None else None
    return BaseWheel(FILENAME, sha256, release(), "cuda")


def left(cache: Path) -> list[str]:
    """What is in the cache but for whole wheels and locks, which stay."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return [path.name for path in files if path.suffix not in (".whl", ".lock")]


def rebuild(server: SimpleNamespace) -> None:
    """Another wheel at the same URL, of another length."""
    server.content = os.urandom(2_500_000)
    server.etag = server.etag and server.etag.replace("first", "second")
    server.last_modified = server.last_modified and SECOND


def break_off(server: SimpleNamespace, wheel: BaseWheel, after: int = 1_234_567) -> int:
    """Fetch until the connection breaks; how much arrived."""
    server.cut_after = after
    with pytest.raises(ForkError, match="the download broke off.*\n.*go on from"):
        fetch(wheel, server.url)
    server.cut_after = None
    [part] = download.cache_folder().rglob("*.part")
    arrived = part.stat().st_size
    assert 0 < arrived < len(server.content)
    server.ranges.clear()
    server.headers.clear()
    return arrived


def test_download_is_cached(server: SimpleNamespace, cache: Path):
    path = fetch(wheel_of(server.content), server.url)
    assert path.name == FILENAME
    assert path.is_relative_to(cache)
    assert path.read_bytes() == server.content
    assert fetch(wheel_of(server.content), server.url) == path
    assert server.ranges == [None]
    assert left(cache) == []


@pytest.mark.parametrize(
    ("etag", "last_modified", "if_range"),
    [
        ('"first"', None, '"first"'),
        (None, FIRST, FIRST),
        ('W/"first"', FIRST, FIRST),
    ],
)
def test_cut_off_download_goes_on(
    server: SimpleNamespace, cache: Path, etag, last_modified, if_range
):
    server.etag, server.last_modified = etag, last_modified
    arrived = break_off(server, wheel_of(server.content))
    path = fetch(wheel_of(server.content), server.url)
    assert server.ranges == [f"bytes={arrived}-"]
    assert server.headers[0]["If-Range"] == if_range
    assert path.read_bytes() == server.content
    assert left(cache) == []


@pytest.mark.parametrize("etag", [None, 'W/"first"'])
def test_nothing_goes_on_where_versions_have_no_names(server: SimpleNamespace, etag):
    """A weak ETag says nothing of the bytes."""
    server.etag = etag
    break_off(server, wheel_of(server.content))
    assert fetch(wheel_of(server.content), server.url).read_bytes() == server.content
    assert server.ranges == [None]


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("shorter", [True, False])
def test_part_of_another_version_is_dropped(
    server: SimpleNamespace, cache: Path, knows_if_range: bool, shorter: bool
):
    """Nothing else would tell: no sha256 is known of this wheel."""
    arrived = break_off(server, wheel_of(None))
    rebuild(server)
    if shorter:
        server.content = server.content[: arrived // 2]
    server.knows_if_range = knows_if_range
    path = fetch(wheel_of(None), server.url)
    assert path.read_bytes() == server.content
    assert server.ranges[0] == f"bytes={arrived}-"
    assert len(server.ranges) == (1 if knows_if_range else 2)
    assert left(cache) == [f"{FILENAME}.json"]


def test_part_of_another_url_is_dropped(server: SimpleNamespace):
    break_off(server, wheel_of(server.content))
    path = fetch(wheel_of(server.content), server.url + "?from=elsewhere")
    assert path.read_bytes() == server.content
    assert server.ranges == [None]


def test_part_that_is_already_whole(server: SimpleNamespace, cache: Path):
    """The build was killed between the last byte and the renaming."""
    wheel = wheel_of(server.content)
    break_off(server, wheel)
    [part] = cache.rglob("*.part")
    part.write_bytes(server.content)
    assert fetch(wheel, server.url).read_bytes() == server.content
    assert server.ranges == [f"bytes={len(server.content)}-"]
    assert server.bodies == 0


def test_server_without_ranges_sends_all_again(server: SimpleNamespace, cache: Path):
    server.knows_ranges = False
    break_off(server, wheel_of(server.content))
    path = fetch(wheel_of(server.content), server.url)
    assert path.read_bytes() == server.content


def test_wrong_sha256_names_both_and_keeps_nothing(
    server: SimpleNamespace, cache: Path
):
    expected = wheel_of(b"something else")
    with pytest.raises(ForkError, match="wrong sha256") as error:
        fetch(expected, server.url)
    assert server.url in str(error.value)
    assert f"{expected.sha256} (UPSTREAM.toml)" in str(error.value)
    assert sha256_of(server.content) in str(error.value)
    assert left(cache) == [] and list(cache.rglob("*.whl")) == []


def test_damaged_cache_is_found(server: SimpleNamespace):
    path = fetch(wheel_of(server.content), server.url)
    damage(path)
    with pytest.raises(ForkError, match=f"{FILENAME}: wrong sha256"):
        fetch(wheel_of(server.content), server.url)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def test_own_wheel_of_another_url_is_another_wheel(server: SimpleNamespace):
    first = fetch(wheel_of(None), server.url)
    server.content = os.urandom(1000)
    second = fetch(wheel_of(None), server.url.replace("/vllm", "/other/vllm"))
    assert first != second
    assert second.read_bytes() == server.content


NAMED = [('"first"', None), ('W/"first"', None), (None, FIRST), ('"first"', FIRST)]


@pytest.mark.parametrize(("etag", "last_modified"), NAMED)
def test_wheel_of_a_url_is_asked_for_each_time(
    server: SimpleNamespace, cache: Path, etag, last_modified
):
    server.etag, server.last_modified = etag, last_modified
    path = fetch(wheel_of(None), server.url)
    first = path.read_bytes()
    assert fetch(wheel_of(None), server.url) == path
    assert path.read_bytes() == first == server.content
    assert (len(server.headers), server.bodies) == (2, 1)
    rebuild(server)
    assert fetch(wheel_of(None), server.url) == path
    assert path.read_bytes() == server.content != first
    assert fetch(wheel_of(None), server.url) == path
    assert (len(server.headers), server.bodies) == (4, 2)
    assert left(cache) == [f"{FILENAME}.json"]


def test_without_names_of_versions_it_is_fetched_each_time(server: SimpleNamespace):
    server.etag = None
    for _ in range(2):
        path = fetch(wheel_of(None), server.url)
        assert path.read_bytes() == server.content
        rebuild(server)
    assert server.bodies == 2


def test_rebuilt_wheel_goes_on_where_it_was_cut_off(server: SimpleNamespace):
    path = fetch(wheel_of(None), server.url)
    rebuild(server)
    arrived = break_off(server, wheel_of(None))
    assert len(path.read_bytes()) == 3_000_000  # until the other is whole
    assert fetch(wheel_of(None), server.url).read_bytes() == server.content
    assert server.ranges == [f"bytes={arrived}-"]
    # The server has the first again; the part of the second is of no use.
    server.etag = '"third"'
    break_off(server, wheel_of(None))
    server.etag = '"second"'
    assert fetch(wheel_of(None), server.url).read_bytes() == server.content
    assert fetch(wheel_of(None), server.url) == path
    assert server.bodies == 2


def test_damaged_wheel_of_a_url_is_fetched_again(server: SimpleNamespace):
    path = fetch(wheel_of(None), server.url)
    damage(path)
    assert fetch(wheel_of(None), server.url).read_bytes() == server.content
    assert server.bodies == 2


def test_without_the_server_only_a_sha256_builds_from_the_cache(
    server: SimpleNamespace, cache: Path
):
    path = fetch(wheel_of(None), server.url)
    server.status = 503
    known = sha256_of(server.content)
    with pytest.raises(ForkError, match="broke off: 503") as error:
        fetch(wheel_of(None), server.url)
    assert f"{path} is what was there before" in str(error.value)
    assert f"put #sha256={known} behind the URL" in str(error.value)
    server.headers.clear()
    pinned = fetch(wheel_of(None), f"{server.url}#sha256={known}")
    assert pinned.read_bytes() == server.content
    # It is a copy of its own, which a newer one at the URL does not replace.
    path.unlink()
    assert fetch(wheel_of(None), f"{server.url}#sha256={known.upper()}") == pinned
    assert server.headers == []
    assert left(cache) == [f"{FILENAME}.json"]


def test_a_damaged_copy_is_not_taken_for_the_sha256(server: SimpleNamespace):
    path = fetch(wheel_of(None), server.url)
    damage(path)
    pinned = fetch(wheel_of(None), f"{server.url}#sha256={sha256_of(server.content)}")
    assert pinned.read_bytes() == server.content
    assert server.bodies == 2


def test_sha256_of_the_user_is_checked(server: SimpleNamespace, tmp_path: Path):
    local = tmp_path / "a#b" / FILENAME
    local.parent.mkdir()
    local.write_bytes(b"content")
    found = sha256_of(b"content")
    assert fetch(wheel_of(None), f"{local}#sha256={found}") == local
    assert fetch(wheel_of(None), f"{local.as_uri()}#sha256={found}") == local
    # What the user says of his own wheel goes before what the release's file has.
    assert fetch(wheel_of(b"release"), f"{local}#sha256={found}") == local
    wrong = sha256_of(b"other")
    for where, has in (
        (str(local), found),
        (local.as_uri(), found),
        (server.url, sha256_of(server.content)),
    ):
        with pytest.raises(ForkError, match="wrong sha256") as error:
            fetch(wheel_of(None), f"{where}#sha256={wrong}")
        name = server.url if where == server.url else str(local)
        assert str(error.value).startswith(f"{name}: ")
        assert f"expected {wrong} (#sha256= in VLLM_PRE" in str(error.value)
        assert f"found    {has}" in str(error.value)


@pytest.mark.parametrize(
    "fragment",
    ["", "sha256=", "sha256=12ab", "sha256=" + "g" * 64, "md5=" + "0" * 32]
    + ["sha256=" + "0" * 65, "0" * 64, "sha256=" + "0" * 64 + "&egg=vllm"],
)
def test_malformed_sha256_is_one_clear_error(tmp_path: Path, fragment: str):
    for where in (f"/a/{FILENAME}", f"https://example.invalid/{FILENAME}"):
        with pytest.raises(ForkError) as error:
            fetch(wheel_of(None), f"{where}#{fragment}")
        message = str(error.value)
        assert message.startswith("VLLM_PRECOMPILED_WHEEL_LOCATION: expected ")
        assert f"{where}#sha256=<64 hex digits>, found #{fragment} " in message
        assert "\n" not in message


@pytest.mark.parametrize("known", [True, False])
def test_two_builds_at_once_download_once(
    server: SimpleNamespace, cache: Path, capsys, known: bool
):
    server.seconds = 1.0
    wheel = wheel_of(server.content if known else None)
    found = []

    def build() -> None:
        found.append(fetch(wheel, server.url).read_bytes())

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [server.content] * 3
    assert server.bodies == 1
    assert "waiting for another build's download" in capsys.readouterr().err


def test_killed_build_holds_up_nobody(server: SimpleNamespace, cache: Path):
    """And leaves what arrived to the next."""
    server.seconds = 30.0
    program = (
        "from tools.download import fetch\n"
        "from tools.upstream import BaseWheel, release\n"
        f"wheel = BaseWheel({FILENAME!r}, None, release(), 'cuda')\n"
        f"fetch(wheel, {server.url!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in cache.rglob("*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    server.seconds = 0.0
    started = time.monotonic()
    assert fetch(wheel_of(None), server.url).read_bytes() == server.content
    assert time.monotonic() - started < 10
    assert str(server.ranges[-1]).startswith("bytes=")


def test_cache_that_cannot_be_written(server: SimpleNamespace, cache: Path):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place")
    with pytest.raises(ForkError, match="cannot write the cache.*VLLM_CACHE_ROOT"):
        fetch(wheel_of(server.content), server.url)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_http_error(server: SimpleNamespace, cache: Path, status: int):
    server.status = status
    with pytest.raises(ForkError, match=f"broke off: {status}"):
        fetch(wheel_of(server.content), server.url)
    assert left(cache) == []


def test_full_disk_is_found_before_the_download(
    server: SimpleNamespace, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ForkError, match="needs 2 MiB, 0 MiB are free.*VLLM_CACHE_ROOT"):
        fetch(wheel_of(server.content), server.url)
    assert left(cache) == []


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
