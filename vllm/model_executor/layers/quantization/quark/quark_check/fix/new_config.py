# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The config.json of a checkpoint laid out otherwise."""

from collections.abc import Mapping
from typing import Any

from .. import stored
from ..architectures import Asked
from ..export import Layer
from ..known import Known
from ..rules import Entries, matches
from ..stock import StockConfig
from ..weights import WEIGHT
from .planned import Tensors


def with_quantization(
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


def completed_exclude(known: Known, one_by_one: bool) -> list[str]:
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
    told_by = [(row, each) for row, told in known.releases.items() for each in told]
    for name, structure in told_by:
        row, now = known.scope.row(name), {**export.config, "exclude": complete}
        config = StockConfig(now, row, structure.mappers)
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


def per_token(quantization: dict[str, Any]) -> bool:
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


def compressed_tensors_config(tensors: Tensors, known: Known) -> dict[str, Any]:
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
