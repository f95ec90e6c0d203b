# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the files of a Quark INT8 export hold for each layer that a model is built of.

A model that is being built asks for the quantization of its layers one by one, by
vLLM's names. Here each is answered from the tensors that the layer will take: stored as
floats without a scale, it is a float layer, whatever `exclude` says; stored as INT8, it
is what the config says of these very tensors. Names are never taken for what they
sound like.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

from .checkpoint import TensorInfo
from .problems import Problem, of_tensor
from .rules import (
    Config,
    Entries,
    is_int8,
    matches,
    part_of,
    same_scheme,
    scheme_problem,
)
from .weights import (
    COMPANIONS,
    SCALE,
    WEIGHT,
    Stored,
    expert_of,
    modules_of,
    stored_problem,
)

# What models fuse that have no packed_modules_mapping to tell it, by vLLM's names: some
# only have it in their load_weights, where it cannot be asked for. Of the ways in which
# the parts may be called, the one that the files have. Complete for the releases that
# tests/models/test_fused_modules.py looks into.
USUAL_SHARDS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "kv_proj": (("k_proj", "v_proj"),),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "fused_qkv_a_proj": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "fused_wqa_wkv": (("wq_a", "wkv"),),
    "fused_wkv_wgate": (("wkv", "wgate"),),
    "fc13": (("fc1", "fc3"),),
    "merged_proj": (("gate_proj", "dense_h_to_4h"),),
}


class Mapper(Protocol):
    """vLLM's WeightsMapper: names in the checkpoint -> vLLM's names."""

    def apply_list(self, values: list[str]) -> list[str]: ...


@dataclass(frozen=True)
class Layer:
    """What a layer of vLLM takes, and how: `config` is None for a float layer."""

    weights: Sequence[Stored]
    config: Config | None


class Export:
    """The tensors of an export beside its quantization_config.

    tensors: name -> TensorInfo; config: as it is in config.json, before vLLM renames
    what it names.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Config) -> None:
        self.tensors, self.config = tensors, config
        self.modules = modules_of(tensors.values())
        self._exclude = Entries.of(config.get("exclude"))
        self._overrides = Entries.of(config.get("layer_quant_config"))
        # vLLM's name of a module -> its name in the checkpoint.
        self._names = {name: name for name in self.modules}
        self._layers: dict[str, Layer | None] = {}
        self.problems: list[Problem] = []

    def rename(self, mapper: Mapper) -> None:
        """Follow a model that renames the modules of its checkpoint."""
        renamed: dict[str, str] = {}
        for name, stored in self._names.items():
            for new in mapper.apply_list([f"{name}.{WEIGHT}"]):
                renamed[new.rpartition(".")[0]] = stored
        self._names = renamed
        for cached in ("_sorted", "_paths"):
            self.__dict__.pop(cached, None)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._names)

    def _below(self, prefix: str) -> list[str]:
        """vLLM's names of the modules below a prefix, itself included."""
        first = bisect_left(self._sorted, prefix)
        found = []
        for name in self._sorted[first:]:
            if not name.startswith(prefix):
                break
            if name == prefix or name[len(prefix)] == ".":
                found.append(name)
        return found

    def _called(self, path: str) -> str:
        """What the files call a path of vLLM's that they do not have: some models give
        a layer another name than the attribute that holds it, and weights go by that.
        It is the only path that differs in one name; "" for none or several."""
        parts = path.split(".")
        found = ""
        for other in self._paths.get((len(parts), parts[-1]), ()):
            pairs = zip(parts, other.split("."), strict=True)
            different = [pair for pair in pairs if pair[0] != pair[1]]
            if len(different) == 1 and not different[0][1].isdecimal():
                if found:
                    return ""
                found = other
        return found

    @cached_property
    def _paths(self) -> Mapping[tuple[int, str], set[str]]:
        """The modules that the files hold, and the paths above them, by their number of
        names and the last of them."""
        found: dict[tuple[int, str], set[str]] = defaultdict(set)
        for name in self._names:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                found[count, parts[count - 1]].add(".".join(parts[:count]))
        return found

    def _weights(self, name: str, rank: int) -> list[Stored]:
        """The weights of one module of the checkpoint: tensors of that rank or more
        that are no scales, zero points or biases."""
        module = self.modules[name]
        found = []
        # Stacked experts may have no module of their own: `experts.gate_up_proj`.
        for suffix in [WEIGHT] if WEIGHT in module else module:
            tensor = module[suffix]
            if len(tensor.shape) < rank or suffix.endswith(("bias", *COMPANIONS)):
                continue
            stem = "" if suffix == WEIGHT else f"{suffix}_"
            beside = {
                each: module[f"{stem}{each}"]
                for each in COMPANIONS
                if f"{stem}{each}" in module
            }
            found.append(Stored(name, tensor, beside))
        return found

    def shards(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
        """Names in the checkpoint of the modules that a linear layer is made of, by
        vLLM's name for it. Empty where the files hold none of that name."""
        parent, _, last = prefix.rpartition(".")
        ways = [packed[last]] if last in packed else []
        ways += [(last,), *USUAL_SHARDS.get(last, ())]
        for parts in ways:
            names = [f"{parent}.{part}" if parent else part for part in parts]
            if found := [self._names[name] for name in names if name in self._names]:
                return found
        for parts in ways:
            names = [self._called(f"{parent}.{part}") for part in parts]
            if found := [self._names[name] for name in names if name in self._names]:
                return found
        return []

    def linear(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> Layer | None:
        """What a linear layer takes; None where the files hold nothing for it."""
        if prefix not in self._layers:
            weights = [
                stored
                for name in self.shards(prefix, packed)
                for stored in self._weights(name, 2)
            ]
            self._layers[prefix] = self._judged(prefix, weights, is_experts=False)
        return self._layers[prefix]

    def experts(self, prefix: str) -> Layer | None:
        """What a layer of fused experts takes; None where the files hold nothing."""
        if prefix not in self._layers:
            weights = self._experts_at(prefix) or self._experts_at(self._called(prefix))
            self._layers[prefix] = self._judged(prefix, weights, is_experts=True)
        return self._layers[prefix]

    def _experts_at(self, prefix: str) -> list[Stored]:
        """The weights below a fused layer; else those that are stacked beside it:
        `moe.gate_proj` for `moe.experts`."""
        if not prefix:
            return []
        below = [self._names[name] for name in self._below(prefix)]
        if found := [each for name in below for each in self._weights(name, 2)]:
            return found
        parent = prefix.rpartition(".")[0]
        return [
            each
            for name in self._below(parent)
            if name.rpartition(".")[0] == parent
            for each in self._weights(self._names[name], 3)
        ]

    def asked(self, prefix: str) -> Layer | None:
        """What was answered for a layer of that name; None where nothing was."""
        return self._layers.get(prefix)

    def exclude_without_module(self) -> Iterator[Problem]:
        """The entries of exclude that name nothing in the checkpoint."""
        names = set(self.modules)
        # Stacked experts, and what vLLM fuses, have further names.
        stacked = {
            name.rpartition(".")[0]
            for name, module in self.modules.items()
            if WEIGHT in module and len(module[WEIGHT].shape) == 3
        }
        for entry in self.config["exclude"]:
            is_pattern = entry in self._exclude.patterns
            if entry in names or (
                is_pattern and any(matches(name, entry) for name in names)
            ):
                continue
            expert = expert_of(f"{entry}.")
            if expert and expert[0].rpartition(".")[0] in stacked:
                continue
            parent, _, last = entry.rpartition(".")
            parts = chain.from_iterable(USUAL_SHARDS.get(last, ()))
            if any(f"{parent}.{part}" in names for part in parts):
                continue
            if last == "experts" and (parent in stacked or f"{entry}.0" in self._tops):
                continue
            expected = "every entry to name a module of the checkpoint"
            name = f"exclude of config.json: {entry}"
            yield Problem("exclude-names-nothing", name, expected, "none of that name")

    @cached_property
    def _tops(self) -> set[str]:
        """`<prefix>.0` for experts that are stored one by one."""
        found = map(expert_of, self.modules)
        return {f"{expert[0]}.{expert[1]}" for expert in found if expert}

    def _judged(
        self, prefix: str, weights: Sequence[Stored], is_experts: bool
    ) -> Layer | None:
        """The layer of these weights, with its problems noted."""
        if not weights:
            return None
        differ = "experts-differ" if is_experts else "shards-differ"
        fused = prefix if is_experts else ""
        first = weights[0]
        if odd := next((w for w in weights if w.kind != first.kind), None):
            expected = "all that vLLM fuses there to be stored alike"
            found = f"{_shown(first)} and {_shown(odd)}"
            self._note(Problem(differ, prefix, expected, found))
        configs = [self.config_of(*stored.names(fused)) for stored in weights]
        if first.is_float:
            self._judge_floats(weights, configs)
            return Layer(weights, None)
        for stored, config in zip(weights, configs, strict=True):
            if not same_scheme(config, configs[0]):
                expected = "one scheme for all that vLLM fuses there"
                rules = (
                    f"{self._rule(*each.names(fused))} for {each.module}"
                    for each in (first, stored)
                )
                self._note(Problem(differ, prefix, expected, " and ".join(rules)))
                break
        config = configs[0]
        if first.weight.dtype == "I8":
            self._judge_int8(fused, weights, config)
        return Layer(weights, config)

    def _note(self, problem: Problem) -> None:
        self.problems.append(problem)

    def config_of(self, *names: str) -> Config | None:
        """What the config says of a module that it may call by any of these names; None
        where it leaves the module as floats."""
        if self.excluded_by(*names) is not None:
            return None
        for name in names:
            if (entry := self._overrides.match(name)) is not None:
                found = self.config["layer_quant_config"][entry]
                break
        else:
            by_type = self.config.get("layer_type_quant_config") or {}
            # To Quark, all that vLLM asks for are torch.nn.Linear.
            found = by_type.get("Linear", self.config["global_quant_config"])
        return found if (found or {}).get("weight") else None

    def excluded_by(self, *names: str) -> str | None:
        """The entry of exclude that has one of these names of a module, if any."""
        return next(filter(None, map(self._exclude.match, names)), None)

    def _rule(self, *names: str) -> str:
        """The part of the config that decides about a module of these names."""
        if (entry := self.excluded_by(*names)) is not None:
            return f"exclude {entry!r}"
        entries = filter(None, map(self._overrides.match, names))
        if (entry := next(entries, None)) is not None:
            return f"layer_quant_config {entry!r}"
        return "global_quant_config"

    def _judge_floats(
        self, weights: Sequence[Stored], configs: Sequence[Config | None]
    ) -> None:
        for stored, config in zip(weights, configs, strict=True):
            if SCALE in stored.companions:
                expected = f"I8, since {stored.companions[SCALE].name} lies beside it"
                weight = stored.weight
                self._note(of_tensor("fake-quantized", weight, expected, weight.dtype))
                return
            if is_int8(config):
                expected = "exclude to name it, since it is stored as floats"
                found = str(stored.weight)
                problem = Problem("float-not-excluded", stored.module, expected, found)
                self._note(problem)

    def _judge_int8(
        self, fused: str, weights: Sequence[Stored], config: Config | None
    ) -> None:
        """Note the first problem of a layer's INT8 weights beside their config."""
        weight, names = weights[0].weight, weights[0].names(fused)
        if config is None and (entry := self.excluded_by(*names)) is not None:
            expected = f"a float weight, since exclude has {entry!r}"
            self._note(of_tensor("int8-excluded", weight, expected, "I8"))
        elif config is None or not is_int8(config):
            dtype = part_of(config or {}, "weight").get("dtype")
            rule = self._rule(*names)
            expected = f"{dtype or 'floats'}, as {rule} of config.json has it"
            self._note(of_tensor("int8-unasked", weight, expected, "I8"))
        elif problem := scheme_problem(config):
            self._note(of_tensor("scheme-without-kernel", weight, *problem))
        else:
            for stored in weights:
                if found := stored_problem(stored, config):
                    self._note(self._foreign(stored) or found)
                    return

    def _foreign(self, stored: Stored) -> Problem | None:
        """A scale of this weight under a name that vLLM does not read."""
        if SCALE in stored.companions:
            return None
        for name in self._below_stored(f"{stored.module}."):
            if "scale" in name.removeprefix(f"{stored.module}."):
                expected = f"{stored.module}.{SCALE}, as amd-quark writes it"
                found = "a scale under a name that another exporter gives it"
                tensor = self.tensors[name]
                return of_tensor("foreign-names", tensor, expected, found)
        return None

    def _below_stored(self, prefix: str) -> list[str]:
        names = self._tensor_names
        first = bisect_left(names, prefix)
        return [
            name
            for name in names[first : first + len(COMPANIONS) + 4]
            if name.startswith(prefix)
        ]

    @cached_property
    def _tensor_names(self) -> list[str]:
        return sorted(self.tensors)


def _shown(stored: Stored) -> str:
    return f"{stored.weight.name} as {stored.weight.dtype}"
