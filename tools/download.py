# SPDX-License-Identifier: Apache-2.0
"""Get a base wheel into the cache: resumed, with progress, checked by its sha256.

What is beside a file `x` of the cache: `x.json`, where it came from and what the server
calls this version of it; `x.part` and `x.part.json`, a download under way; `x.lock`,
held while one build may change any of these.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from filelock import FileLock, Timeout
from packaging.utils import parse_wheel_filename
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from tools.errors import ForkError
from tools.location import VARIABLE, parse
from tools.upstream import BaseWheel

CHUNK = 1 << 20
TIMEOUT_S = 60

# Keys: url, etag, last_modified; of a whole file also sha256.
Record = dict[str, str]


def cache_folder() -> Path:
    """Where vLLM itself caches: VLLM_CACHE_ROOT, else XDG_CACHE_HOME/vllm."""
    xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    root = os.environ.get("VLLM_CACHE_ROOT", f"{xdg}/vllm")
    return Path(root).expanduser() / "wheels"


def fetch(wheel: BaseWheel, location: str | None = None) -> Path:
    """Return a local path of `wheel`, its sha256 checked if it is known.

    `location` is a path or URL, with `#sha256=` or without; None takes `wheel.url`, or
    asks the package index for the file name. What a sha256 is known of is taken from
    the cache without asking; of any other URL the server is asked each time. Raises
    ForkError.
    """
    own = parse(location) if location else None
    sha256, source = wheel.sha256, wheel.source
    if own and own.sha256:
        sha256, source = own.sha256, f"#sha256= in {VARIABLE}"
    if own and not own.is_remote:
        if not own.path.is_file():
            raise ForkError(f"{VARIABLE}: no such file: {own.where}")
        if sha256:
            _check(own.path, sha256, str(own.path), source)
        return own.path
    url = own.where if own else wheel.url
    if sha256 is None:
        # Two URLs may name different wheels alike, so a URL gets a folder of its own.
        key = hashlib.sha256((url or "").encode()).hexdigest()[:12]
        path = cache_folder() / f"url-{key}" / wheel.filename
        with locked(path):
            _fetch_newest(url or index_url(wheel.filename), path)
        return path
    path = cache_folder() / sha256 / wheel.filename
    if not path.exists():
        with locked(path):
            if not path.exists():
                _fetch_known(url, path, sha256, source)
    _check(path, sha256, str(path), source)
    return path


def _fetch_known(url: str | None, path: Path, sha256: str, source: str) -> None:
    """Put the wheel of this sha256 at `path`."""
    part = _part(path)
    if copy := _copy_of(path.name, sha256):
        _drop(part)
        _check_space(path.parent, copy.stat().st_size)
        shutil.copyfile(copy, part)
        if _sha256(part) == sha256:
            part.replace(path)
            return
        _drop(part)  # that copy is damaged
    url = url or index_url(path.name)
    _download(url, part)
    try:
        _check(part, sha256, url, source)
    except ForkError:
        _drop(part)
        raise
    part.replace(path)
    _drop(part)


def _copy_of(name: str, sha256: str) -> Path | None:
    """A wheel of this sha256 that came from a URL when the sha256 was not known."""
    for folder in cache_folder().glob("url-*"):
        path = folder / name
        if _read(path).get("sha256") == sha256 and path.exists():
            return path
    return None


def _fetch_newest(url: str, path: Path) -> None:
    """Put at `path` what the server has now, which may be what is there."""
    part, cached = _part(path), _read(path)
    if not path.exists() or cached.get("sha256") != _sha256(path):
        cached = {}
    try:
        arrived = _download(url, part, cached)
    except ForkError as error:
        if not cached:
            raise
        raise ForkError(
            f"{error}\n{path} is what was there before. To build from it without "
            f"asking, put #sha256={cached['sha256']} behind the URL."
        ) from None
    if arrived is None:
        _drop(part)
        return
    # Should this end half-way, a file without a record is there, and is fetched again.
    _json(path).unlink(missing_ok=True)
    part.replace(path)
    _drop(part)
    _write(path, arrived | {"sha256": _sha256(path)})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time puts a file at `path`. A killed one holds up nobody."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{path.name}: waiting for another build's download", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise ForkError(
            f"{path.parent}: cannot write the cache: {error.strerror}. Set "
            "VLLM_CACHE_ROOT to another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _json(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read(path: Path) -> Record:
    """The record of `path`; empty if there is none."""
    try:
        return dict(json.loads(_json(path).read_text()))
    except (OSError, ValueError):
        return {}


def _write(path: Path, record: Record) -> None:
    _json(path).write_text(json.dumps(record))


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    _json(path).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str, name: str, source: str) -> None:
    if (found := _sha256(path)) != expected:
        raise ForkError(
            f"{name}: wrong sha256.\n  expected {expected} ({source})\n"
            f"  found    {found}\n"
            "It is damaged, or is not the file that was meant: remove a damaged copy "
            "or correct the sha256, and build again."
        )


def index_url(filename: str) -> str:
    """URL of a file on the package index that pip is configured for."""
    project = parse_wheel_filename(filename)[0]
    try:
        with PyPISimple(configured_index()) as index:
            packages = index.get_project_page(project, timeout=TIMEOUT_S).packages
    except (NoSuchProjectError, requests.RequestException) as error:
        raise ForkError(
            f"{filename}: cannot ask the package index for {project}: {error}\n"
            "Check the network, or set VLLM_PRECOMPILED_WHEEL_LOCATION to a copy."
        ) from None
    for package in packages:
        if package.filename == filename:
            return package.url
    raise ForkError(
        f"{filename}: the package index has {project} but not this file. Set "
        "VLLM_PRECOMPILED_WHEEL_LOCATION to a copy of it."
    )


def configured_index() -> str:
    """The index that pip uses: the user's mirror, if there is one."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    pip = subprocess.run(command, capture_output=True, text=True)
    mirror = os.environ.get("PIP_INDEX_URL") or pip.stdout.strip()
    return mirror or PYPI_SIMPLE_ENDPOINT


def _download(url: str, part: Path, cached: Record | None = None) -> Record | None:
    """Make `part` the whole of what is at `url`, and return its record.

    None, if the server still has what `cached` describes. Raises ForkError.
    """
    try:
        arrived = _request(url, part, cached or {})
        if arrived == {}:  # `part` is of another version: all over again
            _drop(part)
            arrived = _request(url, part, cached or {})
        if arrived == {}:
            raise requests.ConnectionError("it sent a range that nobody asked for")
        return arrived
    except requests.RequestException as error:
        goes_on = f"Build again to go on from {part}" if part.exists() else "Try again"
        raise ForkError(
            f"{part.name.removesuffix('.part')}: the download broke off: {error}\n"
            f"{goes_on}, or set {VARIABLE} to a copy of the wheel."
        ) from None
    except OSError as error:
        raise ForkError(
            f"{part}: cannot write the download: {error.strerror}. Make room or set "
            "VLLM_CACHE_ROOT to another folder."
        ) from None


def _request(url: str, part: Path, cached: Record) -> Record | None:
    """One request of `_download`; an empty record if the answer does not fit `part`."""
    begun = _read(part)
    have = 0
    headers = {"Accept-Encoding": "identity"}  # ranges are of the file as it is
    if cached.get("etag"):
        headers["If-None-Match"] = cached["etag"]
    if cached.get("last_modified"):
        headers["If-Modified-Since"] = cached["last_modified"]
    if part.exists() and begun.get("url") == url and (version := _version(begun)):
        have = part.stat().st_size
        headers |= {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        record = {"url": url}
        for key, header in (("etag", "ETag"), ("last_modified", "Last-Modified")):
            if header in response.headers:
                record[key] = response.headers[header]
        span = response.headers.get("Content-Range", "")
        if cached and response.status_code == requests.codes.not_modified:
            return None
        if have and response.status_code == requests.codes.range_not_satisfiable:
            return begun if span == f"bytes */{have}" else {}
        response.raise_for_status()
        if response.status_code == requests.codes.partial_content:
            if not have or not span.startswith(f"bytes {have}-"):
                return {}
            if _version(record) not in (None, _version(begun)):
                return {}
            record = begun
        elif response.status_code == requests.codes.ok:
            have = 0  # the server sends the whole file
            _drop(part)
        else:
            raise requests.ConnectionError(f"it answered {response.status_code}")
        missing = int(response.headers.get("Content-Length", 0))
        _check_space(part.parent, missing)
        _write(part, record)
        with part.open("ab") as file, _progress() as progress:
            name = part.name.removesuffix(".part")
            task = progress.add_task(name, total=have + missing, completed=have)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if missing and part.stat().st_size != have + missing:
        raise requests.ConnectionError(
            f"{part.stat().st_size} of {have + missing} bytes arrived"
        )
    return record


def _version(record: Record) -> str | None:
    """What If-Range may name: the same of two answers only if each byte is the same."""
    etag = record.get("etag", "")
    return record.get("last_modified") if etag[:2] in ("", "W/") else etag


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ForkError(
            f"{folder}: the download needs {needed >> 20} MiB, {free >> 20} MiB are "
            "free. Make room or set VLLM_CACHE_ROOT to another folder."
        )


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    return Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True))
