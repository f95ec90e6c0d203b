# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a folder of safetensors files holds, from its index and headers alone.

The format, as safetensors documents it: eight bytes with the
length of the header, the header in JSON, the tensors' bytes without a gap.

Needs Python alone and reads a few KB a file. Whatever does not add up is a
CheckpointError that names the file, what was expected and what was found.
"""

import codecs
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

INDEX = "model.safetensors.index.json"
# safetensors' own limit.
MAX_HEADER_BYTES = 100_000_000
# Bounds for files from strangers, far beyond any real model.
MAX_JSON_BYTES = 200_000_000
MAX_TENSORS = 500_000
MAX_JSON_VALUES = 16 * MAX_TENSORS
MAX_RANK, MAX_SIZE = 32, 1 << 63
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
# Read at a time to compare two tensors.
_COMPARED_BYTES = 1 << 20
DOWNLOAD_AGAIN = "download or copy the file again"
_NUMBERED = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read right."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a file's header gives it; `start` and `end` are offsets there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file.name}"


def misfit(what: object, expected: str, found: str, remedy: str) -> CheckpointError:
    """The error for a file, a tensor or a parameter that is not what it should be."""
    return CheckpointError(f"{what}: expected {expected}, found {found}; {remedy}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r:.200} twice")
            seen.add(name)
    return found


def check_byte_order_mark(file: Path, text: bytes) -> None:
    """Raise CheckpointError for JSON behind a byte order mark, as some editors write
    it: no reader of a checkpoint takes it."""
    if text.startswith(codecs.BOM_UTF8):
        expected = "JSON from the first byte on"
        remedy = "save it as UTF-8 without the mark: sed -i '1s/^\\xEF\\xBB\\xBF//'"
        found = "a byte order mark before it (EF BB BF)"
        raise misfit(file, expected, found, f"{remedy} {file.name}")


def check_config_file(model: str) -> None:
    """`check_byte_order_mark` for the config.json of a model on disk, which
    transformers calls no JSON without saying why."""
    file = Path(model) / "config.json"
    if file.is_file():
        with file.open("rb") as stream:
            check_byte_order_mark(file, stream.read(len(codecs.BOM_UTF8)))


def parse_json(
    file: Path, text: bytes, what: str, unique: bool = True
) -> dict[str, Any]:
    """A JSON object; `unique`: without a key twice, else the last counts. Raises
    CheckpointError, also for one that would take memory out of all proportion to a
    checkpoint's."""
    check_byte_order_mark(file, text)
    values = sum(text.count(mark) for mark in (b"{", b"[", b","))
    if values > MAX_JSON_VALUES:
        expected = f"{what} of at most {MAX_JSON_VALUES} values"
        raise misfit(file, expected, str(values), DOWNLOAD_AGAIN)
    try:
        hook = _no_duplicates if unique else None
        parsed = json.loads(text.decode(), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise misfit(file, f"{what} in JSON", str(error), DOWNLOAD_AGAIN) from None
    if not isinstance(parsed, dict):
        found = type(parsed).__name__
        raise misfit(file, f"{what} as a JSON object", found, DOWNLOAD_AGAIN)
    return parsed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_counts(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_RANK
        and all(_is_count(item) and item < MAX_SIZE for item in value)
    )


def _read_entry(
    file: Path, name: str, entry: object, data: int, size: int
) -> TensorInfo:
    """One tensor's entry; its offsets count from `data`, the file ends at `size`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        expected = f"dtype, shape and data_offsets of {name!r}"
        raise misfit(file, expected, f"{entry!r:.200}", DOWNLOAD_AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise misfit(
            file, f"a dtype of safetensors for {name!r}", repr(dtype), DOWNLOAD_AGAIN
        )
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        expected = f"shape and data_offsets of {name!r} in whole numbers"
        raise misfit(
            file, expected, f"{shape!r:.100}, {offsets!r:.100}", DOWNLOAD_AGAIN
        )
    start, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if end < start or bits % 8 or end - start != bits // 8:
        expected = f"{bits / 8:g} bytes for {name!r}, {dtype} {shape}"
        raise misfit(file, expected, f"data_offsets {offsets}", DOWNLOAD_AGAIN)
    if data + end > size:
        expected = f"{data + end} bytes or more, where {name!r} ends"
        raise misfit(file, expected, f"{size} bytes: it is cut off", DOWNLOAD_AGAIN)
    return TensorInfo(name, dtype, tuple(shape), file, data + start, data + end)


class Files(Protocol):
    """The files of a checkpoint's folder, wherever it is. May raise OSError."""

    def sizes(self) -> Mapping[str, int]:
        """Name -> bytes of every regular file right in the folder."""
        ...

    def read(self, name: str, start: int, count: int) -> bytes:
        """Up to `count` bytes of a file from `start` on."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """The files of a folder here."""

    folder: Path

    def sizes(self) -> dict[str, int]:
        files = (path for path in self.folder.iterdir() if path.is_file())
        return {path.name: path.stat().st_size for path in files}

    def read(self, name: str, start: int, count: int) -> bytes:
        with (self.folder / name).open("rb") as stream:
            # No more than there is: room for `count` bytes is made at once.
            count = min(count, os.fstat(stream.fileno()).st_size - start)
            stream.seek(start)
            return stream.read(max(count, 0))


def _read_header(file: Path, size: int, files: Files) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name. Raises CheckpointError."""
    try:
        length = int.from_bytes(files.read(file.name, 0, 8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            found = f"{size} bytes, a header of {length}" if size >= 8 else f"{size}"
            expected = "a safetensors file: 8 bytes and its whole header"
            raise misfit(file, expected, found, DOWNLOAD_AGAIN)
        header = parse_json(file, files.read(file.name, 8, length), "the header")
    except OSError as error:
        raise misfit(file, "a readable file", str(error), DOWNLOAD_AGAIN) from None
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        expected = "__metadata__ of texts in the header"
        raise misfit(file, expected, f"{metadata!r:.100}", DOWNLOAD_AGAIN)
    if len(header) > MAX_TENSORS:
        expected = f"at most {MAX_TENSORS} tensors"
        raise misfit(file, expected, str(len(header)), DOWNLOAD_AGAIN)
    data = 8 + length
    tensors = {
        name: _read_entry(file, name, entry, data, size)
        for name, entry in header.items()
    }
    position, before = data, "the header"
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.end)):
        if tensor.start != position:
            expected = f"{tensor.name!r} at {position}, after {before}"
            raise misfit(file, expected, f"{tensor.start}", DOWNLOAD_AGAIN)
        position, before = tensor.end, repr(tensor.name)
    if position != size:
        raise misfit(
            file, f"{position} bytes, after {before}", f"{size}", DOWNLOAD_AGAIN
        )
    return tensors


def read_json(
    file: Path, what: str, files: Files | None = None, unique: bool = True
) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, as `parse_json` has it."""
    files = files or LocalFiles(file.parent)
    try:
        # One byte more than may be, to tell.
        text = files.read(file.name, 0, MAX_JSON_BYTES + 1)
    except OSError as error:
        raise misfit(file, "a readable file", str(error), DOWNLOAD_AGAIN) from None
    if len(text) > MAX_JSON_BYTES:
        expected = f"{what} of at most {MAX_JSON_BYTES} bytes"
        raise misfit(file, expected, "more", DOWNLOAD_AGAIN)
    return parse_json(file, text, what, unique)


def read_index(file: Path, files: Files | None = None) -> dict[str, str]:
    """An index's weight_map: tensor name -> file name. Raises CheckpointError."""
    weight_map = read_json(file, "the index", files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise misfit(file, "a weight_map", f"{weight_map!r:.100}", DOWNLOAD_AGAIN)
    known: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in known:
            continue
        plain = (
            isinstance(shard, str) and Path(shard).name == shard and "\0" not in shard
        )
        if plain and shard.endswith(".safetensors"):
            known.add(shard)
        else:
            expected = f"the name of a safetensors file beside it for {name!r}"
            raise misfit(file, expected, f"{shard!r:.200}", DOWNLOAD_AGAIN)
    return weight_map


def _check_numbering(folder: Path, names: list[str]) -> None:
    """Without an index, names of the form x-00001-of-00003 say what is missing."""
    have = set(names)
    for each in names:
        if found := _NUMBERED.match(each.removesuffix(".safetensors")):
            stem, count = found["stem"], int(found["count"])
            for number in range(1, count + 1):
                name = f"{stem}-{number:05}-of-{count:05}.safetensors"
                if name not in have:
                    expected = f"{count} shards, since there is {each}"
                    raise misfit(folder, expected, f"no {name}", "download it")
            return


def _check_same(
    first: TensorInfo, second: TensorInfo, chosen: str | None, files: Files
) -> None:
    """Raise CheckpointError for a tensor that two files hold, with different bytes:
    vLLM reads both files, and the later one would count."""
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    size = first.end - first.start
    for at in range(0, size if same else 0, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, size - at)
        parts = (
            files.read(each.file.name, each.start + at, count)
            for each in (first, second)
        )
        if len(set(parts)) > 1:
            same = False
            break
    if same:
        return
    held = f"{first.name!r} the same in {first.file.name} and {second.file.name}"
    by_index = f", of which {INDEX} names {chosen}" if chosen else ""
    remedy = "write the checkpoint anew with each tensor once, or download it again"
    found = f"other bytes{by_index}; both files are read, and the later would count"
    raise misfit(second.file, held, found, remedy)


def read_checkpoint(folder: Path, files: Files | None = None) -> dict[str, TensorInfo]:
    """All tensors that vLLM would read from a folder, by name.

    Those of the files that model.safetensors.index.json lists; without it, those of all
    *.safetensors. Empty where the folder holds no safetensors. Raises CheckpointError
    for a damaged file, a missing shard, or an index and files that disagree.
    """
    files = files or LocalFiles(folder)
    try:
        sizes = files.sizes()
    except OSError as error:
        raise misfit(folder, "a readable folder", str(error), DOWNLOAD_AGAIN) from None
    index = folder / INDEX
    weight_map = read_index(index, files) if INDEX in sizes else {}
    if weight_map:
        names = sorted(set(weight_map.values()))
        for name in names:
            if name not in sizes:
                expected = f"{name}, which {INDEX} lists"
                raise misfit(folder, expected, "none", "download it")
    else:
        names = sorted(name for name in sizes if name.endswith(".safetensors"))
        _check_numbering(folder, names)
    tensors: dict[str, TensorInfo] = {}
    for shard in names:
        file = folder / shard
        for name, tensor in _read_header(file, sizes[shard], files).items():
            if name in tensors:
                chosen = weight_map.get(name)
                _check_same(tensors[name], tensor, chosen, files)
                if chosen != shard:
                    continue
            tensors[name] = tensor
        if len(tensors) > MAX_TENSORS:
            expected = f"at most {MAX_TENSORS} tensors"
            raise misfit(folder, expected, f"{len(tensors)}", DOWNLOAD_AGAIN)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            there = (
                f"it in {tensors[name].file.name}" if name in tensors else "it nowhere"
            )
            raise misfit(
                index, f"{name!r} in {shard}, as it says", there, DOWNLOAD_AGAIN
            )
    return tensors
