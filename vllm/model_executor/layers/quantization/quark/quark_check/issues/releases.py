# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What releases make of each layer."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..architectures import LEAVES, Asked
from ..findings import finding
from ..known import Known
from ..releases import Outcome, fact, on
from ..rules import Config, is_int8, is_static, part_of
from ..stock import Decision, StockConfig
from ..weights import Stored
from .issue import Issue


def too_old(known: Known) -> dict[str, Issue]:
    """Fact -> the releases that lack it refuse what the checkpoint has."""
    kinds: dict[str, list[str]] = {
        "int8-experts": [],
        "per-token": [],
        "expert-static": [],
    }
    for asked, layer in known.layers.values():
        fused = asked.prefix if asked.kind == "experts" else ""
        for each in layer.weights:
            # Floats, too, that the config would have as INT8.
            config = layer.config or known.export.config_of(*each.names(fused))
            if is_int8(config):
                if fused:
                    kinds["int8-experts"].append(each.module)
                    if is_static(config or {}):
                        kinds["expert-static"].append(each.module)
                elif not is_static(config or {}):
                    kinds["per-token"].append(each.module)
    found: dict[str, Issue] = {}
    but: set[str] = set()
    for id, names in kinds.items():
        lacking = known.scope.without(id, but if id == "expert-static" else ())
        if not names or not lacking:
            continue
        summary, why = TOO_OLD[id]
        # Experts need both.
        needed = "expert-static" if kinds["expert-static"] else id
        found[id] = Issue(
            finding(
                f"{id}-unknown",
                "refused",
                f"vLLM {known.scope.listed(lacking)} {summary}",
                why,
                f"{fact(needed).remedy}this fork",
                names,
            ),
            on(lacking, "refused"),
        )
        but.update(lacking)
    return found


# Fact -> what a release without it does with what needs it, and how.
TOO_OLD = {
    "int8-experts": (
        "knows no INT8 experts",
        "It ends with an error while the model is built.",
    ),
    "per-token": (
        "knows no INT8 layers with activations per token",
        "It ends with an error while the model is built.",
    ),
    "expert-static": (
        "does not run experts with static activations",
        "It ends with an error when the model first runs: 'NoneType' object has no "
        "attribute 'is_monolithic'.",
    ),
}


# What a release does with a layer -> how bad it is, and the finding's texts.
WRONG = {
    "exclude-fused": (
        "would read {what} as INT8",
        "It fuses them, and its model does not say from what, so it does not find the "
        "fused layers in exclude: their floats are cut to whole numbers without a "
        "word, and scales that the export does not hold stay memory that nothing "
        "wrote.",
        "this fork, or a release whose model says what it fuses (patch 0003 for "
        "Step-3.5); or vLLM's own names of the fused layers in exclude in config.json "
        "(--fix adds them)",
    ),
    "exclude-patterns": (
        "does not find {what} in exclude",
        "It knows full names and re: with its own names for modules, and no globs, so "
        "it would read these floats as INT8.",
        "this fork: patch 0008; or full names in exclude in config.json (--fix does)",
    ),
    "exclude-experts": (
        "would read experts that exclude names as INT8",
        "It fuses the experts under one name, which exclude does not have; from 0.26.0 "
        "on it finds them by their full names.",
        "this fork: patch 0008; or, from vLLM 0.26.0 on, full names in exclude in "
        "config.json (--fix does)",
    ),
    "float-not-excluded": (
        "would read {what} as INT8",
        "They are stored as floats, and exclude does not name them. This fork reads "
        "what is stored.",
        "this fork: patch 0010; or their names in exclude in config.json (--fix adds "
        "them)",
    ),
    "model-does-not-load": (
        "leaves parameters without numbers",
        "Its model does not take these INT8 weights as they are stored: {refusal}.",
        "an export that leaves these layers as floats",
    ),
    "int8-left-float": (
        "would read {what} as floats",
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


def release_issues(known: Known, but: set[str]) -> Iterator[Issue]:
    # (finding, "garbage" or "refused") -> release -> names of modules; refusals by id.
    found: dict[tuple[str, Outcome], dict[str, list[str]]] = {}
    refusals: dict[str, str] = {}
    # Those, too, of which this fork's model does not know where they go.
    int8 = [
        tensor.name.removesuffix(".weight")
        for tensor in known.export.tensors.values()
        if tensor.dtype == "I8" and tensor.name.endswith(".weight")
    ]

    def note(id: str, outcome: Outcome, row: str, names: Iterable[str]) -> None:
        by_row = found.setdefault((id, outcome), {})
        by_row.setdefault(row, []).extend(names)

    for row, structures in known.releases.items():
        if row in but:
            continue
        for structure in structures:
            config = StockConfig(
                known.export.config, known.scope.row(row), structure.mappers
            )
            if config.refusal:
                note("config-unread", "refused", row, [])
                refusals["config-unread"] = config.refusal
                continue
            if error := structure.refuses(int8):
                id = "model-does-not-load"
                outcome: Outcome = "garbage" if error.startswith(LEAVES) else "refused"
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
        rows = [row for row in known.scope.stock() if row in by_row]
        names = list(dict.fromkeys(n for each in by_row.values() for n in each))
        old = f"vLLM {known.scope.listed(rows)}"
        if outcome == "garbage":
            summary, why, remedy = WRONG[id]
            summary = f"{old} {summary}"
        else:
            summary, why, remedy = REFUSED[id]
        words = {"what": _what(names), "old": old, "refusal": refusals.get(id, "")}
        yield Issue(
            finding(
                id,
                outcome if outcome in ("garbage", "refused") else "note",
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
        return ("int8-left-float", "garbage") if have_int8 else None
    if decision.config.get("output_tensors") or decision.config.get("bias"):
        return "scheme-unread", "refused"
    if not decision.config.get("weight"):
        return "scheme-unread", "refused"
    if not is_int8(decision.config):
        return None  # another scheme, which is not looked into
    if have_floats:
        return _cause(known, config, asked, weights), "garbage"
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
