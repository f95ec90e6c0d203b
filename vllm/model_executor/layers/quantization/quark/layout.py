# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a checkpoint are what its Quark INT8 config says they are.

Judges names, dtypes and shapes as the files' headers give them. Only modules of which
the config asks for INT8, or which are stored as INT8, are looked at. Whatever vLLM
would read wrong is a CheckpointError. Needs Python alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from vllm.model_executor.layers.quantization.quark.checkpoint import (
    TensorInfo,
    misfit,
)
from vllm.model_executor.layers.quantization.quark.export import (
    COMPANIONS,
    FLOATS,
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    INTEGERS,
    SCALE,
    SCALES,
    WEIGHT,
    ZERO_POINT,
    Module,
    companion_problem,
    expert_of,
    modules_of,
)
from vllm.model_executor.layers.quantization.quark.problems import (
    EXPORT_AGAIN,
    Problem,
    of_tensor,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    EXPERT_PROJECTIONS,
    Config,
    Entries,
    experts_excluded,
    is_int8,
    is_static,
    layer_config,
    matches,
    part_of,
    scheme_problem,
)

# Linear layers in every model that has layers of these names.
PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_up_proj"),
    *(name for names in EXPERT_PROJECTIONS for name in names),
}
# vLLM keeps these in the model's dtype.
NEVER_QUANTIZED = ("lm_head", "embed_tokens")
NUM_EXPERTS = (
    "moe_num_experts",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# vLLM's names of what it fuses -> the names in a checkpoint. Models that do not tell
# vLLM so match exclude by the fused names alone.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Far beyond any real model: the config of a stranger's checkpoint may say anything.
MAX_EXPERTS = 100_000

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def layer_index(name: str) -> int | None:
    """3 for `model.layers.3.mlp`; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def fused_names(modules: Iterable[str]) -> list[str]:
    """vLLM's names of what it fuses from these modules, but for experts."""
    known = set(modules)
    found = []
    for fused, shards in FUSED.items():
        for name in sorted(known):
            parent, _, last = name.rpartition(".")
            if last != shards[0] or expert_of(name):
                continue
            if all(f"{parent}.{shard}" in known for shard in shards):
                found.append(f"{parent}.{fused}")
    return found


def first_value(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that a model's config has, or its text_config."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            if each.get(key) is not None:
                return each[key]
    return None


class Layout:
    """A checkpoint's modules beside its config.

    tensors: name -> TensorInfo; config: the quantization_config; model: config.json.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        config: Config,
        model: Mapping[str, Any],
    ) -> None:
        self.config, self.model = config, model
        self.exclude = Entries.of(config["exclude"])
        self.overrides = Entries.of(config.get("layer_quant_config"))
        depth = first_value(model, "num_hidden_layers")
        self.depth = depth if isinstance(depth, int) else None
        self.modules = modules_of(tensors.values())
        self._experts: dict[str, Config | None] = {}
        # Asked for many times: of each module once.
        self._prefixes: dict[str, str | None] = {}

    def is_loaded(self, name: str) -> bool:
        """False for layers after the last, which hold multi-token prediction."""
        index = layer_index(name)
        return index is None or self.depth is None or index < self.depth

    def experts_prefix(self, name: str, module: Module) -> str | None:
        """vLLM's name of the fused experts that this module is a part of, if any."""
        if name not in self._prefixes:
            weight = module.get(WEIGHT)
            stacked = weight is not None and len(weight.shape) == 3
            if expert := expert_of(f"{name}."):
                self._prefixes[name] = expert[0]
            else:
                parent = name.rpartition(".")[0]
                self._prefixes[name] = f"{parent}.experts" if stacked else None
        return self._prefixes[name]

    def layer_config(self, name: str, module: Module) -> Config | None:
        """How vLLM quantizes this module by the config; None where it is excluded."""
        prefix = self.experts_prefix(name, module)
        if prefix is None:
            if self.exclude.match(name):
                return None
            return layer_config(name, None, self.config, self.overrides)
        if prefix not in self._experts:
            count = self.num_experts() or 1
            excluded = experts_excluded(prefix, count, self.config["exclude"])
            self._experts[prefix] = (
                None if excluded else layer_config(prefix, count, self.config)
            )
        return self._experts[prefix]

    def num_experts(self) -> int | None:
        """As config.json counts them. Raises ValueError for a senseless number."""
        count = first_value(self.model, *NUM_EXPERTS)
        if not isinstance(count, int):
            return None
        if not 0 <= count <= MAX_EXPERTS:
            expected = f"a number of experts from 0 to {MAX_EXPERTS}"
            raise misfit("config.json", expected, f"{count:.6g}", "correct it")
        return count

    def full_names(self) -> list[str]:
        """`exclude` with the names of the modules that each pattern matches.

        vLLM renames modules, and full names with them, but not what a pattern matches.
        """
        names = list(self.config["exclude"])
        for entry in self.exclude.patterns:
            names.extend(name for name in self.modules if matches(name, entry))
        return list(dict.fromkeys(names))

    def int8_modules(self) -> Iterator[tuple[str, Module, Config]]:
        """Modules that the model loads as INT8: name, tensors, config."""
        for name, module in self.modules.items():
            weight = module.get(WEIGHT)
            if weight is None or weight.dtype != "I8" or not self.is_loaded(name):
                continue
            layer = self.layer_config(name, module)
            if layer is not None:
                yield name, module, layer

    def rule(self, name: str, module: Module) -> str:
        """The part of the quantization_config by which `layer_config` decides, with
        its entry if that is a pattern."""
        prefix = self.experts_prefix(name, module)
        names = [name] if prefix is None else [prefix, name]
        layer = self.layer_config(name, module)
        if layer is None:
            entries = (self.exclude.match(each) for each in names)
            entry = next(filter(None, entries), None)
            if entry is None:
                return "exclude, expert by expert"
            return "exclude" if entry in names else f"exclude {entry!r}"
        if layer is self.config["global_quant_config"]:
            return "global_quant_config"
        for each in names:
            if (entry := self.overrides.match(each)) is not None:
                by_name = "" if entry in names else f" {entry!r}"
                return f"layer_quant_config{by_name}"
        by_type = self.config.get("layer_type_quant_config") or {}
        if layer is by_type.get("Linear"):
            return "layer_type_quant_config 'Linear'"
        return "layer_quant_config, expert by expert"

    @cached_property
    def linear_names(self) -> set[str]:
        """Last names of the linear layers that vLLM may quantize."""
        return PROJECTIONS | {
            name.rpartition(".")[2]
            for name, module in self.modules.items()
            if WEIGHT in module and module[WEIGHT].dtype == "I8"
        }

    def must_be_zero(self, name: str, module: Module, suffix: str) -> bool:
        """Whether this is a zero point that kernels ignore: of linear layers they read
        that of static activations."""
        if suffix != INPUT_ZERO_POINT or self.experts_prefix(name, module) is not None:
            return suffix in (ZERO_POINT, INPUT_ZERO_POINT)
        inputs = part_of(self.layer_config(name, module) or {}, "input_tensors")
        return inputs.get("symmetric") is not False

    def checked_companions(self) -> Iterator[tuple[str, Module, str]]:
        """(module, its tensors, suffix) of what lies beside INT8 weights and is looked
        at before it is loaded: scales, and zero points that must be 0."""
        for name, module, _ in self.int8_modules():
            for suffix in COMPANIONS:
                if suffix in module and (
                    suffix in SCALES or self.must_be_zero(name, module, suffix)
                ):
                    yield name, module, suffix

    def check(self) -> None:
        """Raise CheckpointError, or ValueError for the config, for the first misfit."""
        for problem in self.problems():
            raise problem.error

    def problems(self) -> Iterator[Problem]:
        """Everything that vLLM would read wrong; of a module the first."""
        yield from self._exclude_problems()
        for name, module in self.modules.items():
            if self.is_loaded(name):
                yield from self._module_problems(name, module)
        yield from self._experts_problems()

    def _exclude_problems(self) -> Iterator[Problem]:
        names = set(self.modules)
        stacked = {
            f"{name.rpartition('.')[0]}.experts.{expert}.{name.rpartition('.')[2]}"
            for name, module in self.modules.items()
            if WEIGHT in module and len(module[WEIGHT].shape) == 3
            for expert in range(min(module[WEIGHT].shape[0], MAX_EXPERTS))
        }
        prefixes = {self.experts_prefix(*item) for item in self.modules.items()}
        known = names | stacked | {prefix for prefix in prefixes if prefix}
        is_first = True
        # An entry for what is fused does no harm beside those of its parts.
        known.update(fused_names(filter(self.exclude.match, names)))
        for entry in self.config["exclude"]:
            if entry in known:
                continue
            is_pattern = entry in self.exclude.patterns
            if is_pattern and any(matches(name, entry) for name in known):
                continue
            tied = entry == "lm_head" and first_value(self.model, "tie_word_embeddings")
            if tied or not self.is_loaded(entry):
                continue
            # Looking at every name for every entry would take too long.
            close = None
            if is_first:
                close = min((name for name in known if entry in name), default=None)
            is_first = False
            hint = f" (there is {close})" if close else ""
            expected = "exclude to name modules of the checkpoint"
            found = f"an entry that names none{hint}"
            yield Problem("exclude-names-nothing", entry, expected, found)

    def _module_problems(self, name: str, module: Module) -> Iterator[Problem]:
        weight = module.get(WEIGHT)
        if weight is None:
            for suffix in COMPANIONS:
                if suffix in module:
                    expected, found = f"{name}.weight beside it", "no such tensor"
                    yield of_tensor(
                        "weight-missing", module[suffix], expected, found, EXPORT_AGAIN
                    )
                    return
            return
        try:
            layer = self.layer_config(name, module)
        except ValueError as error:
            yield Problem("experts-differ", name, "one scheme", str(error))
            return
        if weight.dtype != "I8":
            yield from self._float_problems(name, module, layer)
            return
        last = name.rpartition(".")[2]
        if last in NEVER_QUANTIZED:
            remedy = f"{EXPORT_AGAIN} with {last!r} in exclude"
            expected = f"a float {last}, which vLLM does not quantize"
            yield of_tensor("head-quantized", weight, expected, "I8", remedy)
        elif layer is None:
            entry = self.exclude.match(name) or "its experts' entries"
            expected = f"a float weight, since exclude has {entry!r}"
            remedy = "delete that entry from config.json, or export again"
            yield of_tensor("int8-excluded", weight, expected, "I8", remedy)
        elif not is_int8(layer):
            dtype = part_of(layer, "weight").get("dtype")
            expected = f"{dtype} as config.json has it"
            yield of_tensor("int8-unasked", weight, expected, "I8", EXPORT_AGAIN)
        elif problem := scheme_problem(layer):
            remedy = f"{EXPORT_AGAIN} with that"
            yield of_tensor("scheme-without-kernel", weight, *problem, remedy)
        else:
            yield from self._int8_problems(name, module, layer)

    def _float_problems(
        self, name: str, module: Module, layer: Config | None
    ) -> Iterator[Problem]:
        weight, last = module[WEIGHT], name.rpartition(".")[2]
        if not is_int8(layer) or last in NEVER_QUANTIZED:
            return
        beside = next((suffix for suffix in COMPANIONS if suffix in module), None)
        if beside or (last in self.linear_names and len(weight.shape) > 1):
            why = (
                f"beside {name}.{beside}"
                if beside
                else "since exclude does not name it"
            )
            remedy = f"add {name!r} to exclude in config.json, or export again"
            yield of_tensor(
                "float-not-excluded", weight, f"I8, {why}", weight.dtype, remedy
            )

    def _int8_problems(
        self, name: str, module: Module, layer: Config
    ) -> Iterator[Problem]:
        weight = module[WEIGHT]
        rank = 3 if expert_of(name + ".") is None and len(weight.shape) == 3 else 2
        if len(weight.shape) != rank:
            expected, found = "[N, K], or [E, N, K] for experts", list(weight.shape)
            yield of_tensor(
                "weight-misshapen", weight, expected, str(found), EXPORT_AGAIN
            )
            return
        experts = weight.shape[:-2]
        per_channel = layer["weight"]["qscheme"] == "per_channel"
        channels = weight.shape[:-1] if per_channel else experts
        static = is_static(layer)
        for suffix, dtypes, shape, required in (
            (SCALE, FLOATS, channels, True),
            (ZERO_POINT, INTEGERS, channels, False),
            (INPUT_SCALE, FLOATS, experts, static),
            (INPUT_ZERO_POINT, INTEGERS, experts, False),
        ):
            tensor = module.get(suffix)
            if problem := companion_problem(
                weight, suffix, tensor, dtypes, shape, required
            ):
                yield problem
                return
        if not static and INPUT_SCALE in module:
            remedy = "correct input_tensors in config.json, or export again"
            expected = "none, since config.json has dynamic activations"
            tensor = module[INPUT_SCALE]
            yield of_tensor(
                "static-scale-of-dynamic", tensor, expected, "a static scale", remedy
            )

    def _experts_problems(self) -> Iterator[Problem]:
        """Every layer has all experts that config.json counts, and no more."""
        try:
            expected, found_int8 = self.num_experts(), list(self.int8_modules())
        except ValueError:
            return  # a problem of a module, which is told there
        if expected is None:
            return
        experts: dict[str, dict[int, TensorInfo]] = defaultdict(dict)
        for name, module, _ in found_int8:
            weight = module[WEIGHT]
            if expert := expert_of(name + "."):
                experts[expert[0]][expert[1]] = weight
            elif len(weight.shape) == 3 and weight.shape[0] != expected:
                shape = f"{expected} experts, as config.json has it"
                yield of_tensor(
                    "experts-miscounted",
                    weight,
                    shape,
                    str(weight.shape[0]),
                    EXPORT_AGAIN,
                )
        for prefix, weights in experts.items():
            if differing := set(weights) ^ set(range(expected)):
                wrong = min(differing)
                how = "one too many" if wrong in weights else "missing"
                every = f"experts 0 to {expected - 1}, as config.json has it"
                found = f"{len(weights)}: {wrong} is {how}"
                yield Problem("experts-miscounted", prefix, every, found)
