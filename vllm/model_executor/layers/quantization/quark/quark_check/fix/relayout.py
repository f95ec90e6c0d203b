# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan of a Quark INT8 checkpoint laid out otherwise, from headers alone.

No number is changed: every tensor of the new checkpoint is put together from bytes of
the old one. The plan is judged by the code that judges a checkpoint before the engine
loads it. rewrite.py writes it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from .. import stored
from ..checkpoint import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from ..config import check_config
from ..export import Export
from ..known import Known, know
from ..opened import CONFIG, Checkpoint, quantization_config
from ..problems import EXPORT_AGAIN
from ..rules import has_int8
from ..weights import SCALE, SCALES, must_be_zero
from .new_config import (
    completed_exclude,
    compressed_tensors_config,
    per_token,
    with_quantization,
)
from .planned import Piece, Plan, Planned, Target, Tensors, make_header
from .tensors import (
    as_compressed_tensors,
    as_stacks,
    as_they_are,
    one_by_one,
    without_columns,
    without_static_activations,
)

# Models of which vLLM reads experts as three tensors.
STACKED_MODELS = ("Step3p5ForCausalLM",)


def _infos(tensors: Tensors) -> dict[str, TensorInfo]:
    """As the headers of the new files will give them; offsets are of no account."""
    return {
        each.name: TensorInfo(
            each.name, each.dtype, each.shape, Path(each.shard), 0, each.nbytes
        )
        for each in tensors.values()
    }


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
    vectors = without_columns(before)
    if vectors != before and not is_compressed:
        changes.append("scales and zero points lose a last dimension of 1")
    tensors = vectors
    if target == "stacked":
        _check_stackable(config)
        tensors = as_stacks(vectors)
    elif target != "quark":
        tensors = one_by_one(vectors)
    if tensors != vectors:
        how = "stacked, [E, N, K]" if target == "stacked" else "stored one by one"
        changes.append(f"the experts of a layer are {how}")
    if is_compressed:
        _check_key_value_cache(source, quark)
        if per_token(quark):
            changes.append("activations get one scale a token, found at run time")
        tensors = without_static_activations(tensors)
    exclude = completed_exclude(
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
        tensors = as_compressed_tensors(tensors)
        quark = compressed_tensors_config(tensors, planned)
        changes.append("scales are stored as [N, 1], zero points are left out")
        changes.append("config.json says compressed-tensors")
    elif added or gone:
        changes.append(f"exclude gets {len(added)} names and loses {len(gone)} entries")
    if not changes:
        remedy = "load it as it is"
        raise misfit(source, f"something to rewrite as {target}", "nothing", remedy)
    config = with_quantization(config, quark)
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
