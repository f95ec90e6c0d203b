# SPDX-License-Identifier: Apache-2.0
"""What vLLM does with every module of a checkpoint, by the code that decides it there.

rules.py and layout.py decide; this collapses their answers over layers and experts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.quantization.quark.checkpoint import (
    INDEX,
    Files,
    LocalFiles,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from vllm.model_executor.layers.quantization.quark.export import (
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    SCALE,
    WEIGHT,
    ZERO_POINT,
    Module,
    check_config,
    expert_of,
    modules_of,
)
from vllm.model_executor.layers.quantization.quark.layout import (
    Layout,
    first_value,
    layer_index,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    Config,
    has_int8,
    is_static,
    part_of,
)

CONFIG = "config.json"
# The numbers of a layer and of an expert in a module's name.
_NUMBERED = re.compile(r"((?:^|\.)(?:layers|experts)\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its config, index and headers show it.

    layout is None where no INT8 of Quark's is asked for; problem says why not where
    the quantization_config is one that vLLM cannot read.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    model: Mapping[str, Any]
    layout: Layout | None
    problem: ValueError | None = None

    @property
    def architecture(self) -> str:
        names = self.model.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return first if isinstance(first, str) else "unknown architecture"

    @property
    def num_bytes(self) -> int:
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @property
    def num_files(self) -> int:
        return len({tensor.file for tensor in self.tensors.values()})


def quantization_config(model: Mapping[str, Any]) -> Config | None:
    """The quantization_config of a config.json, or of its text_config."""
    found = first_value(model, "quantization_config")
    return found if isinstance(found, dict) else None


def open_checkpoint(folder: Path, files: Files | None = None) -> Checkpoint:
    """Read config.json, the index and the headers. Raises CheckpointError."""
    files = files or LocalFiles(folder)
    try:
        names = files.sizes()
    except OSError as error:
        remedy = "give the folder of a checkpoint, or owner/name on Hugging Face"
        raise misfit(folder, "a readable folder", str(error), remedy) from None
    if CONFIG not in names:
        remedy = "give the folder of a checkpoint as Hugging Face has it"
        raise misfit(folder, f"{CONFIG} in it", "none", remedy)
    model = read_json(folder / CONFIG, "the config", files)
    tensors = read_checkpoint(folder, files)
    if not tensors:
        expected = f"{INDEX} or *.safetensors in it"
        raise misfit(folder, expected, "neither", "download the weights as well")
    name = folder.resolve().name if isinstance(files, LocalFiles) else str(folder)
    config = quantization_config(model)
    if config is None or config.get("quant_method") != "quark":
        return Checkpoint(name, tensors, model, None)
    try:
        check_config(config)
        layout = Layout(tensors, config, model) if has_int8(config) else None
    except ValueError as error:
        return Checkpoint(name, tensors, model, None, error)
    return Checkpoint(name, tensors, model, layout)


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


def _treatment(layout: Layout | None, name: str, module: Module) -> Treatment:
    weight = module.get(WEIGHT)
    shown = weight or next(iter(module.values()))
    reads, rule, scheme, fused = shown.dtype, "", "", False
    if layout is not None and weight is not None and len(weight.shape) > 1:
        prefix = layout.experts_prefix(name, module)
        fused = prefix is not None
        if not layout.is_loaded(name):
            reads, rule = "nothing", "after the last layer"
        else:
            layer = layout.layer_config(name, module)
            rule = layout.rule(name, module)
            is_read = name.rpartition(".")[2] in layout.linear_names
            if layer is not None and (weight.dtype == "I8" or is_read):
                reads, scheme = "INT8", scheme_of(layer)
            elif layer is not None:
                rule = "not a linear layer"
    stored = f"{shown.dtype} {list(shown.shape)}"
    scales, zero_points = _scale_layout(module), _zero_points(module)
    return Treatment(reads, rule, scheme, stored, scales, zero_points, fused)


def make_plan(checkpoint: Checkpoint) -> list[Kind]:
    """One Kind for all modules that are alike, in the order of the checkpoint."""
    layout = checkpoint.layout
    modules = layout.modules if layout else modules_of(checkpoint.tensors.values())
    kinds: dict[tuple[str, Treatment], Kind] = {}
    for name, module in modules.items():
        try:
            treatment = _treatment(layout, name, module)
        except ValueError:  # also a finding, which says why
            treatment = Treatment("refused", "experts differ", "", "", "", "", True)
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
