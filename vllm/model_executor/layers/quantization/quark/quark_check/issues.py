# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is wrong with a checkpoint, and what comes of it on which vLLM.

Of this fork the engine's own checks decide, or the same told from what is known of the
model (known.py); of releases it is told from their models and their way to read a
config (stock.py). What is not known is said so.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from vllm.model_executor.layers.quantization.quark.export import (
    COMPANIONS,
    INPUT_ZERO_POINT,
    SCALE,
    ZERO_POINT,
    Stored,
    int8_with_scales,
)
from vllm.model_executor.layers.quantization.quark.problems import KINDS, Problem
from vllm.model_executor.layers.quantization.quark.quark_check.architectures import (
    LEAVES,
    Asked,
)
from vllm.model_executor.layers.quantization.quark.quark_check.findings import (
    Finding,
    Severity,
    finding,
)
from vllm.model_executor.layers.quantization.quark.quark_check.known import Int8, Known
from vllm.model_executor.layers.quantization.quark.quark_check.opened import (
    Checkpoint,
    quantization_config,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import (
    FORK,
    FORK_CPU,
    FORK_GPU,
    Outcome,
    fact,
    listed,
    on,
    stock,
    targets,
    without,
)
from vllm.model_executor.layers.quantization.quark.quark_check.stock import (
    Decision,
    StockConfig,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    Config,
    is_int8,
    is_static,
    part_of,
)

# What --deep finds that this fork refuses.
_REFUSED_WHEN_READ = ("non-finite", "scale-not-positive", "zero-point-not-zero")
# Told of releases by what they do with these very layers, not by the kind of problem.
_TOLD_OTHERWISE = ("float-not-excluded", "shards-differ")


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


def find_issues(checkpoint: Checkpoint, known: Known | None) -> Iterator[Issue]:
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
    if checkpoint.has_keys_twice:
        yield Issue(
            finding(
                "keys-twice",
                "note",
                "config.json has a key twice",
                "The last one counts, to transformers and here.",
                "delete the other one",
            ),
            {},
        )
    if checkpoint.problem is not None:
        yield _config_unreadable(checkpoint.problem)
    elif known is None:
        yield from _without_int8(checkpoint)
    else:
        too_old = _too_old(known)
        # What a release makes of a checkpoint that it refuses anyhow is of no interest.
        but = {name for issue in too_old.values() for name in issue.outcomes}
        yield from _fork_issues(known)
        yield from too_old.values()
        yield from _unknown_issues(checkpoint, known, but)
        yield from _scheme_issues(known.int8, but)
        yield from _release_issues(known, but)
        yield from _storage_issues(known, but)


def _config_unreadable(problem: ValueError) -> Issue:
    kind = KINDS["config-unreadable"]
    return Issue(
        finding(kind.id, "refused", kind.summary, str(problem), kind.remedy),
        on(targets(), "refused"),
    )


def _without_int8(checkpoint: Checkpoint) -> Iterator[Issue]:
    int8 = [tensor.name for tensor in int8_with_scales(checkpoint.tensors)]
    if int8 and quantization_config(checkpoint.model) is None:
        kind = KINDS["config-lost"]
        yield Issue(
            finding(
                kind.id,
                "wrong",
                kind.summary,
                f"{kind.why} This fork refuses it.",
                kind.remedy,
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


# --- what this fork's engine says ---------------------------------------------------


def _fork_issues(known: Known) -> Iterator[Issue]:
    by_id: dict[str, list[Problem]] = defaultdict(list)
    for problem in known.problems:
        by_id[problem.id].append(problem)
    for id, problems in by_id.items():
        kind = KINDS[id]
        names = list(dict.fromkeys(each.name for each in problems))
        if kind.severity == "warning":
            # What releases make of it is told by what they do with the very layers.
            yield Issue(
                finding(id, "note", kind.summary, kind.why, kind.remedy, names), {}
            )
            continue
        outcome = "right" if id in _TOLD_OTHERWISE else kind.stock
        severity: Severity = "wrong" if outcome == "wrong" else "refused"
        why = f"{kind.why} This fork (patch 0010) refuses it: {problems[0].error}"
        remedy = problems[0].remedy or kind.remedy
        yield Issue(
            finding(id, severity, kind.summary, why, remedy, names),
            on(stock(), outcome) | on(FORK, "refused"),
        )
    yield from _load_issues(known)


def _load_issues(known: Known) -> Iterator[Issue]:
    """What the model itself says when it is built and loaded, or what it was seen to
    say."""
    looked, structure = known.looked, known.structure
    if structure is None:
        return
    if structure.only_text:
        yield _only_text()
    if looked is None or not structure.is_derived:
        if error := structure.refuses(each.name for each in known.int8):
            yield _does_not_load(error, FORK)
        return
    engine, here = looked.engine, FORK_CPU if looked.platform == "cpu" else FORK_GPU
    if engine.stage and not _is_told(engine.error, known.problems):
        # A kernel that is missing on this platform is a matter of this platform.
        is_here = engine.error.startswith("NotImplementedError")
        yield _does_not_load(engine.error, [here] if is_here else FORK)


def _is_told(error: str, problems: Iterable[Problem]) -> bool:
    return any(str(each.error) in error for each in problems)


def _does_not_load(error: str, names: Iterable[str]) -> Issue:
    return Issue(
        finding(
            "model-does-not-load",
            "refused",
            "the model cannot be built, or does not take these tensors",
            error,
            "an export that the model takes: upstream's own matter, such as names of "
            "tensors or a scheme without a kernel",
        ),
        on(names, "refused"),
    )


def _only_text() -> Issue:
    return Issue(
        finding(
            "text-alone",
            "note",
            "seen without the model's images",
            "With them the model of this vLLM does not load the checkpoint: the names "
            "of those tensors are not those that it takes.",
            "--language-model-only, or limit_mm_per_prompt of 0 images",
        ),
        {},
    )


# --- what is not known --------------------------------------------------------------


def _unknown_issues(
    checkpoint: Checkpoint, known: Known, but: set[str]
) -> Iterator[Issue]:
    if known.structure is None:
        yield Issue(
            finding(
                "model-unknown",
                "note",
                f"what vLLM makes of {checkpoint.architecture} is not known",
                known.why_not,
                "run `vllm quark-check` where the vLLM that you serve with is "
                "installed: it asks the model itself",
            ),
            on(FORK, "unknown"),
        )
    elif known.unknown:
        yield Issue(
            finding(
                "module-unknown",
                "note",
                "where these tensors go is not known",
                "No release that was looked into has told it of this architecture.",
                "run `vllm quark-check` where the vLLM that you serve with is "
                "installed: it asks the model itself",
                known.unknown,
            ),
            on(FORK, "unknown"),
        )
    lacking = [
        row
        for row in stock()
        if row not in but
        and (
            row not in known.releases
            or any(each.unknown(known.export.tensors) for each in known.releases[row])
        )
    ]
    if lacking:
        yield Issue(
            finding(
                "releases-unknown",
                "note",
                f"what vLLM {listed(lacking)} makes of it is not known",
                "Of those releases nothing, or not all, is known of this architecture.",
                "nothing to do",
            ),
            on(lacking, "unknown"),
        )
    yield from _cpu_issues(known)
    others = [
        stored.weight.name
        for _, layer in known.layers.values()
        if layer.config is not None and not is_int8(layer.config)
        for stored in layer.weights
    ]
    if others:
        yield Issue(
            finding(
                "other-schemes",
                "note",
                "layers of other schemes beside INT8",
                "Those are upstream's matter, and not looked into.",
                "nothing to do",
                others,
            ),
            on(targets(), "unknown"),
        )


def _cpu_issues(known: Known) -> Iterator[Issue]:
    structure = known.structure
    if structure is None:
        return
    # What a model was seen to lack was seen without that setting.
    is_told = structure.is_derived or os.environ.get("VLLM_MLA_DISABLE", "0") != "1"
    is_here = known.looked is None or known.looked.platform == "cpu"
    for each in structure.lacks_on_cpu if is_told and is_here else ():
        yield Issue(
            finding(
                "platform-lacks",
                "refused",
                "this platform cannot compute the model's attention",
                each,
                "VLLM_MLA_DISABLE=1, for models with multi-head latent attention",
            ),
            on([FORK_CPU], "refused"),
        )
    if not known.cpu:
        yield Issue(
            finding(
                "cpu-unknown",
                "note",
                "nobody has seen this architecture run on a CPU",
                "Upstream's CPU platform lacks some models' layers.",
                "see docs/families.md for those that were run",
            ),
            on([FORK_CPU], "unknown"),
        )


# --- releases that know no such layer -------------------------------------------------


def _too_old(known: Known) -> dict[str, Issue]:
    """Fact -> the releases that lack it refuse what the checkpoint has."""
    kinds: dict[str, list[str]] = {"int8-experts": [], "per-token": []}
    for asked, layer in known.layers.values():
        fused = asked.prefix if asked.kind == "experts" else ""
        for each in layer.weights:
            # Floats, too, that the config would have as INT8.
            config = layer.config or known.export.config_of(*each.names(fused))
            if is_int8(config):
                if fused:
                    kinds["int8-experts"].append(each.module)
                elif not is_static(config or {}):
                    kinds["per-token"].append(each.module)
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


def _scheme_issues(int8: list[Int8], but: set[str]) -> Iterator[Issue]:
    static_channels, tensor_scales, asymmetric = [], [], []
    for each in int8:
        weight = part_of(each.config, "weight")
        inputs = part_of(each.config, "input_tensors")
        static = is_static(each.config)
        per_channel = weight.get("qscheme") == "per_channel"
        if each.is_experts and static and per_channel:
            static_channels.append(each.name)
        if each.is_experts and not static and not per_channel:
            tensor_scales.append(each.name)
        is_asymmetric = static and inputs.get("symmetric") is False
        is_stored = INPUT_ZERO_POINT in each.stored.companions
        if each.is_experts and is_asymmetric and is_stored:
            asymmetric.append(f"{each.name}.{INPUT_ZERO_POINT}")
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


# --- what releases make of each layer -------------------------------------------------

# What a release does with a layer -> how bad it is, and the finding's texts.
WRONG = {
    "exclude-fused": (
        "would read {what} as INT8: garbage",
        "It fuses them, and its model does not say from what, so it does not find the "
        "fused layers in exclude: their floats are cut to whole numbers without a "
        "word, and scales that the export does not hold stay memory that nothing "
        "wrote.",
        "this fork, or a release whose model says what it fuses (patch 0003 for "
        "Step-3.5); or vLLM's own names of the fused layers in exclude in config.json "
        "(--fix adds them)",
    ),
    "exclude-patterns": (
        "does not find {what} in exclude: garbage",
        "It knows full names and re: with its own names for modules, and no globs, so "
        "it would read these floats as INT8.",
        "this fork: patch 0008; or full names in exclude in config.json (--fix does)",
    ),
    "exclude-experts": (
        "would read experts that exclude names as INT8: garbage",
        "It fuses the experts under one name, which exclude does not have.",
        "this fork: patch 0008",
    ),
    "float-not-excluded": (
        "would read {what} as INT8: garbage",
        "They are stored as floats, and exclude does not name them. This fork reads "
        "what is stored.",
        "this fork: patch 0010; or their names in exclude in config.json (--fix adds "
        "them)",
    ),
    "model-does-not-load": (
        "leaves parameters without numbers: garbage",
        "Its model does not take these INT8 weights as they are stored: {refusal}.",
        "an export that leaves these layers as floats",
    ),
    "int8-left-float": (
        "would read {what} as floats: garbage",
        "It finds them in exclude, or in an override that leaves them alone, by rules "
        "that are not Quark's.",
        "this fork: patch 0008",
    ),
}
REFUSED = {
    "override-unread": (
        "overrides of the config that {old} does not follow",
        "It matches layer_type_quant_config with nothing, and layer_quant_config with "
        "no expert, so it expects other scales than are stored.",
        "this fork: patch 0008",
    ),
    "exclude-experts": (
        "exclude names experts, which {old} takes for a linear layer",
        "It ends with an error while the model is built.",
        "this fork: patch 0008",
    ),
    "exclude-in-part": (
        "{old} finds some shards of a fused layer in exclude, and not others",
        "It ends with an error while the model is built.",
        "full names of all of them in exclude in config.json (--fix does)",
    ),
    "scheme-unread": (
        "{old} has no scheme for a layer that the config leaves as floats, or for its "
        "outputs",
        "It ends with NotImplementedError while the model is built.",
        "this fork: patch 0010",
    ),
    "config-unread": (
        "{old} cannot read the quantization_config",
        "It ends with an error before the model is built: {refusal}.",
        "this fork: patch 0010",
    ),
    "model-does-not-load": (
        "the model of {old} does not take the tensors",
        "Its loader ends with {refusal}.",
        "an export that leaves these layers as floats",
    ),
}


def _release_issues(known: Known, but: set[str]) -> Iterator[Issue]:
    # (finding, "wrong" or "refused") -> release -> names of modules; refusals by id.
    found: dict[tuple[str, Outcome], dict[str, list[str]]] = {}
    refusals: dict[str, str] = {}

    def note(id: str, outcome: Outcome, row: str, names: Iterable[str]) -> None:
        by_row = found.setdefault((id, outcome), {})
        by_row.setdefault(row, []).extend(names)

    for row, structures in known.releases.items():
        if row in but:
            continue
        for structure in structures:
            config = StockConfig(known.export.config, structure.mappers)
            if config.refusal:
                note("config-unread", "refused", row, [])
                refusals["config-unread"] = config.refusal
                continue
            if error := structure.refuses(each.name for each in known.int8):
                id = "model-does-not-load"
                outcome: Outcome = "wrong" if error.startswith(LEAVES) else "refused"
                note(id, outcome, row, [])
                refusals[id] = f"{error:.200}"
            for prefix, asked in structure.layers.items():
                if prefix not in known.layers:
                    continue
                weights = known.layers[prefix][1].weights
                own = known.layers[prefix][1].config
                decision = config.decide(asked)
                if told := _told(known, config, decision, asked, weights, own):
                    note(*told, row, [each.module for each in weights])
    for (id, outcome), by_row in found.items():
        rows = [row for row in stock() if row in by_row]
        names = list(dict.fromkeys(n for each in by_row.values() for n in each))
        old = f"vLLM {listed(rows)}"
        if outcome == "wrong":
            summary, why, remedy = WRONG[id]
            summary = f"{old} {summary}"
        else:
            summary, why, remedy = REFUSED[id]
        words = {"what": _what(names), "old": old, "refusal": refusals.get(id, "")}
        yield Issue(
            finding(
                id,
                outcome if outcome in ("wrong", "refused") else "note",
                summary.format(**words),
                why.format(**words),
                remedy,
                names,
            ),
            on(rows, outcome),
        )


def _told(
    known: Known,
    config: StockConfig,
    decision: Decision,
    asked: Asked,
    weights: Iterable[Stored],
    own: Config | None,
) -> tuple[str, Outcome] | None:
    """What comes of a release's decision about a layer, where it is not right: the
    finding, and how bad it is."""
    weights = list(weights)
    have_floats = any(each.is_float for each in weights)
    have_int8 = any(each.weight.dtype == "I8" for each in weights)
    if decision.refusal:
        if asked.kind == "experts":
            return "exclude-experts", "refused"
        return "exclude-in-part", "refused"
    if decision.config is None:
        return ("int8-left-float", "wrong") if have_int8 else None
    if decision.config.get("output_tensors") or decision.config.get("bias"):
        return "scheme-unread", "refused"
    if not decision.config.get("weight"):
        return "scheme-unread", "refused"
    if not is_int8(decision.config):
        return None  # another scheme, which is not looked into
    if have_floats:
        return _cause(known, config, asked, weights), "wrong"
    if have_int8 and own is not None and _differ(decision.config, own):
        return "override-unread", "refused"
    return None


def _cause(
    known: Known, config: StockConfig, asked: Asked, weights: list[Stored]
) -> str:
    """Why a release reads a float layer as INT8."""
    fused = asked.prefix if asked.kind == "experts" else ""
    configs = (known.export.config_of(*each.names(fused)) for each in weights)
    if any(is_int8(each) for each in configs):
        return "float-not-excluded"
    if asked.kind == "experts":
        return "exclude-experts"
    shards = tuple(each.module.rpartition(".")[2] for each in weights)
    # As if the model said what it fuses.
    as_told = config.decide(replace(asked, packed=shards))
    is_found = not as_told.refusal and as_told.config is None
    return "exclude-fused" if is_found else "exclude-patterns"


def _differ(one: Config, other: Config) -> bool:
    return any(
        part_of(one, kind).get(key) != part_of(other, kind).get(key)
        for kind in ("weight", "input_tensors")
        for key in ("dtype", "qscheme", "is_dynamic", "symmetric")
    )


def _what(names: list[str]) -> str:
    """`shared experts and dense layers`, as far as the modules' names tell."""
    kinds = {
        "share": "shared experts",
        "self_attn": "attention",
        ".gate": "routers",
        "router": "routers",
        ".mlp.": "dense layers",
        "": "other modules",
    }
    found = {
        next(
            words
            for mark, words in kinds.items()
            if (name.endswith(mark) if mark == ".gate" else mark in name)
        )
        for name in names
    }
    return " and ".join(dict.fromkeys(w for w in kinds.values() if w in found))


# --- how scales and zero points are stored ----------------------------------------


def _storage_issues(known: Known, but: set[str]) -> Iterator[Issue]:
    linear: list[str] = []
    experts: list[str] = []
    vectors, zero_points = [], []
    for each in known.int8:
        per_channel = part_of(each.config, "weight").get("qscheme") == "per_channel"
        rank = len(each.stored.weight.shape) - 1  # of a vector of scales
        for suffix in COMPANIONS[:2]:
            tensor = each.stored.companions.get(suffix)
            if tensor is None or not per_channel:
                continue
            if len(tensor.shape) == rank + 1 and tensor.shape[-1] == 1:
                (experts if each.is_experts else linear).append(tensor.name)
            elif each.is_experts and suffix == SCALE:
                vectors.append(tensor.name)
        if ZERO_POINT in each.stored.companions:
            zero_points.append(each.stored.companions[ZERO_POINT].name)
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
    cache = _key_value_cache(known)
    if cache:
        yield Issue(
            finding(
                "key-value-cache",
                "note",
                "scales of a quantized key/value cache",
                "They are used where the cache is kept in that format "
                "(--kv-cache-dtype fp8), and change nothing elsewhere.",
                "nothing to do",
                cache,
            ),
            {},
        )


def _key_value_cache(known: Known) -> list[str]:
    return [name for name in known.export.tensors if name.endswith(".output_scale")]
