# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What judges the built model: do the files fit its layers, and are the numbers of
scales and zero points good?"""

from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.model_executor.layers.fused_moe.quark_int8_compat import (
    ExpertsLayer,
    num_logical_experts,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    TensorInfo,
)
from vllm.model_executor.layers.quantization.quark.quark_check.export import Layer
from vllm.model_executor.layers.quantization.quark.quark_check.problems import (
    Problem,
    of_tensor,
)
from vllm.model_executor.layers.quantization.quark.quark_check.weights import (
    SCALES,
    ZERO_POINT,
    Stored,
    expert_of,
    must_be_zero,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.quark.load_checks.checks import Checks


def layers(
    model: nn.Module, checks: "Checks"
) -> Generator[tuple[str, Any, Layer], None, None]:
    """The layers of a model that the files hold weights for, INT8 ones and floats."""
    export = checks.export
    if export is None:
        return
    for prefix, module in model.named_modules():
        # A layer knows the name under which it asked.
        asked = getattr(module, "prefix", getattr(module, "layer_name", prefix))
        found = export.asked(asked) or export.asked(prefix)
        if found is None or _weight_of(module) is None:
            continue  # such as a runner, of the name of the experts that it holds
        if holds_int8(module) == (found.config is not None):
            yield prefix, module, found


def _weight_of(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, or the first of a layer of experts."""
    for name in ("weight", "w13_weight"):
        if isinstance(weight := getattr(module, name, None), torch.Tensor):
            return weight
    return None


def holds_int8(module: nn.Module) -> bool:
    """Whether a linear layer, or a layer of experts, holds INT8 weights."""
    weight = _weight_of(module)
    return weight is not None and weight.dtype == torch.int8


def check_shapes(model: nn.Module, checks: "Checks") -> None:
    """Compare the shapes of weights with those of the layers that take them: a loader
    cuts its share out of a larger tensor without a word."""
    for prefix, module, layer in layers(model, checks):
        if isinstance(module, ExpertsLayer):
            expected = [_expert_shapes(module, layer)] * len(layer.weights)
        else:
            expected = _linear_shapes(module, len(layer.weights))
        for stored, shapes in zip(layer.weights, expected, strict=False):
            shape = stored.weight.shape[-2:]
            if shape in shapes or (layer.config is None and _may_fit(shape, shapes)):
                continue
            wanted = " or ".join(str(list(each)) for each in sorted(shapes))
            found = f"{stored.weight.dtype} {list(stored.weight.shape)}"
            kind = "floats" if layer.config is None else "I8"
            expected_there = f"{kind} {wanted} for {prefix}"
            checks.report(
                of_tensor("weight-misshapen", stored.weight, expected_there, found)
            )


def _may_fit(shape: tuple[int, ...], shapes: set[tuple[int, ...]]) -> bool:
    """Whether a float weight may become one of these: models turn some around, or fill
    them up. What is larger either way would be cut."""
    return any(
        all(size <= limit for size, limit in zip(one, wanted, strict=True))
        for one in (shape, shape[::-1])
        for wanted in shapes
    )


def _linear_shapes(module: Any, count: int) -> list[set[tuple[int, ...]]]:
    """The shape [N, K] of each of the `count` weights of a linear layer in the
    checkpoint; empty where the layer is made of other parts, or its model has given the
    weight another shape, as that of a convolution."""
    if module.weight.ndim != 2:
        return []
    if hasattr(module, "total_num_kv_heads"):
        key = module.total_num_kv_heads * module.head_size
        value = module.total_num_kv_heads * getattr(
            module, "v_head_size", module.head_size
        )
        sizes = [module.total_num_heads * module.head_size, key, value]
    else:
        sizes = list(getattr(module, "output_sizes", [module.output_size]))
    if count == 1:
        sizes = [sum(sizes)]
    if len(sizes) != count:
        return []
    return [{(size, module.input_size)} for size in sizes]


def _expert_shapes(module: Any, layer: Layer) -> set[Any]:
    """The shapes [N, K] that the weights of an expert have in the checkpoint: gate, up
    and down, or gate and up as one."""
    width = (
        module.moe_config.intermediate_size_per_partition_unpadded
        * module.moe_config.tp_size
    )
    hidden = module.moe_config.hidden_dim_unpadded
    shapes = {(hidden, width), (width, hidden)}
    names = (stored.weight.name.removesuffix(".weight") for stored in layer.weights)
    is_whole = len({name.rpartition(".")[2] for name in names}) == 3
    return shapes if is_whole else shapes | {(2 * width, hidden)}


def count_problem(prefix: str, module: ExpertsLayer, layer: Layer) -> Problem | None:
    """Whether an expert of the model is missing: found before memory is taken for as
    many as config.json claims."""
    count = num_logical_experts(module)
    if count is None:
        return None
    held: set[int] = set()
    for stored in layer.weights:
        if expert := expert_of(f"{stored.module}."):
            held.add(expert[1])
        elif len(stored.weight.shape) == 3:
            num_stacked = stored.weight.shape[0]
            if num_stacked < count:
                return _missing(prefix, count, num_stacked, num_stacked)
    missing = next((each for each in range(count) if each not in held), None)
    if not held or missing is None:
        return None
    return _missing(prefix, count, sum(each < count for each in held), missing)


def _missing(prefix: str, count: int, found: int, missing: int) -> Problem:
    expected = f"experts 0 to {count - 1}, as config.json has it"
    return Problem(
        "experts-miscounted", prefix, expected, f"{found}: {missing} is missing"
    )


def check_values(model: nn.Module, checks: "Checks") -> None:
    """Scales are finite and above zero, ignored zero points are zero."""
    by_file: dict[Path, list[tuple[Stored, TensorInfo, str, bool]]] = defaultdict(list)
    for _, module, layer in layers(model, checks):
        if layer.config is None:
            continue
        is_experts = isinstance(module, ExpertsLayer)
        for stored in layer.weights:
            for suffix, tensor in stored.companions.items():
                if suffix in SCALES or must_be_zero(suffix, is_experts, layer.config):
                    place = stored, tensor, suffix, is_experts
                    by_file[tensor.file].append(place)
    for file, found in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for stored, tensor, suffix, is_experts in found:
                values = stream.get_tensor(tensor.name)
                if suffix in SCALES:
                    problem = scale_problem(stored, tensor, values)
                else:
                    problem = _zero_point_problem(tensor, suffix, values, is_experts)
                if problem:
                    checks.report(problem)


def scale_problem(
    stored: Stored, tensor: TensorInfo, values: torch.Tensor
) -> Problem | None:
    """What is wrong with the numbers of a scale: [], [N], [N, 1] or with [E] before."""
    values = values.float()
    good = torch.isfinite(values) & (values > 0)
    if good.all():
        return None
    bad = ~good
    if torch.isfinite(values).all() and _holds_zeros(stored.weight, bad):
        found = f"{int(bad.sum())} of {bad.numel()}"
        return of_tensor("zero-channels", tensor, "scales above zero", found)
    where = bad.nonzero()[0].tolist()
    value = values[tuple(where)].item()
    return of_tensor(
        "scale-not-positive",
        tensor,
        "scales that are finite and above zero, but for channels of zeros",
        f"{value} at {where}, {int(bad.sum())} of {bad.numel()} such",
    )


def _holds_zeros(weight: TensorInfo, bad: torch.Tensor) -> bool:
    """Whether all channels of a weight are zeros whose scale is marked in `bad`."""
    with safe_open(weight.file, framework="pt") as stream:
        values = stream.get_tensor(weight.name)
    if bad.ndim and bad.shape[-1] == 1 and bad.ndim == values.ndim:
        bad = bad.squeeze(-1)
    if bad.numel() == 1:
        return not values.count_nonzero()
    return not values[bad].count_nonzero()


def _zero_point_problem(
    tensor: TensorInfo, suffix: str, values: torch.Tensor, is_experts: bool
) -> Problem | None:
    if not values.count_nonzero():
        return None
    what = "weights" if suffix == ZERO_POINT else "activations"
    of = "experts" if is_experts else "linear layers"
    where = values.nonzero()[0].tolist()
    return of_tensor(
        "zero-point-not-zero",
        tensor,
        f"zero points of 0: INT8 kernels ignore those of {what} of {of}",
        f"{int(values[tuple(where)])} at {where}",
    )
