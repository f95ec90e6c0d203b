# SPDX-License-Identifier: Apache-2.0
"""Get a base wheel into the cache: resumed, with progress, checked by its sha256."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
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
from tools.upstream import BaseWheel

CHUNK = 1 << 20
TIMEOUT_S = 60


def cache_folder() -> Path:
    """Where vLLM itself caches: VLLM_CACHE_ROOT, else XDG_CACHE_HOME/vllm."""
    xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    root = os.environ.get("VLLM_CACHE_ROOT", f"{xdg}/vllm")
    return Path(root).expanduser() / "wheels"


def fetch(wheel: BaseWheel, location: str | None = None) -> Path:
    """Return a local path of `wheel`, its sha256 checked if it is known.

    `location` is a path or URL; None asks the package index for the file name. A
    download goes to `<name>.part` in the cache and goes on there when it was cut off.
    Raises ForkError.
    """
    if location and urlsplit(location).scheme not in ("http", "https"):
        path = Path(unquote(urlsplit(location).path)).expanduser()
        if not path.is_file():
            raise ForkError(
                f"VLLM_PRECOMPILED_WHEEL_LOCATION: no such file: {location}"
            )
        _check(path, wheel.sha256)
        return path
    # Two URLs may name different wheels alike, so a URL gets a folder of its own.
    key = hashlib.sha256((location or "").encode()).hexdigest()[:12]
    folder = cache_folder() / (wheel.sha256 or f"url-{key}")
    path = folder / wheel.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        _download(location or index_url(wheel.filename), part)
        try:
            _check(part, wheel.sha256)
        except ForkError:
            part.unlink()
            raise
        part.replace(path)
    else:
        _check(path, wheel.sha256)
    return path


def _check(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ForkError(
            f"{path}: wrong sha256.\n  expected {expected} (UPSTREAM.toml)\n"
            f"  found    {found}\n"
            "The file is damaged or is not the release; remove it and build again."
        )


def index_url(filename: str) -> str:
    """URL of a file on the package index that pip is configured for."""
    project = parse_wheel_filename(filename)[0]
    try:
        with PyPISimple(_configured_index()) as index:
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


def _configured_index() -> str:
    """The index that pip uses: the user's mirror, if there is one."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    pip = subprocess.run(command, capture_output=True, text=True)
    mirror = os.environ.get("PIP_INDEX_URL") or pip.stdout.strip()
    return mirror or PYPI_SIMPLE_ENDPOINT


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`."""
    have = part.stat().st_size if part.exists() else 0
    name = part.name.removesuffix(".part")
    try:
        with requests.get(
            url,
            headers={"Range": f"bytes={have}-"} if have else {},
            stream=True,
            timeout=TIMEOUT_S,
        ) as response:
            if response.status_code == requests.codes.range_not_satisfiable:
                return  # `part` has everything; its sha256 decides
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                have = 0  # the server sends the whole file
            missing = int(response.headers.get("Content-Length", 0))
            _check_space(part.parent, missing)
            with part.open("ab" if have else "wb") as file, _progress() as progress:
                task = progress.add_task(name, total=have + missing, completed=have)
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
        if missing and part.stat().st_size != have + missing:
            raise requests.ConnectionError(
                f"{part.stat().st_size} of {have + missing} bytes arrived"
            )
    except requests.RequestException as error:
        raise ForkError(
            f"{name}: the download broke off: {error}\nBuild again to go on from "
            f"{part}, or set VLLM_PRECOMPILED_WHEEL_LOCATION to a copy of the wheel."
        ) from None
    except OSError as error:
        raise ForkError(
            f"{part}: cannot write the download: {error.strerror}. Make room or set "
            "VLLM_CACHE_ROOT to another folder."
        ) from None


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
