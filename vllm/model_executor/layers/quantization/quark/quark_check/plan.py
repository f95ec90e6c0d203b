# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What vLLM does with every module of a checkpoint, over all layers and experts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .known import Known
from .layout import layer_index
from .opened import Checkpoint
from .rules import Config, Entries, is_int8, is_static, part_of
from .weights import (
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    SCALE,
    WEIGHT,
    ZERO_POINT,
    Module,
    Stored,
    expert_of,
    modules_of,
)

# The numbers of a layer and of an expert in a module's name.
_NUMBERED = re.compile(r"((?:^|\.)(?:layers|experts)\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class Treatment:
    """What vLLM makes of one module, and what the checkpoint holds for it.

    reads: INT8, the stored dtype, or nothing for what is not loaded; rule: the part of
    the quantization_config that says so; scheme: the scales; stored: the weight, scale
    and zero points as they lie there.
    """

    reads: str
    rule: str
    scheme: str
    stored: str
    scales: str
    zero_points: str
    fused: bool


@dataclass
class Kind:
    """Modules of one name in all layers and experts, treated alike."""

    name: str
    treatment: Treatment
    modules: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)

    def add(self, name: str) -> None:
        self.modules.append(name)
        if (layer := layer_index(name)) is not None:
            self.layers.add(layer)
        if expert := expert_of(f"{name}."):
            self.experts.add(expert[1])

    @property
    def where(self) -> str:
        """`layers 3-44 x 288 experts`; empty for what is there once."""
        parts = [f"layers {spans(self.layers)}"] if len(self.layers) > 1 else []
        if len(self.layers) == 1:
            parts = [f"layer {min(self.layers)}"]
        if self.experts:
            parts.append(f"{len(self.experts)} experts")
        return " x ".join(parts)


def spans(numbers: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2 and 5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in found)


def scheme_of(layer: Config) -> str:
    """`weights per channel, activations per token` for a layer's INT8 config."""
    weight, inputs = part_of(layer, "weight"), part_of(layer, "input_tensors")
    names = {"per_channel": "per channel", "per_tensor": "per tensor"}
    scheme = str(weight.get("qscheme"))
    weights = f"weights {names.get(scheme, scheme)}"
    if weight.get("symmetric") is False:
        weights += ", asymmetric"
    if not inputs:
        return f"{weights}, activations not quantized"
    if is_static(layer):
        activations = "activations per tensor, static"
    else:
        token = inputs.get("qscheme") == "per_channel"
        activations = f"activations per {'token' if token else 'tensor'}"
    if inputs.get("symmetric") is False:
        activations += ", asymmetric"
    return f"{weights}; {activations}"


def _scale_layout(module: Module) -> str:
    weight, scale = module.get(WEIGHT), module.get(SCALE)
    if scale is None:
        return ""
    stacked = weight is not None and len(weight.shape) == 3
    axes = ["E", "N", "1"] if stacked else ["N", "1"]
    if scale.shape == () or (scale.shape == (1,) and not stacked):
        shape = "scalar"
    elif len(scale.shape) <= len(axes):
        shape = f"[{', '.join(axes[: len(scale.shape)])}]"
    else:
        shape = str(list(scale.shape))
    static = ", input_scale" if INPUT_SCALE in module else ""
    return f"{scale.dtype} {shape}{static}"


def _zero_points(module: Module) -> str:
    named = {ZERO_POINT: "weights", INPUT_ZERO_POINT: "activations"}
    return ", ".join(what for suffix, what in named.items() if suffix in module)


class _Rules:
    """Which part of a quantization_config decides about a module."""

    def __init__(self, known: Known) -> None:
        self.export, config = known.export, known.export.config
        self.overrides = Entries.of(config.get("layer_quant_config"))
        self.by_type = (config.get("layer_type_quant_config") or {}).get("Linear")

    def rule(self, stored: Stored, prefix: str) -> str:
        """With the entry, if that is a pattern; `prefix`: of fused experts."""
        names = stored.names(prefix)
        if (entry := self.export.excluded_by(*names)) is not None:
            return "exclude" if entry in names else f"exclude {entry!r}"
        if stored.is_float and is_int8(self.export.config_of(*names)):
            return "stored as floats"
        for name in names:
            if (entry := self.overrides.match(name)) is not None:
                by_name = "" if entry in names else f" {entry!r}"
                return f"layer_quant_config{by_name}"
        if self.by_type is not None:
            return "layer_type_quant_config 'Linear'"
        return "global_quant_config"


def _treatment(
    known: Known | None, rules: _Rules | None, name: str, module: Module
) -> Treatment:
    weight = module.get(WEIGHT)
    shown = weight or next(iter(module.values()))
    reads, rule, scheme, fused = shown.dtype, "", "", False
    if known is not None and rules is not None and len(shown.shape) > 1:
        structure = known.structure
        if name in known.by_module:
            asked, layer, stored = known.by_module[name]
            fused = asked.kind == "experts"
            rule = rules.rule(stored, asked.prefix if fused else "")
            if layer.config is not None and is_int8(layer.config):
                reads, scheme = "INT8", scheme_of(layer.config)
        elif structure is None or shown.name not in structure.places:
            reads = "not known"
        elif (place := structure.places[shown.name]) is None:
            reads, rule = "nothing", "not taken by the model"
        else:
            rule = f"never quantized: {place.kind}"
    stored_as = f"{shown.dtype} {list(shown.shape)}"
    scales, zero_points = _scale_layout(module), _zero_points(module)
    return Treatment(reads, rule, scheme, stored_as, scales, zero_points, fused)


def make_plan(checkpoint: Checkpoint, known: Known | None) -> list[Kind]:
    """One Kind for all modules that are alike, in the order of the checkpoint."""
    modules = modules_of(checkpoint.tensors.values())
    rules = None if known is None else _Rules(known)
    kinds: dict[tuple[str, Treatment], Kind] = {}
    for name, module in modules.items():
        treatment = _treatment(known, rules, name, module)
        kind_name = _NUMBERED.sub(r"\1*", name)
        kind = kinds.setdefault((kind_name, treatment), Kind(kind_name, treatment))
        kind.add(name)
    return list(kinds.values())


def by_layer(kinds: Iterable[Kind]) -> list[Kind]:
    """The same with one Kind for each layer."""
    split: dict[tuple[int, int | None], Kind] = {}
    for number, kind in enumerate(kinds):
        for name in kind.modules:
            key = number, layer_index(name)
            split.setdefault(key, Kind(kind.name, kind.treatment)).add(name)
    return [split[key] for key in sorted(split, key=lambda key: (key[0], key[1] or 0))]
