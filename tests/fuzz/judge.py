# SPDX-License-Identifier: Apache-2.0
"""What a damaged export holds, told from its files alone, not by the loader."""

from typing import Any

import torch
from torch import Tensor

from tests.fuzz.files import CONFIG, INDEX, SIZES, Export, Files, parse, read
from tests.models import step3p5_micro as micro
from tests.models.step3p5_micro import MOE, Share

# Loaded in float32; all else that is not INT8 is bfloat16 in the model.
FLOAT32 = (f"{MOE}.moe.gate.weight", f"{MOE}.moe.router_bias")


def read_folder(files: Files) -> dict[str, Tensor]:
    """All tensors. Raises ValueError where the files contradict each other."""
    shards = {n: data for n, data in files.items() if n.endswith(".safetensors")}
    tensors: dict[str, Tensor] = {}
    places = {}
    for shard, data in shards.items():
        for name, tensor in read(data).items():
            if name in tensors:
                raise ValueError(f"{name} twice")
            tensors[name], places[name] = tensor, shard
    if INDEX in files and parse(files[INDEX]).get("weight_map") != places:
        raise ValueError("the index names other tensors or files")
    return tensors


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the 3-key layout. Raises ValueError where experts do not stack."""
    stacked = dict(tensors)
    for routed in micro.ROUTED:
        prefix, _, projection = routed.rpartition(".")
        for kind in ("weight", "weight_scale", "weight_zero_point"):
            names = [
                f"{prefix}.experts.{expert}.{projection}.{kind}"
                for expert in range(SIZES.experts)
            ]
            experts = [stacked.pop(name) for name in names if name in stacked]
            if not experts:
                continue
            # [N, 1] as [N], which may stand beside it.
            if kind != "weight":
                experts = [e.flatten() if e.shape[1:] == (1,) else e for e in experts]
            alike = {
                (tensor.shape, tensor.dtype.is_floating_point) for tensor in experts
            }
            if len(experts) < SIZES.experts or len(alike) > 1:
                raise ValueError(f"{routed}: experts differ")
            if f"{routed}.{kind}" in stacked:
                raise ValueError(f"{routed}: twice")
            dtype = torch.float64 if kind == "weight_scale" else experts[0].dtype
            stacked[f"{routed}.{kind}"] = torch.stack([e.to(dtype) for e in experts])
    return stacked


def judge(files: Files, export: Export) -> dict[str, Tensor] | None:
    """The values that the model has to hold, or None where the files are no valid
    export of the config."""
    try:
        if parse(files[CONFIG]) != parse(export.files[CONFIG]):
            return None
        tensors = stack(read_folder(files))
    except (KeyError, ValueError, TypeError):
        return None
    for name in [name for name in tensors if name.endswith("weight_zero_point")]:
        weight = name.replace("_zero_point", "")
        if tensors.pop(name).any() or f"{weight}_scale" not in export.stacked:
            return None
    # What is stored as floats without a scale is what it says, in any export.
    floats = {
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and f"{name}_scale" not in tensors
    }
    quantized = {f"{name}_scale" for name in floats} & export.stacked.keys()
    if tensors.keys() != export.stacked.keys() - quantized:
        return None
    for name, tensor in tensors.items():
        wanted = export.stacked[name]
        if name in floats and wanted.dtype == torch.int8:
            wanted = wanted.bfloat16()
        is_scale = name.endswith("_scale")
        shapes = [wanted.shape, (*wanted.shape, 1)] if is_scale else [wanted.shape]
        if tensor.shape not in shapes:
            return None
        if wanted.dtype == torch.int8:
            if tensor.dtype != torch.int8:
                return None
            continue
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            return None
        if is_scale and not (tensor > 0).all():
            return None
        in_float32 = is_scale or name in FLOAT32
        tensors[name] = tensor.to(torch.float32 if in_float32 else torch.bfloat16)
    return micro.expected(tensors, SIZES, Share())


def config_is_valid(files: Files, export: Export) -> bool:
    """Whether config.json, as far as it is not that of the export, may describe these
    tensors: the scheme is INT8, symmetric weights, activations dynamic."""
    try:
        scheme = parse(files[CONFIG])["quantization_config"]
        written = parse(export.files[CONFIG])["quantization_config"]
        weight = scheme["global_quant_config"]["weight"]
        inputs = scheme["global_quant_config"]["input_tensors"]
    except (KeyError, ValueError, TypeError):
        return False
    if not isinstance(weight, dict) or not isinstance(inputs, dict):
        return False

    def same(part: dict[str, Any], kind: str, key: str) -> bool:
        return part.get(key) == written["global_quant_config"][kind][key]

    return (
        scheme.get("quant_method") == written["quant_method"]
        and same(weight, "weight", "dtype")
        and same(weight, "weight", "qscheme")
        and same(inputs, "input_tensors", "dtype")
        and weight.get("symmetric") is not False
        and not weight.get("is_dynamic")
        and bool(inputs.get("is_dynamic"))
    )
