# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tensors make one weight of a checkpoint, and whether they fit together."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from .checkpoint import TensorInfo
from .problems import Problem, of_tensor
from .rules import Config, is_static, part_of

# Suffix of a tensor -> the tensor, for one module.
Module = dict[str, TensorInfo]
WEIGHT, SCALE, ZERO_POINT = "weight", "weight_scale", "weight_zero_point"
INPUT_SCALE, INPUT_ZERO_POINT = "input_scale", "input_zero_point"
# What is stored beside an INT8 weight, and read or ignored together with it.
COMPANIONS = (SCALE, ZERO_POINT, INPUT_SCALE, INPUT_ZERO_POINT)
SCALES = (SCALE, INPUT_SCALE)
FLOATS = ("F16", "BF16", "F32")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")
_EXPERT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<expert>\d{1,9})\.")


def modules_of(tensors: Iterable[TensorInfo]) -> dict[str, Module]:
    """The tensors by module: `model.layers.0.mlp.down_proj` -> suffix -> tensor."""
    modules: dict[str, Module] = defaultdict(dict)
    for tensor in tensors:
        module, _, suffix = tensor.name.rpartition(".")
        modules[module][suffix] = tensor
    return dict(modules)


def expert_of(name: str) -> tuple[str, int] | None:
    """(`model.layers.3.moe.experts`, 7) for a name below that expert, else None."""
    found = _EXPERT.match(name)
    return (found["prefix"], int(found["expert"])) if found else None


def int8_with_scales(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """INT8 weights that have a scale beside them, whatever the config says."""
    for name, tensor in tensors.items():
        if tensor.dtype == "I8" and f"{name}_scale" in tensors:
            yield tensor


@dataclass(frozen=True)
class Stored:
    """One weight of the checkpoint: module, tensor, and what lies beside it by suffix:
    `weight_scale` and so on."""

    module: str
    weight: TensorInfo
    companions: Mapping[str, TensorInfo]

    @property
    def is_float(self) -> bool:
        return self.weight.dtype in FLOATS

    @property
    def kind(self) -> str:
        """Its dtype; all floats that a model may have are one kind."""
        return "float" if self.is_float else self.weight.dtype

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """What a config may call it: its own name, and the one of the fused layer of
        experts `prefix`, "" for none; stacked ones also as if each were on its own."""
        if not prefix:
            return (self.module,)
        last = self.module.rpartition(".")[2]
        first = (f"{prefix}.0.{last}",) if len(self.weight.shape) == 3 else ()
        return self.module, prefix, *first


def stored_problem(stored: Stored, config: Config) -> Problem | None:
    """What does not fit of an INT8 weight and the tensors beside it."""
    weight = stored.weight
    rank = 3 if expert_of(stored.module + ".") is None else 2
    if not 2 <= len(weight.shape) <= rank:
        expected, found = "[N, K], or [E, N, K] for experts", str(list(weight.shape))
        return of_tensor("weight-misshapen", weight, expected, found)
    experts = weight.shape[:-2]
    per_channel = config["weight"]["qscheme"] == "per_channel"
    channels = weight.shape[:-1] if per_channel else experts
    static = is_static(config)
    for suffix, dtypes, shape, required in (
        (SCALE, FLOATS, channels, True),
        (ZERO_POINT, INTEGERS, channels, False),
        (INPUT_SCALE, FLOATS, experts, static),
        (INPUT_ZERO_POINT, INTEGERS, experts, False),
    ):
        tensor = stored.companions.get(suffix)
        if problem := companion_problem(
            weight, suffix, tensor, dtypes, shape, required
        ):
            return problem
    return None


def must_be_zero(suffix: str, is_experts: bool, config: Config) -> bool:
    """Whether this is a zero point that kernels ignore: of linear layers they read
    that of static activations."""
    if suffix != INPUT_ZERO_POINT or is_experts:
        return suffix in (ZERO_POINT, INPUT_ZERO_POINT)
    return part_of(config, "input_tensors").get("symmetric") is not False


def companion_problem(
    weight: TensorInfo,
    suffix: str,
    tensor: TensorInfo | None,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    required: bool,
) -> Problem | None:
    """Of a scale or zero point: it has `shape`, or that with a last dimension of 1."""
    if tensor is None:
        if not required:
            return None
        stem = weight.name.removesuffix(WEIGHT)
        expected = f"{stem}{suffix} {list(shape)} beside it"
        return of_tensor("scale-missing", weight, expected, "no such tensor")
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtypes)
        return of_tensor("scale-of-other-dtype", tensor, expected, tensor.dtype)
    if tensor.shape not in (shape, (*shape, 1)) and not (
        prod(shape) == 1 and tensor.shape in ((), (1,))
    ):
        expected = f"{list(shape)} or {[*shape, 1]} for {weight}"
        found = str(list(tensor.shape))
        return of_tensor("scale-misshapen", tensor, expected, found)
    return None
