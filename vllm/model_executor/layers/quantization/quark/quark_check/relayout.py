# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan of a Quark INT8 checkpoint laid out otherwise, from headers alone.

No number is changed: every tensor of the new checkpoint is put together from bytes of
the old one. The plan is judged by the code that judges a checkpoint before the engine
loads it. rewrite.py writes it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from vllm.model_executor.layers.quantization.quark.checkpoint import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from vllm.model_executor.layers.quantization.quark.export import (
    COMPANIONS,
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    SCALE,
    SCALES,
    WEIGHT,
    Export,
    Layer,
    check_config,
    expert_of,
    must_be_zero,
)
from vllm.model_executor.layers.quantization.quark.layout import MAX_EXPERTS
from vllm.model_executor.layers.quantization.quark.problems import (
    EXPORT_AGAIN,
)
from vllm.model_executor.layers.quantization.quark.quark_check import stored
from vllm.model_executor.layers.quantization.quark.quark_check.architectures import (
    Asked,
)
from vllm.model_executor.layers.quantization.quark.quark_check.known import Known, know
from vllm.model_executor.layers.quantization.quark.quark_check.opened import (
    CONFIG,
    Checkpoint,
    quantization_config,
)
from vllm.model_executor.layers.quantization.quark.quark_check.stock import StockConfig
from vllm.model_executor.layers.quantization.quark.rules import (
    EXPERT_PROJECTIONS,
    Entries,
    has_int8,
    matches,
)

# quark: as it is, with scales [N] or [E, N] and a complete exclude list; stacked and
# per-expert: that, with the experts of a layer in three tensors, or each on its own;
# compressed-tensors: for a vLLM that reads Quark's layout wrong and cannot be patched.
Target = Literal["quark", "stacked", "per-expert", "compressed-tensors"]
TARGETS: tuple[Target, ...] = get_args(Target)

# Models of which vLLM reads experts as three tensors.
STACKED_MODELS = ("Step3p5ForCausalLM",)


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


# --- tensors: the same bytes under other names and shapes -----------------------------


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


def _int8(tensors: Tensors) -> dict[str, Planned]:
    """Module -> its INT8 weight."""
    return {
        each.module: each
        for each in tensors.values()
        if each.suffix == WEIGHT and each.dtype == "I8"
    }


def _without_columns(tensors: Tensors) -> Tensors:
    """Scales and zero points [N, 1] as [N], [E, N, 1] and [E, 1] as [E, N] and [E]."""
    int8 = _int8(tensors)

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


def _as_stacks(tensors: Tensors) -> Tensors:
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


def _without_static_activations(tensors: Tensors) -> Tensors:
    int8, dropped = _int8(tensors), (INPUT_SCALE, INPUT_ZERO_POINT)
    return {
        name: each
        for name, each in tensors.items()
        if each.module not in int8 or each.suffix not in dropped
    }


def _as_compressed_tensors(tensors: Tensors) -> Tensors:
    """Scales [N, 1], of per-tensor ones N times the same; nothing else beside."""
    int8 = _int8(tensors)
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


# --- config.json ----------------------------------------------------------------------


def _with_quantization(
    config: Mapping[str, Any], quantization: dict[str, Any]
) -> dict[str, Any]:
    """config.json with another quantization_config, at the place of the old one."""
    changed = dict(config)
    if changed.get("quantization_config") is not None:
        changed["quantization_config"] = quantization
    else:
        text = {**changed["text_config"], "quantization_config": quantization}
        changed["text_config"] = text
    return changed


def _infos(tensors: Tensors) -> dict[str, TensorInfo]:
    """As the headers of the new files will give them; offsets are of no account."""
    return {
        each.name: TensorInfo(
            each.name, each.dtype, each.shape, Path(each.shard), 0, each.nbytes
        )
        for each in tensors.values()
    }


def _completed_exclude(known: Known, one_by_one: bool) -> list[str]:
    """`exclude` in full names: what its patterns name, what is stored as floats where
    the model asks the config, and vLLM's own names of such layers where a release does
    not find them otherwise; without entries that name nothing. For stacked experts it
    has their own names where they are to be stored one by one."""
    export = known.export
    entries = export.config["exclude"]
    # The problem's name ends with the entry.
    nothing = {each.name for each in export.exclude_without_module()}
    nothing = {e for e in entries if any(n.endswith(f": {e}") for n in nothing)}
    patterns = set(Entries.of(entries).patterns)
    names = [name for name in entries if name not in patterns | nothing]
    for entry in entries:
        if entry in patterns:
            names += [name for name in export.modules if matches(name, entry)]
    layers = [
        (asked, layer)
        for asked, layer in known.layers.values()
        if layer.config is None and all(each.is_float for each in layer.weights)
    ]
    for _, layer in layers:
        names += [each.module for each in layer.weights]
    complete: list[str] = []
    for name in names:
        module = export.modules.get(name, {})
        singles = [part for part, *_ in stored.parts(name, module)]
        complete += singles if one_by_one and singles else [name]
    complete = list(dict.fromkeys(complete))
    structures = [each for row in known.releases.values() for each in row]
    for structure in structures:
        config = StockConfig({**export.config, "exclude": complete}, structure.mappers)
        for asked, layer in layers:
            told = structure.layers.get(asked.prefix)
            if told is None or told.kind != "linear":
                continue
            if config.decide(told).config is not None:
                complete.append(_fused_name(asked, layer))
    return list(dict.fromkeys(complete))


def _fused_name(asked: Asked, layer: Layer) -> str:
    """What vLLM calls a layer, before the model renames it and its parts."""
    parent, last = layer.weights[0].module.rpartition(".")[0], asked.prefix
    return f"{parent}.{last.rpartition('.')[2]}"


def _per_token(quantization: dict[str, Any]) -> bool:
    """Give every INT8 scheme of a config activations of one symmetric scale a token,
    found at run time. Returns whether that changed any."""
    layers = [quantization["global_quant_config"]]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        layers += (quantization.get(key) or {}).values()
    is_changed = False
    wanted = {"dtype": "int8", "is_dynamic": True, "symmetric": True}
    wanted |= {"qscheme": "per_channel", "ch_axis": 1}
    for layer in layers:
        inputs = layer.get("input_tensors")
        if isinstance(inputs, dict) and inputs.get("dtype") == "int8":
            is_changed |= any(inputs.get(key) != value for key, value in wanted.items())
            layer["input_tensors"] = {**inputs, **wanted}
    return is_changed


def _compressed_tensors_config(tensors: Tensors, known: Known) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose INT8 weights have one scale a
    channel. What is stored as floats is ignored by name, and by vLLM's name of what it
    is fused into."""
    floats = {
        each.module
        for each in tensors.values()
        if each.suffix == WEIGHT and each.dtype != "I8" and len(each.shape) > 1
    }
    fused = {
        _fused_name(asked, layer)
        for asked, layer in known.layers.values()
        if asked.kind == "linear" and layer.config is None
    }
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(floats) + sorted(fused - floats),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


# --- the plan -------------------------------------------------------------------------


def make_plan(source: Path, target: Target) -> Plan:
    """What `rewrite` would write, from the headers, the scales and the zero points.

    Raises CheckpointError or ValueError for a source that no rewrite mends, that is no
    Quark INT8 checkpoint, or that is in the target's layout already.
    """
    config = read_json(source / CONFIG, "the config")
    quark = deepcopy(dict(quantization_config(config) or {}))
    if quark.get("quant_method") != "quark" or not has_int8(quark):
        found = repr(quark.get("quant_method", "no quantization_config"))
        remedy = "only Quark's INT8 checkpoints can be rewritten"
        expected = "a quantization_config of Quark's with INT8 weights"
        raise misfit(source / CONFIG, expected, found, remedy)
    check_config(quark)
    found_tensors = read_checkpoint(source)
    if not found_tensors:
        remedy = "give a checkpoint in safetensors"
        raise misfit(source, "*.safetensors", "none", remedy)
    before = as_they_are(found_tensors)
    changes: list[str] = []

    is_compressed = target == "compressed-tensors"
    vectors = _without_columns(before)
    if vectors != before and not is_compressed:
        changes.append("scales and zero points lose a last dimension of 1")
    tensors = vectors
    if target == "stacked":
        _check_stackable(config)
        tensors = _as_stacks(vectors)
    elif target != "quark":
        tensors = one_by_one(vectors)
    if tensors != vectors:
        how = "stacked, [E, N, K]" if target == "stacked" else "stored one by one"
        changes.append(f"the experts of a layer are {how}")
    if is_compressed:
        _check_key_value_cache(source, quark)
        if _per_token(quark):
            changes.append("activations get one scale a token, found at run time")
        tensors = _without_static_activations(tensors)
    exclude = _completed_exclude(
        _known(before, quark, config),
        one_by_one=target in ("per-expert", "compressed-tensors"),
    )
    added = set(exclude) - set(quark["exclude"])
    gone = set(quark["exclude"]) - set(exclude)
    quark["exclude"] = exclude
    planned = _known(tensors, quark, config)
    for problem in planned.problems:
        if problem.kind.severity == "error":
            raise problem.error
    _check_values(planned, tensors)

    if is_compressed:
        tensors = _as_compressed_tensors(tensors)
        quark = _compressed_tensors_config(tensors, planned)
        changes.append("scales are stored as [N, 1], zero points are left out")
        changes.append("config.json says compressed-tensors")
    elif added or gone:
        changes.append(f"exclude gets {len(added)} names and loses {len(gone)} entries")
    if not changes:
        remedy = "load it as it is"
        raise misfit(source, f"something to rewrite as {target}", "nothing", remedy)
    config = _with_quantization(config, quark)
    linked = _unchanged(before, tensors)
    plan = Plan(source, target, tensors, config, tuple(changes), linked)
    for shard, held in plan.shards().items():
        if shard not in linked and (size := len(make_header(held))) > MAX_HEADER_BYTES:
            expected = f"a header of at most {MAX_HEADER_BYTES} bytes"
            remedy = "split the file into shards first"
            raise misfit(source / shard, expected, f"{size}", remedy)
    return plan


def default_plan(source: Path) -> Plan:
    """As `quark` where that mends a checkpoint, else as `compressed-tensors`. Raises
    what `make_plan` raises where neither does."""
    try:
        return make_plan(source, "quark")
    except ValueError:
        return make_plan(source, "compressed-tensors")


def _check_stackable(config: Mapping[str, Any]) -> None:
    models = config.get("architectures")
    if not isinstance(models, list) or not set(map(str, models)) & set(STACKED_MODELS):
        expected = f"a model that vLLM reads stacked experts of: {STACKED_MODELS[0]}"
        raise misfit(CONFIG, expected, str(models), "choose per-expert")


def _check_key_value_cache(source: Path, quark: Mapping[str, Any]) -> None:
    export = quark.get("export") or {}
    if export.get("kv_cache_group") or quark.get("kv_cache_quant_config"):
        expected, found = "no quantized key/value cache", "one"
        remedy = "choose another layout, or export again without it"
        raise misfit(source / CONFIG, expected, found, remedy)


def _known(
    tensors: Tensors, quark: Mapping[str, Any], config: Mapping[str, Any]
) -> Known:
    """What is known of a checkpoint with those tensors."""
    export = Export(_infos(tensors), quark)
    checkpoint = Checkpoint("", export.tensors, config, export)
    known = know(checkpoint)
    if known is None or known.structure is None:
        why = "" if known is None else known.why_not
        remedy = "only checkpoints of models that are known can be rewritten"
        raise misfit(CONFIG, "an architecture that is known", why, remedy)
    return known


def _check_values(planned: Known, tensors: Tensors) -> None:
    """No rewrite mends scales and zero points that the engine refuses."""
    for each in planned.int8:
        for suffix, info in each.stored.companions.items():
            is_scale = suffix in SCALES
            if not is_scale and not must_be_zero(suffix, each.is_experts, each.config):
                continue
            weight = tensors[each.stored.weight.name]
            for piece, of_weight in _beside(tensors[info.name], weight):
                part = TensorInfo(info.name, info.dtype, (), *_place(piece))
                count = 8 * (piece.end - piece.start) // DTYPE_BITS[info.dtype]
                values = stored.read(part, 0, count)
                bad = ~(np.isfinite(values) & (values > 0))
                if is_scale and bad.any():
                    is_finite = suffix == SCALE and np.isfinite(values).all()
                    if is_finite and stored.holds_zeros(*_place(of_weight), bad):
                        continue
                    expected = "scales that are finite, and above zero but for zeros"
                elif not is_scale and values.any():
                    expected = "zero points of 0, which kernels ignore"
                else:
                    continue
                where = f"{info.name} in {piece.file}"
                raise misfit(where, expected, "others", EXPORT_AGAIN)


def _beside(scale: Planned, weight: Planned) -> Iterator[tuple[Piece, Piece]]:
    """The pieces of a scale, each with that of the weight that it belongs to."""
    if len(scale.pieces) == len(weight.pieces):
        yield from zip(scale.pieces, weight.pieces, strict=True)
        return
    for piece in scale.pieces:
        yield piece, weight.pieces[0]


def _place(piece: Piece) -> tuple[Path, int, int]:
    return piece.file, piece.start, piece.end


def _unchanged(before: Tensors, after: Tensors) -> frozenset[str]:
    """Files of which every tensor stays, and to which none is added."""
    old: dict[str, set[Planned]] = defaultdict(set)
    new: dict[str, set[Planned]] = defaultdict(set)
    for found, tensors in ((old, before), (new, after)):
        for each in tensors.values():
            found[each.shard].add(each)
    return frozenset(shard for shard in new if new[shard] == old.get(shard))


# --- the file format ------------------------------------------------------------------


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
