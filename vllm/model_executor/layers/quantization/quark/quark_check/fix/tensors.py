# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors laid out otherwise: the same bytes under other names and shapes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from ..checkpoint import TensorInfo, misfit
from ..layout import MAX_EXPERTS
from ..problems import EXPORT_AGAIN
from ..rules import EXPERT_PROJECTIONS
from ..weights import (
    COMPANIONS,
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    SCALE,
    WEIGHT,
    expert_of,
)
from .planned import Piece, Planned, Tensors


def as_they_are(tensors: Mapping[str, TensorInfo]) -> Tensors:
    return {
        name: Planned(
            name,
            each.dtype,
            each.shape,
            each.file.name,
            (Piece(each.file, each.start, each.end),),
        )
        for name, each in tensors.items()
    }


def int8_weights(tensors: Tensors) -> dict[str, Planned]:
    """Module -> its INT8 weight."""
    return {
        each.module: each
        for each in tensors.values()
        if each.suffix == WEIGHT and each.dtype == "I8"
    }


def without_columns(tensors: Tensors) -> Tensors:
    """Scales and zero points [N, 1] as [N], [E, N, 1] and [E, 1] as [E, N] and [E]."""
    int8 = int8_weights(tensors)

    def change(each: Planned) -> Planned:
        weight = int8.get(each.module)
        if weight is None or each.suffix not in COMPANIONS:
            return each
        if len(each.shape) < 2 or each.shape[-1] != 1:
            return each
        # [E, 1] is one scale an expert, but for experts of one channel.
        if len(each.shape) < len(weight.shape) and weight.shape[-2] == 1:
            return each
        return replace(each, shape=each.shape[:-1])

    return {name: change(each) for name, each in tensors.items()}


def _slice(tensor: Planned, index: int, name: str) -> Planned:
    """One expert's part of a tensor [E, ...] of one piece."""
    [piece] = tensor.pieces
    size = (piece.end - piece.start) // tensor.shape[0]
    start = piece.start + index * size
    part = Piece(piece.file, start, start + size)
    return Planned(name, tensor.dtype, tensor.shape[1:], tensor.shard, (part,))


def one_by_one(tensors: Tensors) -> Tensors:
    """Every expert on its own: `parent.gate_proj` [E, ...] as E tensors
    `parent.experts.<e>.gate_proj`."""
    stacked = {
        each.module: each.shape[0]
        for each in tensors.values()
        if each.suffix == WEIGHT
        and len(each.shape) == 3
        and each.module.rpartition(".")[2] in EXPERT_PROJECTIONS[0]
        and expert_of(each.name) is None
    }
    found: Tensors = {}
    for name, each in tensors.items():
        count = stacked.get(each.module)
        if count is None:
            found[name] = each
            continue
        if each.shape[:1] != (count,) or count > MAX_EXPERTS:
            expected = f"{min(count, MAX_EXPERTS)} experts, as its weight has"
            raise misfit(name, expected, str(list(each.shape)), EXPORT_AGAIN)
        parent, _, last = each.module.rpartition(".")
        for expert in range(count):
            single = f"{parent}.experts.{expert}.{last}.{each.suffix}"
            if single in tensors:
                raise misfit(name, f"no {single} beside it", "one", EXPORT_AGAIN)
            found[single] = _slice(each, expert, single)
    return found


def as_stacks(tensors: Tensors) -> Tensors:
    """The opposite; a stack lies where its first expert lay."""
    found: Tensors = {}
    groups: dict[str, dict[int, Planned]] = defaultdict(dict)
    for name, each in tensors.items():
        expert, last = expert_of(name), each.module.rpartition(".")[2]
        if expert is None or last not in EXPERT_PROJECTIONS[0]:
            found[name] = each
            continue
        parent = expert[0].rpartition(".")[0]
        groups[f"{parent}.{last}.{each.suffix}"][expert[1]] = each
    for name, experts in groups.items():
        order = [experts[index] for index in range(len(experts)) if index in experts]
        if len(order) < len(experts):
            there = f"experts {min(experts)} to {max(experts)} with gaps"
            raise misfit(name, "every expert from 0 on", there, EXPORT_AGAIN)
        first = order[0]
        for each in order:
            if (each.dtype, each.shape) != (first.dtype, first.shape):
                expected = f"{first.dtype} {list(first.shape)}, as {first.name} is"
                there = f"{each.dtype} {list(each.shape)}"
                raise misfit(each.name, expected, there, EXPORT_AGAIN)
        pieces = tuple(piece for each in order for piece in each.pieces)
        shape = (len(order), *first.shape)
        found[name] = Planned(name, first.dtype, shape, first.shard, pieces)
    return found


def without_static_activations(tensors: Tensors) -> Tensors:
    int8, dropped = int8_weights(tensors), (INPUT_SCALE, INPUT_ZERO_POINT)
    return {
        name: each
        for name, each in tensors.items()
        if each.module not in int8 or each.suffix not in dropped
    }


def as_compressed_tensors(tensors: Tensors) -> Tensors:
    """Scales [N, 1], of per-tensor ones N times the same; nothing else beside."""
    int8 = int8_weights(tensors)
    found: Tensors = {}
    for name, each in tensors.items():
        weight = int8.get(each.module)
        if weight is None or each.suffix not in COMPANIONS:
            found[name] = each
        elif each.suffix == SCALE:
            channels = weight.shape[-2]
            pieces = each.pieces
            if prod(each.shape) == 1:
                [piece] = pieces
                pieces = (replace(piece, repeat=channels),)
            found[name] = replace(each, shape=(channels, 1), pieces=pieces)
    return found
