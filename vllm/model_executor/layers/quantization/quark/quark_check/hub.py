# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A checkpoint on Hugging Face: config, index and headers are fetched, weights not."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import INDEX, MAX_HEADER_BYTES, MAX_JSON_BYTES, CheckpointError, misfit
from .opened import CONFIG

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What is read of each shard at once: most headers are shorter.
HEAD_BYTES = 1 << 18
NUM_THREADS = 8
# Of all files together, far beyond any real model.
MAX_BYTES = 500_000_000


def is_repository(model: str) -> bool:
    """Whether this may be the name of a repository, owner/name."""
    return _REPOSITORY.fullmatch(model) is not None


@dataclass
class HubFiles:
    """The files at the root of a repository, as checkpoint.Files has them.

    `system` is an fsspec file system; huggingface_hub's unless a test gives another.
    Whatever the network does is an OSError.
    """

    root: str
    system: Any
    options: dict[str, Any]
    heads: dict[str, bytes] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        if not self.found:
            entries = self._ask(self.system.ls, self.root, detail=True, **self.options)
            self.found = {
                str(each["name"]).rpartition("/")[2]: int(each["size"])
                for each in entries
                if each["type"] == "file"
            }
            names = [n for n in self.found if n.endswith(".safetensors")]
            names += [name for name in (CONFIG, INDEX) if name in self.found]
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                for name, head in zip(
                    names, threads.map(self._head, names), strict=True
                ):
                    self.heads[name] = head
                    if sum(map(len, self.heads.values())) > MAX_BYTES:
                        raise OSError(f"headers of more than {MAX_BYTES} bytes")
        return self.found

    def read(self, name: str, start: int, count: int) -> bytes:
        end = min(start + count, self.found.get(name, start + count))
        head = self.heads.get(name, b"")
        if end > len(head):
            head = self._fetch(name, end)
        return head[start:end]

    def _head(self, name: str) -> bytes:
        """A shard's header, or the whole of a smaller file."""
        size = self.found[name]
        if not name.endswith(".safetensors"):
            return self._fetch(name, min(size, MAX_JSON_BYTES + 1))
        head = self._fetch(name, min(size, HEAD_BYTES))
        end = 8 + int.from_bytes(head[:8], "little")
        is_whole = end <= len(head) or end > min(size, 8 + MAX_HEADER_BYTES)
        return head if is_whole else self._fetch(name, end)

    def _fetch(self, name: str, count: int) -> bytes:
        """The first bytes of a file."""

        def fetch() -> bytes:
            path = f"{self.root}/{name}"
            # Without a cache of blocks the rest of the file stays where it is.
            with self.system.open(path, "rb", block_size=0, **self.options) as stream:
                parts, missing = [], count
                while missing and (part := stream.read(missing)):
                    parts.append(part)
                    missing -= len(part)
            return b"".join(parts)

        return self._ask(fetch)

    @staticmethod
    def _ask(function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # of the client, of HTTP, of the network
            raise OSError(f"{type(error).__name__}: {error}") from error


def open_repository(model: str, revision: str | None) -> HubFiles:
    """The files of owner/name. Raises CheckpointError without huggingface_hub."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise CheckpointError(
            f"{model}: expected the package huggingface_hub, to fetch headers, found "
            "none; pip install huggingface_hub, or give a folder"
        ) from None
    return HubFiles(model, HfFileSystem(), {"revision": revision} if revision else {})


def find(model: str, revision: str | None) -> tuple[Path, HubFiles | None]:
    """Folder and files of the model: None for the files where it is a folder here.

    Raises CheckpointError for what is neither a folder nor owner/name.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            remedy = "leave out --revision, or give owner/name"
            raise misfit(model, "no revision of a folder", revision, remedy)
        return folder, None
    if not is_repository(model):
        remedy = "give the folder of a checkpoint, or owner/name on Hugging Face"
        raise misfit(model, "a folder, or owner/name", "neither", remedy)
    files = open_repository(model, revision)
    try:
        files.sizes()
    except OSError as error:
        remedy = "look at the name and the revision, at the network, and at your token"
        raise misfit(model, "a repository to read", str(error), remedy) from None
    return folder, files
