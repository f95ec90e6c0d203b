# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which layer of vLLM takes which tensor of a checkpoint, and what it asks a config.

Told by the model itself (dry_run.py), or by architectures.json, which holds what the
models of real releases told about small checkpoints, with the numbers of layers and
experts as `*`; `make architectures` writes it. Of an architecture, or of a tensor, that
neither tells of, nothing is known. Needs Python alone.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .checkpoint import TensorInfo
from .dry_run import Module, Pass, is_structure

FILE = Path(__file__).with_name("architectures.json")
# How an error begins that no vLLM raises: a loader that leaves parameters unfilled.
LEAVES = "the loader leaves"
# What a loader's error is about.
_NAMED = re.compile(r"named '([\w.]+)'|([\w.]+\.weight)(?:_scale)?\b")
# Kinds of layers that a Quark config is asked about.
ASKED = ("linear", "experts")


@dataclass(frozen=True)
class Asked:
    """A layer that a quantization config is asked about, as `dry_run.Module` has it."""

    prefix: str
    kind: str
    packed: tuple[str, ...] | None = None
    mappers: int = 0
    num_experts: int | None = None


@dataclass(frozen=True)
class Place:
    """The module that takes a tensor; `asked` is None where no config is asked about
    it, so that it is never quantized."""

    module: str
    kind: str
    asked: Asked | None = None


class Renames:
    """How a model renames the modules of its checkpoint, as vLLM's WeightsMapper."""

    def __init__(self, renames: Mapping[str, Sequence[Sequence[str | None]]]) -> None:
        self.renames = renames

    def name(self, name: str) -> str | None:
        """The name in the model; None for what the model leaves out."""
        for pattern, new in self.renames.get("regex", ()):
            if re.search(pattern or "", name):
                if new is None:
                    return None
                name = re.sub(pattern or "", new, name)
        for old, new in self.renames.get("substr", ()):
            if old and old in name:
                if new is None:
                    return None
                name = name.replace(old, new, 1)
        for old, new in self.renames.get("prefix", ()):
            if name.startswith(old or ""):
                if new is None:
                    return None
                name = new + name.removeprefix(old or "")
        for old, new in self.renames.get("suffix", ()):
            if name.endswith(old or ""):
                if new is None:
                    return None
                name = name.removesuffix(old or "") + new
        return name

    def apply_list(self, values: Iterable[str]) -> list[str]:
        return [new for each in values if (new := self.name(each)) is not None]

    def apply_dict(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            new: value
            for each, value in values.items()
            if (new := self.name(each)) is not None
        }


@dataclass(frozen=True)
class Structure:
    """Where the tensors of one checkpoint go.

    places: tensor -> the module that takes it, None for none; what is not among them
    is not known. layers: those that the model has, by prefix. only_text: seen without
    the model's images, as it does not load with them. lacks_on_cpu: what upstream's
    CPU platform says that it cannot compute. int8_error: what the loader says
    to INT8 weights, "" where it takes them. is_derived: told by the model of this very
    checkpoint. gaps: why some of the model is missing in the checkpoint.
    """

    places: Mapping[str, Place | None]
    layers: Mapping[str, Asked]
    mappers: tuple[Renames, ...] = ()
    only_text: bool = False
    lacks_on_cpu: tuple[str, ...] = ()
    int8_error: str = ""
    is_derived: bool = False
    gaps: tuple[str, ...] = ()

    def refuses(self, int8: Iterable[str]) -> str:
        """`int8_error`, where it is about one of these INT8 modules of a checkpoint."""
        named = _NAMED.search(self.int8_error)
        name = (named[1] or named[2]) if named else ""
        name = name.removesuffix("_scale").removesuffix(".weight")
        last = name.rpartition(".")[2]
        is_about = any(not last or name.rpartition(".")[2] == last for name in int8)
        return self.int8_error if is_about else ""

    def unknown(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """The tensors that hold matrices, or what belongs to them, and of which it is
        not known where they go."""
        return [
            name
            for name, tensor in tensors.items()
            if len(tensor.shape) > 1 and is_structure(name) and name not in self.places
        ]


def _asked(module: Module) -> Asked | None:
    if module.prefix is None or module.kind not in ASKED:
        return None
    return Asked(
        module.prefix, module.kind, module.packed, module.mappers, module.num_experts
    )


def _best(modules: Iterable[tuple[str, Module]]) -> tuple[str, Module]:
    """Of the modules that take one tensor, that which a config is asked about."""
    return max(modules, key=lambda each: (_asked(each[1]) is not None, each[0]))


def of_dry_run(looked: Pass, tensors: Iterable[str]) -> Structure | None:
    """What the model of this very checkpoint says; None where it did not get so far."""
    if looked.stage:
        return None
    layers = {
        asked.prefix: asked
        for each in looked.modules.values()
        if (asked := _asked(each))
    }
    places: dict[str, Place | None] = {}
    for name in filter(is_structure, tensors):
        takers = [
            (module, looked.modules[module])
            for parameter in looked.taken.get(name, ())
            if (module := parameter.rpartition(".")[0]) in looked.modules
        ]
        if takers:
            module, found = _best(takers)
            places[name] = Place(module, found.kind, _asked(found))
        else:
            places[name] = None
    mappers = tuple(map(Renames, looked.mappers))
    return Structure(
        places, layers, mappers, looked.only_text, looked.lacks, is_derived=True
    )


# --- what releases told -----------------------------------------------------------


def general(name: str) -> tuple[str, tuple[int, ...]]:
    """`model.layers.*.mlp` and (3,) for `model.layers.3.mlp`."""
    parts, numbers = [], []
    for part in name.split("."):
        is_number = part.isascii() and part.isdigit() and len(part) < 10
        if is_number:
            numbers.append(int(part))
        parts.append("*" if is_number else part)
    return ".".join(parts), tuple(numbers)


def special(pattern: str, numbers: Sequence[int]) -> str:
    """The opposite, with as many of the numbers as the pattern has stars."""
    rest = iter(numbers)
    return ".".join(
        str(next(rest)) if part == "*" else part for part in pattern.split(".")
    )


@dataclass(frozen=True)
class Pattern:
    """What one release told about one architecture, with `*` for numbers.

    modules: pattern of a module -> what it is, with the patterns of the tensors that it
    takes; skipped: patterns of tensors that it takes not; with_images: how the names
    begin that keep it from loading with its images; depths: stems of names, such as
    `model.layers.`, of which there are as many as config.json has layers; skips_past:
    whether what lies beyond is left out. The rest is as in Structure.
    """

    modules: Mapping[str, Mapping[str, Any]]
    skipped: frozenset[str]
    mappers: tuple[Mapping[str, Any], ...]
    depths: tuple[str, ...]
    skips_past: bool
    with_images: tuple[str, ...]
    lacks: tuple[str, ...]
    int8_error: str

    @cached_property
    def takers(self) -> dict[str, str]:
        return {
            tensor: module
            for module, each in self.modules.items()
            for tensor in each["tensors"]
        }

    def structure(
        self, tensors: Iterable[str], depth: int | None, num_experts: int | None
    ) -> Structure:
        """Where the tensors of a checkpoint of that architecture go."""
        places: dict[str, Place | None] = {}
        layers: dict[str, Asked] = {}
        seen: dict[str, set[int]] = defaultdict(set)
        only_text = False
        for name in filter(is_structure, tensors):
            pattern, numbers = general(name)
            stem = next((each for each in self.depths if name.startswith(each)), None)
            if stem is not None and numbers and depth is not None:
                if numbers[0] >= depth:
                    if self.skips_past:
                        places[name] = None
                    continue
                seen[stem].add(numbers[0])
            module = self.takers.get(pattern)
            if module is None:
                is_image = name.startswith(self.with_images)
                only_text = only_text or is_image
                if is_image or pattern in self.skipped:
                    places[name] = None
                continue
            each = self.modules[module]
            asked = None
            if each.get("prefix") is not None and each["kind"] in ASKED:
                packed = each.get("packed")
                asked = Asked(
                    special(each["prefix"], numbers),
                    each["kind"],
                    None if packed is None else tuple(packed),
                    each.get("mappers", 0),
                    num_experts if each["kind"] == "experts" else None,
                )
                layers[asked.prefix] = asked
            places[name] = Place(special(module, numbers), each["kind"], asked)
        gaps = []
        for stem in self.depths:
            if depth is not None and len(seen[stem]) < depth:
                missing = next(i for i in range(depth) if i not in seen[stem])
                gaps.append(f"{stem}{missing}")
        return Structure(
            places,
            layers,
            tuple(map(Renames, self.mappers)),
            only_text,
            self.lacks,
            self.int8_error,
            gaps=tuple(gaps),
        )


@dataclass(frozen=True)
class Architecture:
    """What architectures.json has of one: `releases`, by version; `cpu`: the kinds of
    exports that this fork was seen to answer right on a CPU; `stock_cpu`: releases that
    were seen to answer one right there; `untold`: those that have no model of their
    own, so that nothing is known of them."""

    releases: Mapping[str, Pattern]
    cpu: tuple[str, ...]
    stock_cpu: tuple[str, ...]
    untold: tuple[str, ...] = ()


@cache
def _file() -> Mapping[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@cache
def architecture(name: str) -> Architecture | None:
    """What is known of an architecture, as config.json names it."""
    found = _file().get("architectures", {}).get(name)
    if found is None:
        return None
    releases: dict[str, Pattern] = {}
    for each in found["structures"]:
        pattern = Pattern(
            each["modules"],
            frozenset(each["skipped"]),
            tuple(each["mappers"]),
            tuple(each["depths"]),
            each["skips_past"],
            tuple(each["skipped_with_images"]),
            tuple(each["lacks_on_cpu"]),
            each["int8_error"],
        )
        releases |= dict.fromkeys(each["releases"], pattern)
    more = (tuple(found[key]) for key in ("cpu", "stock_cpu", "untold"))
    return Architecture(releases, *more)


def looked_into() -> tuple[str, ...]:
    """The releases that were asked."""
    return tuple(_file().get("releases", ()))
