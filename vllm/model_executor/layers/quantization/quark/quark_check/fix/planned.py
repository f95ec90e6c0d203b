# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is to be written: tensors put together from bytes of others, and a header."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoint import DTYPE_BITS

# quark: as it is, with scales [N] or [E, N] and a complete exclude list; stacked and
# per-expert: that, with the experts of a layer in three tensors, or each on its own;
# compressed-tensors: for a vLLM that reads Quark's layout wrong and cannot be patched.
Target = Literal["quark", "stacked", "per-expert", "compressed-tensors"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes start to end of a tensor's file, `repeat` times over."""

    file: Path
    start: int
    end: int
    repeat: int = 1

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.repeat


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written to the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2]


Tensors = dict[str, Planned]


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    tensors: by name; config: config.json; changes: what differs from the source, a
    sentence each; linked: shards that stay as they are.
    """

    source: Path
    target: Target
    tensors: Tensors
    config: dict[str, Any]
    changes: tuple[str, ...]
    linked: frozenset[str]

    def shards(self) -> dict[str, list[Planned]]:
        """The tensors of each file, in the order in which they lie in it."""
        found: dict[str, list[Planned]] = defaultdict(list)
        # As safetensors has it: large elements first, so that all are aligned.
        for tensor in sorted(
            self.tensors.values(), key=lambda each: (-DTYPE_BITS[each.dtype], each.name)
        ):
            found[tensor.shard].append(tensor)
        return dict(sorted(found.items()))


def make_header(tensors: Iterable[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for each in tensors:
        offsets = [position, position + each.nbytes]
        position = offsets[1]
        header[each.name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
