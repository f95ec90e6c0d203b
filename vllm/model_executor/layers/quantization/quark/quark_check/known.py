# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All that is known of the model that a checkpoint is for, and of what this fork makes
of it: from the model itself where it could be asked, else from architectures.json."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from .architectures import (
    Asked,
    Pattern,
    Place,
    Structure,
    architecture,
    general,
    of_dry_run,
)
from .checkpoint import TensorInfo
from .config import config_problems
from .dry_run import DryRun, is_structure
from .export import Export, Layer
from .layout import MAX_EXPERTS, num_experts, num_layers, shown
from .opened import Checkpoint
from .problems import Problem, of_tensor
from .releases import ALL, Row, Scope, build_of, range_of
from .rules import Config, is_int8
from .weights import Stored, expert_of

# What patch 0003 has Step-3.5 tell of its fused layers.
STEP = "Step3p5ForCausalLM"
STEP_PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Int8:
    """An INT8 weight that this fork reads as such."""

    stored: Stored
    config: Config
    asked: Asked

    @property
    def name(self) -> str:
        return self.stored.module

    @property
    def is_experts(self) -> bool:
        return self.asked.kind == "experts"


@dataclass(frozen=True)
class Known:
    """export: the files beside the config; structure: the model of this fork, None
    where nothing is known of it, and why_not then says why; looked: what the model
    itself said; scope: what is asked about; releases: row of it -> the model of its
    releases; cpu: the kinds of exports of the architecture that were seen right on a
    CPU; stock_cpu: the releases that were seen to answer one right on a CPU; untold:
    rows with a release of which nothing is known."""

    export: Export
    structure: Structure | None
    why_not: str = ""
    looked: DryRun | None = None
    scope: Scope = ALL
    releases: Mapping[str, tuple[Structure, ...]] = field(default_factory=dict)
    cpu: tuple[str, ...] = ()
    stock_cpu: tuple[str, ...] = ()
    untold: frozenset[str] = frozenset()

    @cached_property
    def _judged(self) -> tuple[dict[str, tuple[Asked, Layer]], list[Problem]]:
        """Layers that files hold something for, by prefix, and problems of these."""
        layers: dict[str, tuple[Asked, Layer]] = {}
        if self.structure is None:
            return layers, []
        applied = 0
        asked_in_order = sorted(
            self.structure.layers.values(), key=lambda asked: asked.mappers
        )
        for asked in asked_in_order:
            while applied < min(asked.mappers, len(self.structure.mappers)):
                self.export.rename(self.structure.mappers[applied])
                applied += 1
            last = asked.prefix.rpartition(".")[2]
            packed = {} if asked.packed is None else {last: asked.packed}
            if asked.kind == "experts":
                found = self.export.experts(asked.prefix)
            else:
                found = self.export.linear(asked.prefix, packed)
            if found is not None:
                layers[asked.prefix] = asked, found
        return layers, list(self.export.problems)

    @property
    def layers(self) -> Mapping[str, tuple[Asked, Layer]]:
        """Layers that the files hold something for, by vLLM's name."""
        return self._judged[0]

    @cached_property
    def by_module(self) -> dict[str, tuple[Asked, Layer, Stored]]:
        """The same, by the modules of the checkpoint that they take."""
        return {
            stored.module: (asked, layer, stored)
            for asked, layer in self.layers.values()
            for stored in layer.weights
        }

    @cached_property
    def int8(self) -> list[Int8]:
        return [
            Int8(stored, layer.config, asked)
            for asked, layer in self.layers.values()
            if layer.config is not None and is_int8(layer.config)
            for stored in layer.weights
            if stored.weight.dtype == "I8"
        ]

    @cached_property
    def unknown(self) -> list[str]:
        """Matrices of which it is not known what this fork does with them."""
        if self.structure is None:
            return [
                name
                for name, tensor in self.export.tensors.items()
                if len(tensor.shape) > 1 and is_structure(name)
            ]
        return [
            name
            for name in self.structure.unknown(self.export.tensors)
            if "rotation" not in name.rpartition(".")[2]
        ]

    @cached_property
    def problems(self) -> list[Problem]:
        """What the engine would say, or does say where the model was asked."""
        engine = None if self.looked is None else self.looked.engine
        is_asked = engine is not None and self.structure and self.structure.is_derived
        if engine is not None and is_asked:
            return [Problem(**each) for each in engine.problems]
        found = [*config_problems(self.export.config)]
        if self.structure is not None:
            found += self._judged[1]
            found += self._of_structure(self.structure)
        found += self.export.exclude_without_module()
        return found

    # --- what the engine sees while it loads, told from the structure -----------------

    def _of_structure(self, structure: Structure) -> Iterator[Problem]:
        # What seems to be missing may be there under a name that is not known.
        for gap in () if self.unknown else structure.gaps:
            expected = "tensors for every layer that config.json counts"
            yield Problem("weight-missing", gap, expected, "none")
        for asked, layer in self.layers.values():
            yield from self._incomplete(structure, asked, layer)
        int8 = {each.name for each in self.int8}
        for name, tensor in self.export.tensors.items():
            module, _, suffix = name.rpartition(".")
            place = structure.places.get(name, _UNKNOWN)
            if tensor.dtype == "I8" and place is not _UNKNOWN and place is not None:
                if place.asked is None and is_structure(name):
                    yield _not_asked(tensor, place)
            elif place is None and is_structure(name):
                yield Problem("tensor-not-taken", name, "a parameter", "none")
            elif module in int8 and "rotation" in suffix:
                expected = "no rotation that is applied while the model runs"
                yield of_tensor("rotation-not-applied", tensor, expected, "one")

    def _incomplete(
        self, structure: Structure, asked: Asked, layer: Layer
    ) -> Iterator[Problem]:
        """Parts of a fused layer that are not there, where others are."""
        if asked.kind == "experts" and asked.num_experts is not None:
            held: set[int] = set()
            for stored in layer.weights:
                if expert := expert_of(f"{stored.module}."):
                    held.add(expert[1])
                elif len(stored.weight.shape) == 3:
                    held.update(range(min(stored.weight.shape[0], MAX_EXPERTS)))
            count = asked.num_experts
            missing = next((i for i in range(count) if i not in held), None)
            wrong = missing if missing is not None else max(held, default=-1)
            if missing is not None or wrong >= count:
                how = "missing" if missing is not None else "one too many"
                every = f"experts 0 to {shown(count - 1)}, as config.json has it"
                found = f"{len(held)}: {wrong} is {how}"
                yield Problem("experts-miscounted", asked.prefix, every, found)
        elif 1 < len(layer.weights) < len(asked.packed or ()):
            expected = f"{len(asked.packed or ())} weights that it is fused from"
            found = f"{len(layer.weights)}"
            yield Problem("weight-missing", asked.prefix, expected, found)


_UNKNOWN = Place("", "unknown")


def _not_asked(tensor: TensorInfo, place: Place) -> Problem:
    expected = f"floats for {place.module}, which vLLM does not quantize"
    return of_tensor("head-quantized", tensor, expected, "I8")


# --- where it comes from ----------------------------------------------------------


def _as_stock(structure: Structure, pattern: Pattern) -> Structure:
    """A structure with what a release's model, and not this fork's, tells of what it
    fuses."""
    packed = {
        each["prefix"]: each.get("packed")
        for each in pattern.modules.values()
        if each.get("prefix") is not None
    }

    def as_told(asked: Asked) -> Asked:
        name = general(asked.prefix)[0]
        if name not in packed:
            return asked
        told = packed[name]
        return replace(asked, packed=None if told is None else tuple(told))

    layers = {prefix: as_told(each) for prefix, each in structure.layers.items()}
    places = {
        name: place
        and replace(place, asked=place.asked and layers.get(place.asked.prefix))
        for name, place in structure.places.items()
    }
    return replace(
        structure, layers=layers, places=places, int8_error=pattern.int8_error
    )


def know(
    checkpoint: Checkpoint, looked: DryRun | None = None, scope: Scope = ALL
) -> Known | None:
    """What is known of a checkpoint; None where no INT8 of Quark's is asked for."""
    export = checkpoint.export
    if export is None:
        return None
    told = architecture(checkpoint.architecture)
    depth, count = num_layers(checkpoint.model), num_experts(checkpoint.model)
    patterns = told.releases if told else {}
    made: dict[int, Structure] = {}  # releases that told the same

    def structure_of(pattern: Pattern) -> Structure:
        if id(pattern) not in made:
            made[id(pattern)] = pattern.structure(export.tensors, depth, count)
        return made[id(pattern)]

    based_on = _told(patterns, scope.base)[-1:]
    own = structure_of(based_on[0]) if based_on else None
    why_not = f"architectures.json has no {checkpoint.architecture}"
    by_row = {
        row.name: [structure_of(each) for each in _of_row(patterns, row)]
        for row in scope.known
    }
    if looked is not None:
        derived = _native(looked, export)
        why_not = _why_not(looked)
        if derived is not None:
            stock = _as_stock(derived, based_on[0]) if based_on else derived
            build = build_of(looked.vllm)
            asked = range_of(build.release) if build else None
            for row in scope.of_range(asked.name) if asked else ():
                by_row[row.name] = [stock]
            own = derived
        elif own is None or looked.structure.stage in ("build", "load"):
            own = None
    for row in scope.known:
        if "0003" in row.patches and checkpoint.architecture == STEP:
            by_row[row.name] = [_with_0003(each) for each in by_row[row.name]]
    return Known(
        export,
        own,
        "" if own else why_not,
        looked,
        scope,
        {name: tuple(each) for name, each in by_row.items() if each},
        told.cpu if told else (),
        told.stock_cpu if told else (),
        _untold(told.untold if told else (), scope),
    )


def _untold(releases: Iterable[str], scope: Scope) -> frozenset[str]:
    ranges = {each.name for v in releases if (each := range_of(v))}
    return frozenset(
        row.name
        for row in scope.known
        if row.range
        and row.range.name in ranges
        and (not row.by_platform or row.version in releases)
    )


def _told(patterns: Mapping[str, Pattern], version: str) -> list[Pattern]:
    """What a release told; where it was not asked, the others of its range."""
    if version in patterns:
        return [patterns[version]]
    same = range_of(version)
    found = [patterns[v] for v in (same.looked_into if same else ()) if v in patterns]
    return list({id(each): each for each in found}.values())


def _of_row(patterns: Mapping[str, Pattern], row: Row) -> list[Pattern]:
    """The same for a row: of a range all that any of its releases told."""
    if row.by_platform or row.range is None:
        return _told(patterns, row.version)
    found = [patterns[v] for v in row.range.looked_into if v in patterns]
    return list({id(each): each for each in found}.values())


def _with_0003(structure: Structure) -> Structure:
    """Step-3.5 that tells what it fuses."""
    layers = {
        prefix: replace(asked, packed=STEP_PACKED.get(prefix.rpartition(".")[2]))
        for prefix, asked in structure.layers.items()
    }
    return replace(structure, layers=layers)


def _native(looked: DryRun, export: Export) -> Structure | None:
    if looked.failed or looked.structure.architecture.startswith("Transformers"):
        return None
    return of_dry_run(looked.structure, export.tensors)


def _why_not(looked: DryRun) -> str:
    if looked.failed:
        return f"asking the model {looked.failed}"
    if looked.structure.architecture.startswith("Transformers"):
        return "this vLLM has no model of its own for it"
    return f"the model's {looked.structure.stage} ends with {looked.structure.error}"
