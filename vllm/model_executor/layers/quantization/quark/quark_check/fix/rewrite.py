# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Write a Quark INT8 checkpoint anew, laid out otherwise: `vllm quark-check --fix`.

First relayout.py plans all from the headers. Then the shards are written, a few MiB at
a time, into `OUT.partial`; shards that stay as they are become hard links. At last
everything is read back and compared with the source, and the folder gets its name.
What was interrupted goes on when it is asked for again.
"""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import INDEX, CheckpointError, TensorInfo, misfit, read_checkpoint
from ..opened import CONFIG
from ..weights import COMPANIONS, SCALE, WEIGHT
from .planned import Piece, Plan, Target, make_header
from .relayout import default_plan, make_plan
from .tensors import as_they_are, one_by_one

# Called with the bytes written and verified so far, and those to be in all.
Progress = Callable[[int, int], None]
CHUNK_BYTES = 8 << 20
_FORMAT = 1  # of the state file and of what is written


@dataclass(frozen=True)
class Rewritten:
    """The new checkpoint's folder and layout, what changed, shards written and shards
    linked."""

    folder: Path
    target: Target
    changes: tuple[str, ...]
    written: int
    linked: int


# --- writing --------------------------------------------------------------------------


def _read(piece: Piece) -> Iterator[bytes]:
    """The piece's bytes, a few MiB at a time. Raises CheckpointError where the file has
    become shorter."""
    with piece.file.open("rb") as stream:
        size = piece.end - piece.start
        if piece.repeat > 1:  # a scale; so often in one go
            data = _read_exactly(stream, piece, piece.start, size)
            left, most = piece.repeat, max(1, CHUNK_BYTES // max(1, size))
            while left:
                yield data * min(left, most)
                left -= min(left, most)
            return
        for start in range(piece.start, piece.end, CHUNK_BYTES):
            count = min(CHUNK_BYTES, piece.end - start)
            yield _read_exactly(stream, piece, start, count)


def _read_exactly(stream: Any, piece: Piece, start: int, count: int) -> bytes:
    stream.seek(start)
    data = stream.read(count)
    if len(data) < count:
        expected, found = f"{count} bytes at {start}", f"{len(data)}"
        raise misfit(piece.file, expected, found, "leave the source as it is")
    return data


@contextlib.contextmanager
def _new_file(file: Path) -> Generator[Any, None, None]:
    """A file to write to, that gets its name once it is whole and on the disk. What a
    killed run left under the other name is written over."""
    partial = file.with_name(f".{file.name}.tmp")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


class _Writer:
    """Writes a plan into a folder, and compares it with the source afterwards."""

    def __init__(
        self, plan: Plan, folder: Path, others: list[Path], progress: Progress | None
    ) -> None:
        self.plan, self.folder, self.others = plan, folder, others
        self.shards, self.progress = plan.shards(), progress
        changed = [name for name in self.shards if name not in plan.linked]
        self.sizes = {
            name: len(make_header(self.shards[name]))
            + sum(each.nbytes for each in self.shards[name])
            for name in changed
        }
        self.done, self.total = 0, 2 * sum(self.sizes.values())

    def _add(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)

    def left(self) -> int:
        """Bytes that are to be written yet; a link may turn out to be a copy."""
        return sum(
            size for name, size in self.sizes.items() if not self._has(name)
        ) + sum(path.stat().st_size for path in self._others_left())

    def _has(self, shard: str) -> bool:
        file = self.folder / shard
        return file.is_file() and file.stat().st_size == self.sizes[shard]

    def _others_left(self) -> list[Path]:
        return [
            path
            for path in self.others
            if not (self.folder / path.relative_to(self.plan.source)).exists()
        ]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard, tensors in self.shards.items():
            if shard in self.plan.linked:
                self._link(shard)
            elif self._has(shard):
                self._add(self.sizes[shard])
            else:
                with _new_file(self.folder / shard) as stream:
                    header = make_header(tensors)
                    stream.write(header)
                    self._add(len(header))
                    for piece in (each for tensor in tensors for each in tensor.pieces):
                        for data in _read(piece):
                            stream.write(data)
                            self._add(len(data))
        for path in self._others_left():
            file = self.folder / path.relative_to(self.plan.source)
            file.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as stream, _new_file(file) as copy:
                shutil.copyfileobj(stream, copy, CHUNK_BYTES)
        for name, text in self._texts().items():
            with _new_file(self.folder / name) as stream:
                stream.write(text.encode())

    def _link(self, shard: str) -> None:
        source, file = self.plan.source / shard, self.folder / shard
        if file.exists():
            return
        try:
            os.link(source.resolve(), file)
        except OSError:  # another file system, or one without links
            with source.open("rb") as stream, _new_file(file) as copy:
                shutil.copyfileobj(stream, copy, CHUNK_BYTES)

    def _texts(self) -> dict[str, str]:
        """The JSON files that are written anew."""
        found = {CONFIG: self.plan.config}
        if len(self.shards) > 1 or (self.plan.source / INDEX).exists():
            size = sum(each.nbytes for each in self.plan.tensors.values())
            names = sorted(self.plan.tensors)
            weight_map = {name: self.plan.tensors[name].shard for name in names}
            found[INDEX] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        return {name: json.dumps(each, indent=2) + "\n" for name, each in found.items()}

    def verify(self) -> None:
        """Raise CheckpointError unless the folder holds the source's numbers and no
        more, and delete the file that does not, so that it is written again."""
        for shard in self.plan.linked:
            pair = self.plan.source / shard, self.folder / shard
            if not os.path.samefile(*pair):
                self._compare_files(*pair)
        for path in self.others:
            self._compare_files(path, self.folder / path.relative_to(self.plan.source))
        for name, text in self._texts().items():
            if (self.folder / name).read_bytes() != text.encode():
                self._refuse(self.folder / name, "what was written", "something else")
        for shard in self.sizes:
            header, file = make_header(self.shards[shard]), self.folder / shard
            with file.open("rb") as stream:
                if stream.read(len(header)) != header:
                    self._refuse(file, "the header that was written", "another")
            self._add(len(header))
        expected = _views(read_checkpoint(self.plan.source))
        if self.plan.target == "compressed-tensors":
            expected = _without_companions(expected)
        found = _views(read_checkpoint(self.folder))
        if differing := expected.keys() ^ found.keys():
            raise misfit(
                self.folder,
                f"the source's {len(expected)} tensors",
                f"{len(found)}, not agreeing in {'.'.join(min(differing))}",
                "report this",
            )
        for key, view in found.items():
            if view.piece.file.name in self.sizes:
                self._compare(".".join(key), expected[key], view)

    def _compare_files(self, source: Path, file: Path) -> None:
        if not filecmp.cmp(source, file, shallow=False):
            self._refuse(file, "the bytes of the source's", "others")

    def _compare(self, name: str, expected: "_View", found: "_View") -> None:
        """Whether two tensors are equal, number by number: INT8 weights, their scales
        row by row, and so every dequantized weight; all else byte by byte."""
        piece, file = expected.piece, found.piece.file
        if piece.nbytes != found.piece.nbytes and prod(expected.shape) == 1:
            piece = replace(piece, repeat=prod(found.shape))
        if (expected.dtype, piece.nbytes) != (found.dtype, found.piece.nbytes):
            what = f"{found.dtype} {list(found.shape)}"
            self._refuse(file, f"{name} {expected.dtype} {list(expected.shape)}", what)
        position = found.piece.start
        for data in _read(piece):
            end = position + len(data)
            if b"".join(_read(Piece(file, position, end))) != data:
                there = f"other numbers between bytes {position} and {end}"
                self._refuse(file, f"{name} as in the source", there)
            self._add(len(data))
            position = end

    def _refuse(self, file: Path, expected: str, found: str) -> None:
        file.unlink()
        raise _differs(file, expected, found)


def _differs(what: Path, expected: str, found: str) -> CheckpointError:
    remedy = (
        "it was changed after it was written, or the disk is bad; run the same "
        "command again: what is wrong is written again"
    )
    return misfit(what, expected, found, remedy)


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor, or one expert's part of a stack."""

    dtype: str
    shape: tuple[int, ...]
    piece: Piece


def _without_companions(
    views: Mapping[tuple[str, str], _View],
) -> dict[tuple[str, str], _View]:
    """Without what lies beside an INT8 weight, but for its scales."""
    int8 = {
        module
        for (module, suffix), view in views.items()
        if suffix == WEIGHT and view.dtype == "I8"
    }
    dropped = [suffix for suffix in COMPANIONS if suffix != SCALE]
    return {
        key: view
        for key, view in views.items()
        if key[0] not in int8 or key[1] not in dropped
    }


def _views(tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, str], _View]:
    """By (module, suffix), every expert on its own, whatever the layout."""
    found: dict[tuple[str, str], _View] = {}
    for each in one_by_one(as_they_are(tensors)).values():
        [piece] = each.pieces
        found[each.module, each.suffix] = _View(each.dtype, each.shape, piece)
    return found


# --- the whole ------------------------------------------------------------------------


def _other_files(source: Path) -> list[Path]:
    """The tokenizer and whatever else lies in the source: not its safetensors, not the
    JSON files that are written anew, and nothing hidden.

    Raises CheckpointError for a link out of the checkpoint, which a stranger's may have
    to any file of this machine. Hugging Face's cache has links to the blobs beside it.
    """
    found = []
    homes = (source, source.parent.parent / "blobs")
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            is_ours = path.parent == source and name in (CONFIG, INDEX)
            is_left_out = is_ours or name.startswith(".") or not path.is_file()
            if is_left_out or path.suffix == ".safetensors":
                continue
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                remedy = "put a copy of the file in its place, or delete the link"
                raise misfit(path, "a file", f"a link to {target}", remedy)
            found.append(path)
    return found


def _fingerprint(plan: Plan, others: Iterable[Path]) -> str:
    """Changes with the plan, and with the size and the time of any file it reads."""
    files = {piece.file for each in plan.tensors.values() for piece in each.pieces}
    stats = {}
    for path in sorted({*files, *others, plan.source / CONFIG}):
        stat = path.stat()
        name = str(path.relative_to(plan.source))
        stats[name] = [stat.st_size, stat.st_mtime_ns]
    tensors = [
        [each.name, each.dtype, each.shape, each.shard]
        + [[p.file.name, p.start, p.end, p.repeat] for p in each.pieces]
        for each in sorted(plan.tensors.values(), key=lambda each: each.name)
    ]
    text = json.dumps([_FORMAT, plan.target, plan.config, stats, tensors])
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _workplace(out: Path, fingerprint: str) -> Generator[Path, None, None]:
    """OUT.partial, with a state file that says whose it is; ours alone meanwhile."""
    folder = out.with_name(f"{out.name}.partial")
    state = folder / "state.json"
    wanted = json.dumps({"format": _FORMAT, "rewrite": fingerprint}) + "\n"
    is_begun = state.exists() or (folder / "checkpoint").exists()
    if folder.exists() and is_begun:
        is_ours = state.is_file() and state.read_text() == wanted
    else:  # nothing, or what was killed before it began
        is_ours = not folder.exists() or all(
            path.name.endswith(".tmp") for path in folder.iterdir()
        )
    if not is_ours:
        raise misfit(
            folder,
            "no such folder, or what is left of this very rewrite",
            "another one's, or the source has changed since",
            "delete it",
        )
    if not is_begun:
        folder.mkdir(parents=True, exist_ok=True)
        with _new_file(state) as stream:
            stream.write(wanted.encode())
    with state.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found, remedy = "another that is still running", "wait for it"
            raise misfit(folder, "one rewrite at a time", found, remedy) from None
        yield folder / "checkpoint"
    shutil.rmtree(folder)


def rewrite(
    source: Path,
    out: Path,
    target: Target | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """Write the checkpoint in `source` to the new folder `out`, laid out as `target`,
    or for None as `default_plan` finds.

    Raises CheckpointError or ValueError, before anything is written, for what
    `make_plan` refuses and for an `out` that exists; and for a disk without room and
    for numbers that are not the source's when they are read back. Then `OUT.partial`
    is kept, and the same call goes on from there.
    """
    source = source.resolve()
    out = out.parent.resolve() / out.name
    if out.exists() or out.is_symlink():
        raise misfit(out, "no such file or folder yet", "it", "name another folder")
    if out.is_relative_to(source) or source.is_relative_to(out):
        remedy = "name a folder beside it"
        raise misfit(out, "a folder outside the source", f"{source}", remedy)
    plan = make_plan(source, target) if target else default_plan(source)
    others = _other_files(source)
    try:
        with _workplace(out, _fingerprint(plan, others)) as folder:
            writer = _Writer(plan, folder, others, progress)
            room = shutil.disk_usage(folder.parent).free
            if writer.left() > room:
                raise misfit(
                    out,
                    f"{writer.left()} bytes of room on the disk",
                    f"{room}",
                    "make room, or name a folder on another disk",
                )
            writer.write()
            writer.verify()
            folder.rename(out)
    except OSError as error:
        raise misfit(
            error.filename or out,
            "a file that can be read, and room and permission to write",
            error.strerror or str(error),
            "see to it and run the same command again: it goes on from there",
        ) from None
    linked = len(plan.linked)
    return Rewritten(out, plan.target, plan.changes, len(writer.sizes), linked)
