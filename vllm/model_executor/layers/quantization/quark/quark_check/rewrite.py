# SPDX-License-Identifier: Apache-2.0
"""Write a Quark INT8 checkpoint anew, laid out otherwise: `vllm quark-check --fix`.

No number is changed: every tensor of the new checkpoint is put together from bytes of
the old one. First all is planned from the headers, and the plan is judged by the code
that judges a checkpoint before the engine loads it. Then the shards are written, a few
MiB at a time, into `OUT.partial`; shards that stay as they are become hard links. At
last everything is read back and compared with the source, and the folder gets its name.
What was interrupted goes on when it is asked for again.
"""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from vllm.model_executor.layers.quantization.quark.checkpoint import (
    DTYPE_BITS,
    INDEX,
    MAX_HEADER_BYTES,
    CheckpointError,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from vllm.model_executor.layers.quantization.quark.layout import (
    COMPANIONS,
    EXPORT_AGAIN,
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    MAX_EXPERTS,
    SCALE,
    WEIGHT,
    Layout,
    check_config,
    expert_of,
    fused_names,
)
from vllm.model_executor.layers.quantization.quark.quark_check import stored
from vllm.model_executor.layers.quantization.quark.quark_check.plan import (
    CONFIG,
    quantization_config,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    EXPERT_PROJECTIONS,
    has_int8,
)

# quark: as it is, with scales [N] or [E, N] and a complete exclude list; stacked and
# per-expert: that, with the experts of a layer in three tensors, or each on its own;
# compressed-tensors: for a vLLM that reads Quark's layout wrong and cannot be patched.
Target = Literal["quark", "stacked", "per-expert", "compressed-tensors"]
TARGETS: tuple[Target, ...] = get_args(Target)

# Called with the bytes written and verified so far, and those to be in all.
Progress = Callable[[int, int], None]

CHUNK_BYTES = 8 << 20
# Models of which vLLM reads experts as three tensors.
STACKED_MODELS = ("Step3p5ForCausalLM",)
_FORMAT = 1  # of the state file and of what is written


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


@dataclass(frozen=True)
class Rewritten:
    """The new checkpoint's folder, what changed, shards written and shards linked."""

    folder: Path
    changes: tuple[str, ...]
    written: int
    linked: int


# --- tensors: the same bytes under other names and shapes -----------------------------


def _as_they_are(tensors: Mapping[str, TensorInfo]) -> Tensors:
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


def _one_by_one(tensors: Tensors) -> Tensors:
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


def _completed_exclude(layout: Layout, one_by_one: bool) -> list[str]:
    """`exclude` in full names: what its patterns name, what it should name and does
    not, and the fused names of those; without entries that name nothing. For stacked
    experts it has their own names where they are to be stored one by one."""
    names = layout.full_names()
    patterns = set(layout.exclude.patterns)
    nothing, forgotten = set(), []
    for problem in layout.problems():
        if problem.id == "exclude-names-nothing":
            nothing.add(problem.name)
        elif problem.id == "float-not-excluded":
            forgotten.append(problem.name.rpartition(".")[0])
    names = [name for name in names if name not in patterns | nothing] + forgotten
    complete: list[str] = []
    for name in names:
        module = layout.modules.get(name, {})
        singles = [part for part, *_ in stored.parts(name, module)]
        complete += singles if one_by_one and singles else [name]
    return list(dict.fromkeys(complete + fused_names(complete)))


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


def _compressed_tensors_config(tensors: Tensors) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose INT8 weights have one scale a
    channel. What is stored as floats is ignored by name."""
    floats = {
        each.module
        for each in tensors.values()
        if each.suffix == WEIGHT and each.dtype != "I8" and len(each.shape) > 1
    }
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(floats) + fused_names(floats),
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
    before = _as_they_are(found_tensors)
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
        tensors = _one_by_one(vectors)
    if tensors != vectors:
        how = "stacked, [E, N, K]" if target == "stacked" else "stored one by one"
        changes.append(f"the experts of a layer are {how}")
    if is_compressed:
        _check_key_value_cache(source, quark)
        if _per_token(quark):
            changes.append("activations get one scale a token, found at run time")
        tensors = _without_static_activations(tensors)
    exclude = _completed_exclude(
        Layout(_infos(before), quark, config),
        one_by_one=target in ("per-expert", "compressed-tensors"),
    )
    added = set(exclude) - set(quark["exclude"])
    gone = set(quark["exclude"]) - set(exclude)
    quark["exclude"] = exclude
    planned = Layout(_infos(tensors), quark, config)
    planned.check()
    _check_values(planned, tensors)

    if is_compressed:
        tensors = _as_compressed_tensors(tensors)
        quark = _compressed_tensors_config(tensors)
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
        if shard not in linked and (size := len(_header(held))) > MAX_HEADER_BYTES:
            expected = f"a header of at most {MAX_HEADER_BYTES} bytes"
            remedy = "split the file into shards first"
            raise misfit(source / shard, expected, f"{size}", remedy)
    return plan


def default_target(source: Path) -> Target:
    """`quark` where that mends a checkpoint, else `compressed-tensors`. Raises what
    `make_plan` raises where neither does."""
    try:
        make_plan(source, "quark")
    except ValueError:
        make_plan(source, "compressed-tensors")
        return "compressed-tensors"
    return "quark"


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


def _check_values(planned: Layout, tensors: Tensors) -> None:
    """No rewrite mends scales and zero points that the engine refuses."""
    for name, module, _ in planned.int8_modules():
        for suffix, info in module.items():
            is_scale = suffix in (SCALE, INPUT_SCALE)
            if not is_scale and not planned.must_be_zero(name, module, suffix):
                continue
            for piece in tensors[info.name].pieces:
                part = TensorInfo(info.name, info.dtype, (), *_place(piece))
                count = 8 * (piece.end - piece.start) // DTYPE_BITS[info.dtype]
                values = stored.read(part, 0, count)
                if is_scale and not (np.isfinite(values) & (values > 0)).all():
                    expected, found = "scales that are finite and above zero", "others"
                elif not is_scale and values.any():
                    expected, found = "zero points of 0, which kernels ignore", "others"
                else:
                    continue
                raise misfit(
                    f"{info.name} in {piece.file}", expected, found, EXPORT_AGAIN
                )


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


def _header(tensors: Iterable[Planned]) -> bytes:
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
            name: len(_header(self.shards[name]))
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
                    header = _header(tensors)
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
            header, file = _header(self.shards[shard]), self.folder / shard
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
    for each in _one_by_one(_as_they_are(tensors)).values():
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
    source: Path, out: Path, target: Target, progress: Progress | None = None
) -> Rewritten:
    """Write the checkpoint in `source` to the new folder `out`, laid out as `target`.

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
    plan = make_plan(source, target)
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
    return Rewritten(out, plan.changes, len(writer.sizes), linked)
