# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which modules a Quark config quantizes, and how: Quark's own matching rules.

A name is a module's in the checkpoint, or vLLM's name for the same module. Quark's
order: `exclude`, then `layer_quant_config`, then `layer_type_quant_config`, then
`global_quant_config`. An entry is a full name, a glob (`*.share_expert.*`) or, in
vLLM's spelling, a regular expression after `re:`.

Needs Python alone, so that a checkpoint can be judged without vLLM.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache, partial
from typing import Any

try:
    # vLLM has it, and its matching can be given a limit of time.
    import regex
except ImportError:
    regex = None

Config = Mapping[str, Any]
_GLOB_CHARACTERS = frozenset("*?[")
# Microseconds is what a sane expression takes with a name.
MATCH_SECONDS = 1.0
# One expert's projections, by the names that checkpoints give them.
EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@cache
def _pattern(entry: str) -> Callable[[str], object] | None:
    """What says whether an entry matches a name; None for a full name."""
    if not entry.startswith("re:"):
        is_name = _GLOB_CHARACTERS.isdisjoint(entry)
        return None if is_name else re.compile(translate(entry)).match
    expression = entry.removeprefix("re:")
    try:
        if regex is None:
            return re.compile(expression).match
        return partial(regex.compile(expression).match, timeout=MATCH_SECONDS)
    except Exception as error:  # each has errors of its own, OverflowError too
        raise ValueError(
            f"the entry {entry!r:.200} of the quantization config is no regular "
            f"expression ({error}); expected a full name, a glob or re:<expression>; "
            "correct it in config.json"
        ) from None


def matches(name: str, entry: str) -> bool:
    """Whether an entry of `exclude` or `layer_quant_config` names this module.

    Raises ValueError for a regular expression that cannot be compiled, or that takes
    more than MATCH_SECONDS with one name.
    """
    if name == entry:
        return True
    pattern = _pattern(entry)
    try:
        return pattern is not None and pattern(name) is not None
    except TimeoutError:
        raise ValueError(
            f"the entry {entry!r:.200} of the quantization config takes over "
            f"{MATCH_SECONDS:g} s to match with {name!r}; expected a regular "
            "expression that ends; correct it in config.json"
        ) from None


@dataclass(frozen=True)
class Entries:
    """Entries to match many names with: full names apart from the few patterns."""

    names: frozenset[str]
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, entries: Iterable[str] | None) -> "Entries":
        names, patterns = set(), []
        for entry in entries or ():
            if _pattern(entry) is None:
                names.add(entry)
            else:
                patterns.append(entry)
        return cls(frozenset(names), tuple(patterns))

    def match(self, name: str) -> str | None:
        """The entry that names this module: itself, or the first pattern."""
        if name in self.names:
            return name
        return next((entry for entry in self.patterns if matches(name, entry)), None)


def _layer_overrides(config: Config) -> Config:
    return config.get("layer_quant_config") or {}


def find_override(
    name: str, config: Config, entries: Entries | None = None
) -> Config | None:
    """The config that takes the place of `global_quant_config` for one linear layer.

    `entries` are those of `layer_quant_config`, where many names are asked for.
    """
    by_name = _layer_overrides(config)
    if (entry := (entries or Entries.of(by_name)).match(name)) is not None:
        return by_name[entry]
    # To Quark, every layer that vLLM asks for is a torch.nn.Linear.
    return (config.get("layer_type_quant_config") or {}).get("Linear")


def _expert_names(prefix: str, num_experts: int) -> list[list[str]]:
    """`<parent>.experts.<e>.gate_proj` and so on: a list for each family of names."""
    return [
        [f"{prefix}.{expert}.{name}" for expert in range(num_experts) for name in names]
        for names in EXPERT_PROJECTIONS
    ]


def _stacked_names(prefix: str) -> list[str]:
    """`<parent>.gate_proj` and so on: a layer's experts as one tensor."""
    parent = prefix.rpartition(".")[0]
    return [f"{parent}.{name}" for name in EXPERT_PROJECTIONS[0]]


def experts_excluded(prefix: str, num_experts: int, exclude: Iterable[str]) -> bool:
    """Whether `exclude` names all experts of the fused layer `<parent>.experts`.

    Raises ValueError where it names some of them: a fused layer has one scheme.
    """
    entries = Entries.of(exclude)
    if entries.match(prefix) or all(map(entries.match, _stacked_names(prefix))):
        return True
    for names in _expert_names(prefix, num_experts):
        excluded = {name for name in names if entries.match(name)}
        if len(excluded) == len(names):
            return True
        if excluded:
            missing = next(name for name in names if name not in excluded)
            raise ValueError(
                f"the quantization config excludes {len(excluded)} of the {len(names)} "
                f"expert projections of {prefix}, {min(excluded)} but not {missing}; "
                "expected all or none, since vLLM fuses them; export the checkpoint "
                "again with all of them excluded or none"
            )
    return False


def experts_override(prefix: str, num_experts: int, config: Config) -> Config | None:
    """`find_override` for the fused layer `<parent>.experts`.

    Raises ValueError where its experts have different ones.
    """
    whole = find_override(prefix, config)
    if not _layer_overrides(config):
        return whole
    entries = Entries.of(_layer_overrides(config))
    for names in _expert_names(prefix, num_experts):
        first, *others = (find_override(name, config, entries) for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if other != first:
                raise ValueError(
                    f"the quantization config treats {names[0]} and {name} "
                    f"differently; expected one scheme for all experts of {prefix}, "
                    "since vLLM fuses them; export the checkpoint again with one"
                )
        if first is not None and first != whole:
            return first
    first, *others = (
        find_override(name, config, entries) for name in _stacked_names(prefix)
    )
    if first is not None and all(other == first for other in others):
        return first
    return whole


def layer_config(
    name: str,
    num_experts: int | None,
    config: Config,
    entries: Entries | None = None,
) -> Config:
    """The config of one linear layer, or of the `num_experts` fused experts `name`.

    `entries` are as for `find_override`.
    """
    if num_experts is None:
        override = find_override(name, config, entries)
    else:
        override = experts_override(name, num_experts, config)
    return config["global_quant_config"] if override is None else override


def shards_excluded(
    layer_name: str, exclude: Iterable[str], packed: Mapping[str, Iterable[str]]
) -> dict[str, bool]:
    """Of each shard of a linear layer, by its name in the checkpoint: whether `exclude`
    names it. A layer that is not in `packed` is its own only shard, and so is one that
    is named itself; a glob names modules of the checkpoint, so shards alone."""
    names = [layer_name]
    parent, _, last = layer_name.rpartition(".")
    itself = (entry for entry in exclude if entry.startswith("re:"))
    if last in packed and not (
        layer_name in exclude or any(matches(layer_name, entry) for entry in itself)
    ):
        names = [f"{parent}.{shard}" if parent else shard for shard in packed[last]]
    entries = Entries.of(exclude)
    return {name: entries.match(name) is not None for name in names}


def mixed_shards(layer_name: str, excluded: Mapping[str, bool]) -> ValueError:
    """The error for a fused layer of which `exclude` names some shards.

    `excluded` says of each shard, by its name in the checkpoint, whether it does.
    """
    inside = [name for name, is_excluded in excluded.items() if is_excluded]
    outside = [name for name, is_excluded in excluded.items() if not is_excluded]
    return ValueError(
        f"the quantization config excludes {', '.join(inside)} but not "
        f"{', '.join(outside)}; expected all or none, since vLLM fuses them into "
        f"{layer_name}; export the checkpoint again with all of them excluded or none"
    )


def is_int8(config: Config | None) -> bool:
    """Whether a layer's config asks for INT8 weights."""
    weight = (config or {}).get("weight")
    return isinstance(weight, Mapping) and weight.get("dtype") == "int8"


def has_int8(config: Config) -> bool:
    """Whether the config asks for INT8 weights anywhere."""
    layers = [config.get("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        overrides = config.get(key)
        if isinstance(overrides, Mapping):
            layers.extend(overrides.values())
    return any(isinstance(layer, Mapping) and is_int8(layer) for layer in layers)


def part_of(layer: Config, kind: str) -> Config:
    """What a layer's config says of `weight` or `input_tensors`; empty for nothing,
    and for the lists that other formats have there."""
    found = layer.get(kind)
    return found if isinstance(found, dict) else {}


def is_static(layer: Config) -> bool:
    """Whether a layer's config has activations of a scale that the export holds."""
    return not part_of(layer, "input_tensors").get("is_dynamic")


def same_scheme(one: Config | None, other: Config | None) -> bool:
    """Whether two configs of layers ask for the same numbers: what Quark notes of how
    it found the scales is of no account."""
    if one is None or other is None or one == other:
        return one == other
    for kind in ("weight", "input_tensors"):
        if not isinstance(one.get(kind) or {}, dict):
            return False
        parts = part_of(one, kind), part_of(other, kind)
        keys = ("dtype", "qscheme", "is_dynamic", "symmetric", "group_size", "ch_axis")
        if any((parts[0].get(key) or 0) != (parts[1].get(key) or 0) for key in keys):
            return False
    return all(
        bool(one.get(kind)) == bool(other.get(kind))
        for kind in ("output_tensors", "bias")
    )


def scheme_problem(layer: Config) -> tuple[str, str] | None:
    """What an INT8 config should say and what it says, where vLLM has no kernel."""
    weight, inputs = part_of(layer, "weight"), part_of(layer, "input_tensors")
    if weight.get("qscheme") not in ("per_tensor", "per_channel") or weight.get(
        "is_dynamic"
    ):
        return "weights per_tensor or per_channel", str(weight.get("qscheme"))
    if weight.get("symmetric") is not True:
        return "symmetric weights", "asymmetric ones, whose zero points kernels ignore"
    if weight["qscheme"] == "per_channel" and weight.get("ch_axis") != 0:
        return "per-channel weights with ch_axis 0", f"ch_axis {weight.get('ch_axis')}"
    if inputs.get("dtype") != "int8":
        return "int8 activations", str(inputs.get("dtype"))
    per_token = (
        inputs.get("qscheme") == "per_channel" and inputs.get("is_dynamic") is True
    )
    per_tensor = inputs.get("qscheme") == "per_tensor" and not inputs.get("is_dynamic")
    if not per_token and not per_tensor:
        kind = "dynamic" if inputs.get("is_dynamic") else "static"
        expected = "activations per token and dynamic, or per tensor and static"
        return expected, f"{inputs.get('qscheme')}, {kind}"
    if layer.get("output_tensors") or layer.get("bias"):
        return "no quantized outputs or biases", "such"
    return None
