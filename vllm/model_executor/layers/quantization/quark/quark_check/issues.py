# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, and what comes of it on which vLLM.

Of this fork layout.py decides, as it does while the engine starts; of releases it is
told from what they do not know.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm.model_executor.layers.quantization.quark.export import (
    COMPANIONS,
    INPUT_ZERO_POINT,
    SCALE,
    WEIGHT,
    ZERO_POINT,
    Module,
    int8_with_scales,
)
from vllm.model_executor.layers.quantization.quark.layout import (
    FUSED,
    Layout,
    layer_index,
)
from vllm.model_executor.layers.quantization.quark.problems import (
    EXPORT_AGAIN,
)
from vllm.model_executor.layers.quantization.quark.quark_check.findings import (
    Finding,
    Severity,
    finding,
)
from vllm.model_executor.layers.quantization.quark.quark_check.plan import (
    Checkpoint,
    quantization_config,
    spans,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import (
    FORK,
    FORK_GPU,
    Outcome,
    fact,
    facts_file,
    listed,
    on,
    stock,
    targets,
    without,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    Config,
    Entries,
    find_override,
    is_int8,
    is_static,
    matches,
    mixed_shards,
    part_of,
)

# Name, tensors, config.
Int8Module = tuple[str, Module, Config]

# What --deep finds that this fork refuses.
_REFUSED_WHEN_READ = ("non-finite", "scale-not-positive", "zero-point-not-zero")


@dataclass(frozen=True)
class Issue:
    """A finding, and what comes of it on which target; elsewhere it is right."""

    finding: Finding
    outcomes: Mapping[str, Outcome]


def deep_issue(found: Finding) -> Issue:
    """What comes of something that --deep found."""
    if found.severity != "wrong":
        return Issue(found, {})
    refused = found.id in _REFUSED_WHEN_READ
    return Issue(
        found, on(stock(), "wrong") | on(FORK, "refused" if refused else "wrong")
    )


def find_issues(checkpoint: Checkpoint) -> Iterator[Issue]:
    layout = checkpoint.layout
    if "auto_map" in checkpoint.model:
        yield Issue(
            finding(
                "code-in-config",
                "note",
                "config.json names Python code of the checkpoint (auto_map)",
                "vLLM runs it where --trust-remote-code is given; nothing of it was "
                "run here.",
                "read that code before you give --trust-remote-code",
            ),
            {},
        )
    if checkpoint.problem is not None:
        yield _config_unreadable(checkpoint.problem)
    elif layout is None:
        yield from _without_int8(checkpoint)
    else:
        yield from _layout_issues(layout)
        try:
            int8 = list(layout.int8_modules())
        except ValueError:
            return  # one of the layout's problems
        too_old = _too_old(layout, int8)
        yield from too_old.values()
        # What a release makes of a checkpoint that it refuses anyhow is of no interest.
        but = {name for issue in too_old.values() for name in issue.outcomes}
        yield from _scheme_issues(layout, int8, but)
        yield from _exclude_issues(layout, checkpoint.architecture, but)
        yield from _override_issues(layout, int8, but)
        yield from _storage_issues(layout, int8, but)


def _config_unreadable(problem: ValueError) -> Issue:
    text = str(problem)
    return Issue(
        finding(
            "config-unreadable",
            "refused",
            "the quantization_config is none that vLLM can read",
            text,
            "export the model with amd-quark 0.13, or copy the quantization_config of "
            "such an export",
        ),
        on(targets(), "refused"),
    )


def _without_int8(checkpoint: Checkpoint) -> Iterator[Issue]:
    int8 = [tensor.name for tensor in int8_with_scales(checkpoint.tensors)]
    if int8 and quantization_config(checkpoint.model) is None:
        yield Issue(
            finding(
                "config-lost",
                "wrong",
                "INT8 weights with scales, and no quantization_config",
                "vLLM would read the whole numbers as if they were the weights: "
                "garbage. This fork refuses it.",
                "copy config.json from the export",
                int8,
            ),
            on(stock(), "wrong") | on(FORK, "refused"),
        )
        return
    yield Issue(
        finding(
            "not-quark-int8",
            "note",
            "not a Quark INT8 checkpoint",
            "Other formats are left to vLLM as upstream has them; what follows says "
            "what is stored, not whether it is read right.",
            "nothing to do",
        ),
        {},
    )


# --- what layout.py finds: this fork refuses it ----------------------------------

# Problem -> what the releases of vLLM make of it, its summary, why it matters, remedy.
_PROBLEMS: dict[str, tuple[Outcome, str, str, str]] = {
    "exclude-names-nothing": (
        "right",
        "exclude has entries that name nothing in the checkpoint",
        "What they should exclude would be read as INT8, were it there.",
        "correct the entry in config.json, or delete it",
    ),
    "weight-missing": (
        "wrong",
        "scales without the weight that they belong to",
        "The weight would stay memory that nothing wrote.",
        "export the checkpoint again, or download the shard that has it",
    ),
    "experts-differ": (
        "unknown",
        "the config treats experts of one layer differently",
        "vLLM fuses a layer's experts, so they have one scheme.",
        "export the checkpoint again with one scheme for all experts of a layer",
    ),
    "head-quantized": (
        "refused",
        "the output layer or the embedding is stored as INT8",
        "vLLM keeps these in the model's dtype, and has no place for their scales.",
        "export the checkpoint again with them in exclude",
    ),
    "int8-excluded": (
        "wrong",
        "stored as INT8, yet exclude names it",
        "vLLM would read the whole numbers as if they were the weights: garbage.",
        "delete the entry from exclude in config.json, or export again",
    ),
    "int8-unasked": (
        "unknown",
        "stored as INT8, and the config asks for something else",
        "Config and weights are not of one export.",
        "copy config.json from the export, or export the checkpoint again",
    ),
    "scheme-without-kernel": (
        "refused",
        "a scheme for which vLLM has no kernel",
        "INT8 kernels take symmetric weights, and activations per token and dynamic, "
        "or per tensor and static.",
        "export the checkpoint again with such a scheme",
    ),
    "float-not-excluded": (
        "wrong",
        "stored as floats, yet exclude does not name it",
        "vLLM reads it as INT8: floats are cut to whole numbers, and the scales that "
        "the export does not hold stay memory that nothing wrote. Garbage.",
        "add the names to exclude in config.json (--fix does), or export again",
    ),
    "weight-misshapen": (
        "refused",
        "a weight that is neither [N, K] nor [E, N, K]",
        "No layer takes it.",
        "export the checkpoint again",
    ),
    "scale-missing": (
        "wrong",
        "an INT8 weight without its scale",
        "The scale would stay memory that nothing wrote, or 1.",
        "export the checkpoint again, or download the shard that has it",
    ),
    "scale-of-other-dtype": (
        "unknown",
        "scales or zero points of a dtype that Quark does not write",
        "They would be cast without a word.",
        "export the checkpoint again",
    ),
    "scale-misshapen": (
        "refused",
        "scales that do not fit their weight",
        "One a channel or one a tensor is what a layer takes, as its config says.",
        "export the checkpoint again, or correct qscheme in config.json",
    ),
    "static-scale-of-dynamic": (
        "unknown",
        "stored scales of activations that the config calls dynamic",
        "The config is not that of this export.",
        "correct input_tensors in config.json, or export again",
    ),
    "experts-miscounted": (
        "wrong",
        "not as many experts as config.json counts",
        "An expert that is not there would stay memory that nothing wrote.",
        "download what is missing, or correct the number of experts in config.json",
    ),
}
PROBLEMS = tuple(_PROBLEMS)


def _layout_issues(layout: Layout) -> Iterator[Issue]:
    by_id: dict[str, list[str]] = defaultdict(list)
    errors: dict[str, str] = {}
    for problem in layout.problems():
        by_id[problem.id].append(problem.name)
        errors.setdefault(problem.id, str(problem.error))
    for id, names in by_id.items():
        outcome, summary, why, remedy = _PROBLEMS[id]
        severity: Severity = "wrong" if outcome == "wrong" else "refused"
        fork = "This fork (patch 0010) refuses it: "
        yield Issue(
            finding(id, severity, summary, f"{why} {fork}{errors[id]}", remedy, names),
            on(stock(), outcome) | on(FORK, "refused"),
        )


# --- releases that know no such layer ---------------------------------------------


def _too_old(layout: Layout, int8: list[Int8Module]) -> dict[str, Issue]:
    """Fact -> the releases that lack it refuse what the checkpoint has."""
    kinds: dict[str, list[str]] = {"int8-experts": [], "per-token": []}
    for name, module, layer in int8:
        if layout.experts_prefix(name, module) is not None:
            kinds["int8-experts"].append(name)
        elif not is_static(layer):
            kinds["per-token"].append(name)
    what = {
        "int8-experts": "INT8 experts",
        "per-token": "INT8 layers with activations per token",
    }
    return {
        id: Issue(
            finding(
                f"{id}-unknown",
                "refused",
                f"vLLM {listed(without(id))} knows no {what[id]}",
                "It ends with an error while the model is built.",
                f"vLLM {fact(id).since} or later, or this fork",
                names,
            ),
            on(without(id), "refused"),
        )
        for id, names in kinds.items()
        if names
    }


# --- schemes ----------------------------------------------------------------------


def _scheme_issues(
    layout: Layout, int8: list[Int8Module], but: set[str]
) -> Iterator[Issue]:
    static_channels, tensor_scales, asymmetric = [], [], []
    for name, module, layer in int8:
        if not is_int8(layer):
            continue
        weight, inputs = part_of(layer, "weight"), part_of(layer, "input_tensors")
        static, per_channel = is_static(layer), weight.get("qscheme") == "per_channel"
        fused = layout.experts_prefix(name, module) is not None
        if fused and static and per_channel:
            static_channels.append(name)
        if fused and not static and not per_channel:
            tensor_scales.append(name)
        is_asymmetric = static and inputs.get("symmetric") is False
        if fused and is_asymmetric and INPUT_ZERO_POINT in module:
            asymmetric.append(f"{name}.{INPUT_ZERO_POINT}")
    if tensor_scales:
        old = without("expert-tensor-scales", but)
        yield Issue(
            finding(
                "expert-tensor-scales",
                "wrong",
                "experts with one scale a tensor and activations per token",
                f"vLLM {listed(old)} gives every expert the first expert's scale, on "
                "GPUs, without a word: garbage.",
                "this fork: patch 0009 gives each expert its own",
                tensor_scales,
            ),
            on(old, "wrong"),
        )
    if static_channels:
        old = without("expert-static-refusal", but)
        yield Issue(
            finding(
                "expert-static-channels",
                "wrong",
                "experts with one scale a channel and static activations",
                f"The Triton kernel of vLLM {listed(old)} takes scales of other "
                "channels: garbage. This fork refuses it on GPUs (patch 0009) but "
                "Hopper (patch 0012), and computes it there and on CPUs (patch 0007).",
                "export with dynamic activations or per-tensor weights, or run this "
                "fork on a Hopper GPU or a CPU",
                static_channels,
            ),
            on(old, "wrong") | on([FORK_GPU], "refused"),
        )
    if asymmetric:
        yield Issue(
            finding(
                "expert-zero-points",
                "wrong",
                "experts with static, asymmetric activations",
                "INT8 kernels ignore the zero points of activations of experts. Unless "
                "all are 0, which --deep tells, answers are wrong; this fork (patch "
                "0010) refuses such a checkpoint.",
                "export the checkpoint again with symmetric activations",
                asymmetric,
            ),
            on(stock(), "wrong") | on(FORK, "refused"),
        )


# --- exclude ------------------------------------------------------------------------


class _Stock:
    """How releases match `exclude`, with or without knowing what they fuse."""

    def __init__(self, layout: Layout, architecture: str) -> None:
        known = facts_file()["architecture"].get(architecture)
        self.is_listed = known is not None
        self.renames: Mapping[str, str] = (known or {}).get("renames", {})
        self.globs = [
            entry for entry in layout.exclude.patterns if not entry.startswith("re:")
        ]
        entries = set(layout.config["exclude"]).difference(self.globs)
        self.entries = Entries.of(self._rename(entry) for entry in entries)
        self.shard_of = {
            shard: (fused, shards)
            for fused, shards in FUSED.items()
            for shard in shards
        }

    def _rename(self, name: str) -> str:
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return name

    def excludes(self, name: str, finds_fused: bool) -> bool:
        """Whether the layer of vLLM that takes this module is left unquantized."""
        parent, _, last = self._rename(name).rpartition(".")
        fused, shards = self.shard_of.get(last, (last, [last]))
        names = [f"{parent}.{shard}" for shard in shards]
        if not finds_fused and self.is_listed:
            names = [f"{parent}.{fused}"]
        return all(self.entries.match(each) for each in names)


def _exclude_issues(
    layout: Layout, architecture: str, but: set[str]
) -> Iterator[Issue]:
    stock = _Stock(layout, architecture)
    fused, patterns, experts, by_name = [], [], [], False
    in_part: dict[str, dict[str, bool]] = defaultdict(dict)
    for name, module in layout.modules.items():
        weight = module.get(WEIGHT)
        last = name.rpartition(".")[2]
        if weight is None or last not in layout.linear_names:
            continue
        if len(weight.shape) < 2 or not layout.is_loaded(name):
            continue
        try:
            prefix = layout.experts_prefix(name, module)
            layer = layout.layer_config(name, module)
        except ValueError:
            continue  # told by layout.problems
        if prefix is None and last in stock.shard_of:
            group = f"{name.rpartition('.')[0]}.{stock.shard_of[last][0]}"
            in_part[group][name] = layer is None
        if layer is not None or weight.dtype == "I8" or not _is_quantized(layout, name):
            continue
        if prefix is not None:
            experts.append(name)
            if not stock.entries.match(prefix):
                by_name = True
        elif not stock.excludes(name, finds_fused=True):
            patterns.append(name)
        elif not stock.excludes(name, finds_fused=False):
            fused.append(name)
    if fused:
        old = without("fused-names", but)
        yield Issue(
            finding(
                "exclude-fused",
                "wrong",
                f"vLLM {listed(old)} would read {_what(fused)} as INT8: garbage",
                f"It fuses them, and does not find the fused layers of {architecture} "
                "in exclude: their floats are cut to whole numbers without a word, and "
                "scales that the export does not hold stay memory that nothing wrote.",
                f"vLLM {fact('fused-names').since} or later, or this fork: patch 0003; "
                "or vLLM's own names of the fused layers in exclude in config.json "
                "(--fix adds them)",
                fused,
            ),
            on(old, "wrong"),
        )
    if patterns:
        old = without("quark-patterns", but)
        kind = "globs" if stock.globs else "patterns"
        yield Issue(
            finding(
                "exclude-patterns",
                "wrong",
                f"exclude names {_what(patterns)} by {kind}, which no release reads",
                f"vLLM {listed(old)} knows full names and re: with its own names for "
                "modules, so it would read these as INT8: garbage.",
                "this fork: patch 0008; or full names in exclude in config.json "
                "(--fix does)",
                patterns,
            ),
            on(old, "wrong"),
        )
    if experts:
        old = without("expert-names", but)
        yield Issue(
            finding(
                "exclude-experts",
                "wrong" if by_name else "refused",
                "exclude names experts, which no release looked into leaves as floats",
                f"vLLM {listed(old)} fuses the experts under one name. Where exclude "
                "does not have that name it would read them as INT8, garbage; where it "
                "has, it takes them for a linear layer, and ends with an error.",
                "this fork: patch 0008",
                experts,
            ),
            on(old, "wrong" if by_name else "refused"),
        )
    mixed = {
        group: excluded
        for group, excluded in in_part.items()
        if len(set(excluded.values())) > 1
    }
    if mixed:
        group, excluded = next(iter(mixed.items()))
        old = without("fused-names", but) if stock.is_listed else []
        yield Issue(
            finding(
                "exclude-in-part",
                "wrong" if old else "refused",
                "exclude names some shards of layers that vLLM fuses",
                str(mixed_shards(group, excluded)),
                f"{EXPORT_AGAIN} with all shards of a fused layer excluded or none",
                mixed,
            ),
            on(targets(), "refused") | on(old, "wrong"),
        )


def _is_quantized(layout: Layout, name: str) -> bool:
    """Whether the config asks for INT8 but for `exclude`."""
    override = find_override(name, layout.config, layout.overrides)
    return is_int8(override or layout.config["global_quant_config"])


def _what(names: list[str]) -> str:
    """`shared experts and dense layers`, as far as the modules' names tell."""
    kinds = {
        "share": "shared experts",
        "self_attn": "attention",
        ".mlp.": "dense layers",
        "": "other modules",
    }
    found = {
        next(words for mark, words in kinds.items() if mark in name) for name in names
    }
    return " and ".join(words for words in kinds.values() if words in found)


# --- overrides ------------------------------------------------------------------------


def _stock_layer(layout: Layout, name: str) -> Config:
    """The config that releases take for a layer of that name."""
    for entry, layer in (layout.config.get("layer_quant_config") or {}).items():
        # Known there: full names and globs with a star.
        is_glob = "*" in entry and not entry.startswith("re:")
        if matches(name, entry) if is_glob else name == entry:
            return layer
    return layout.config["global_quant_config"]


def _override_issues(
    layout: Layout, int8: list[Int8Module], but: set[str]
) -> Iterator[Issue]:
    if not any(
        layout.config.get(key)
        for key in ("layer_quant_config", "layer_type_quant_config")
    ):
        return
    names = []
    cached: dict[str, Config] = {}
    for name, module, layer in int8:
        asked = layout.experts_prefix(name, module) or name
        if asked not in cached:
            cached[asked] = _stock_layer(layout, asked)
        stock = cached[asked]
        if any(
            part_of(stock, kind).get(key) != part_of(layer, kind).get(key)
            for kind in ("weight", "input_tensors")
            for key in ("dtype", "qscheme", "is_dynamic", "symmetric")
        ):
            names.append(name)
    if names:
        old = without("quark-overrides", but)
        yield Issue(
            finding(
                "override-unread",
                "refused",
                "overrides of the config that no release follows",
                f"vLLM {listed(old)} matches layer_type_quant_config with nothing, and "
                "layer_quant_config with no expert, so it expects other scales than "
                "are stored.",
                "this fork: patch 0008",
                names,
            ),
            on(old, "refused"),
        )


# --- how scales and zero points are stored ----------------------------------------


def _storage_issues(
    layout: Layout, int8: list[Int8Module], but: set[str]
) -> Iterator[Issue]:
    linear: list[str] = []
    experts: list[str] = []
    vectors, zero_points = [], []
    for name, module, layer in int8:
        fused = layout.experts_prefix(name, module) is not None
        per_channel = part_of(layer, "weight").get("qscheme") == "per_channel"
        weight = module[WEIGHT]
        rank = len(weight.shape) - 1  # of a vector of scales
        for suffix in COMPANIONS[:2]:
            tensor = module.get(suffix)
            if tensor is None or not per_channel:
                continue
            if len(tensor.shape) == rank + 1 and tensor.shape[-1] == 1:
                (experts if fused else linear).append(tensor.name)
            elif fused and suffix == SCALE:
                vectors.append(tensor.name)
        if ZERO_POINT in module:
            zero_points.append(module[ZERO_POINT].name)
    if linear:
        old = without("linear-columns", but)
        yield Issue(
            finding(
                "scale-columns",
                "refused",
                "scales of linear layers stored as columns [N, 1]",
                f"vLLM {listed(old)} expects [N] and ends with an assertion that names "
                "nothing.",
                f"vLLM {fact('linear-columns').since} or later, or this fork: patch "
                "0001; or store them as [N] (--fix does)",
                linear,
            ),
            on(old, "refused"),
        )
    if experts:
        old = without("stored-expert-columns", but)
        yield Issue(
            finding(
                "expert-scale-columns",
                "refused",
                "scales of experts stored as columns [N, 1]",
                f"vLLM {listed(old)} ends with a RuntimeError while it loads them.",
                "this fork: patch 0010; or store them as [N] (--fix does)",
                experts,
            ),
            on(old, "refused"),
        )
    if vectors:
        old = without("expert-columns", but)
        yield Issue(
            finding(
                "expert-scale-vectors",
                "note",
                "scales of experts are vectors [N], as Quark writes them",
                f"vLLM {listed(old)} hands them to its kernels as [E, N], later ones "
                "and this fork (patch 0002) as [E, N, 1]. The Triton kernel reads the "
                "same numbers from both.",
                "nothing to do",
                vectors,
            ),
            {},
        )
    if zero_points:
        yield Issue(
            finding(
                "zero-points-stored",
                "note",
                "zero points are stored beside symmetric weights",
                "INT8 kernels ignore them. They change nothing if all are 0, which "
                "--deep tells; this fork (patch 0010) looks before it loads.",
                "nothing to do if --deep finds them 0",
                zero_points,
            ),
            {},
        )
    after = {
        index
        for name in layout.modules
        if not layout.is_loaded(name) and (index := layer_index(name)) is not None
    }
    if after:
        yield Issue(
            finding(
                "layers-after-the-last",
                "note",
                f"layers {spans(after)} come after the last of config.json",
                "They hold multi-token prediction, which vLLM loads as a model of its "
                "own.",
                "nothing to do",
            ),
            {},
        )
