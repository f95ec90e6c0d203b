# SPDX-License-Identifier: Apache-2.0
"""Small Quark INT8 exports as the bytes of their files, read and written without the
safetensors library: what is to be judged does not judge itself."""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import step3p5_micro as micro
from tests.models.step3p5_micro import Sizes

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/step3p5-tiny"
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SIZES = Sizes(hidden=16, width=8, experts=3, heads=2, groups=2, head=32, vocab=64)
DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Files = dict[str, bytes]


@dataclass(frozen=True)
class Export:
    """An undamaged export: its files, and its tensors in the 3-key layout."""

    files: Files
    stacked: dict[str, Tensor]


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object without a key twice. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    parsed = json.loads(text.decode(), object_pairs_hook=unique)
    if not isinstance(parsed, dict):
        raise ValueError("no object")
    return parsed


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file. Raises ValueError."""
    if len(data) < 8:
        raise ValueError("cut off")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ValueError("cut off")
    return parse(data[8 : 8 + length]), data[8 + length :]


def pack(header: dict[str, Any] | bytes, payload: bytes) -> bytes:
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + payload


def read(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError where it breaks the format:
    an entry of another form, a gap, an overlap, a tensor cut off."""
    header, payload = unpack(data)
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
            if begin != position or not begin <= end <= len(payload):
                raise ValueError(f"{name}: no place of its own")
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"{name}: no shape")
            raw = torch.tensor(list(payload[begin:end]), dtype=torch.uint8)
            tensors[name] = raw.view(dtype).reshape(shape)
            position = end
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if position != len(payload):
        raise ValueError("bytes of no tensor")
    return tensors


def write(tensors: dict[str, Tensor]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(payload), len(payload) + len(raw)],
        }
        payload += raw
    return pack(header, payload)


def make_index(shards: Mapping[str, Iterable[str]]) -> bytes:
    """The index of shards' tensor names."""
    places = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    return json.dumps(index, indent=1).encode()


def make_export(stacked: bool, exclude_shared: bool, seed: int) -> Export:
    """3-key in a file, or each expert on its own in three shards with an index."""
    exclude = micro.NEVER_INT8 + (micro.SHARED if exclude_shared else ())
    tensors = micro.export(SIZES, exclude, torch.Generator().manual_seed(seed))
    # As amd-quark writes it, but for what this model excludes.
    written = json.loads((FIXTURES / "int8-3key" / CONFIG).read_text())
    quark = written["quantization_config"] | {"exclude": list(exclude)}
    files = {CONFIG: json.dumps(micro.config(SIZES, quark), indent=1).encode()}
    if stacked:
        files["model.safetensors"] = write(tensors)
        return Export(files, tensors)
    every = list(micro.one_by_one(tensors))
    shards = {
        f"model-{number:05}-of-00003.safetensors": dict(every[number - 1 :: 3])
        for number in (1, 2, 3)
    }
    files |= {name: write(shard) for name, shard in shards.items()}
    files[INDEX] = make_index(shards)
    return Export(files, tensors)


EXPORTS = [
    make_export(stacked, exclude_shared, seed=index)
    for index, (stacked, exclude_shared) in enumerate(
        [(True, True), (False, True), (True, False), (False, False)]
    )
]
