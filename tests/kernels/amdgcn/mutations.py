# SPDX-License-Identifier: Apache-2.0
"""Change the compiled code of the kernels, one instruction at a time, and see whether
the machine's checks or the results tell.

    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 python -m tests.kernels.amdgcn.mutations

prints a JSON object: of each kind how many changes there were and how many were caught,
and those that were not. A change counts if the instruction is executed. It is caught by
a fault, or by an output that differs from that of the code as it is, which the tests
compare with float64.
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from tests.kernels.amdgcn.code import Instruction, Kernel, parse_instruction
from tests.kernels.amdgcn.launches import Launcher, octets_of, pack_argument
from tests.kernels.amdgcn.machine import Machine
from tests.kernels.amdgcn.waves import Fault

NOTHING = "s_nop 0"
Change = tuple[str, int, Instruction]


def changed(inst: Instruction, **modifiers: str) -> Instruction:
    return dataclasses.replace(inst, modifiers=inst.modifiers | modifiers)


def changes_of(inst: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Kinds of changes, and what stands in the place of the instruction."""
    name, modifiers = inst.name, inst.modifiers
    nothing = parse_instruction(NOTHING)
    if name == "s_barrier":
        yield "barrier dropped", nothing
    if name == "s_waitcnt":
        for counter, count in modifiers.items():
            yield "wait dropped", changed(inst, **{counter: "63"})
            yield "wait for one less", changed(inst, **{counter: str(int(count) + 1)})
    if name.startswith(("global_load", "buffer_load", "global_store", "buffer_store")):
        yield "load or store dropped", nothing
    if name.startswith("ds_") and "offset0" in modifiers:
        other = str(int(modifiers["offset0"]) ^ 1)
        yield "LDS offset changed", changed(inst, offset0=other)
    elif name.startswith("ds_") and modifiers.get("offset", "").isdigit():
        other = str(int(modifiers["offset"]) ^ 16)
        yield "LDS offset changed", changed(inst, offset=other)
    if name.startswith("v_mfma"):
        to, a, b, c = inst.operands
        swapped = dataclasses.replace(inst, operands=(to, b, a, c))
        yield "operands of an MFMA exchanged", swapped
    if name == "s_and_saveexec_b64":
        saved = inst.operands[0].text
        yield "mask dropped", parse_instruction(f"s_mov_b64 {saved}, exec")
    for order, other in (("_gt_", "_ge_"), ("_lt_", "_le_")):
        if name.startswith(f"v_cmp{order}i32"):
            yield (
                "comparison off by one",
                dataclasses.replace(inst, name=name.replace(order, other)),
            )


@dataclasses.dataclass
class Recorded:
    """A launch: its kernel, and its arguments as they were before."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: list[tuple[Any, str]]
    before: list[torch.Tensor | None]

    def run(self, kernel: Kernel) -> tuple[list[bytes], np.ndarray]:
        """What all tensors hold after, and how often instructions were executed."""
        for (value, _), before in zip(self.arguments, self.before, strict=True):
            if before is not None:
                value.copy_(before)
        packed = [
            pack_argument("an argument", value, kind)
            for value, kind in self.arguments
            if kind != "constexpr"
        ]
        statistics = Machine(kernel).launch(self.grid, packed)
        tensors = (v for v, _ in self.arguments if isinstance(v, torch.Tensor))
        return [octets_of(t).tobytes() for t in tensors], statistics.counts


def record(arch: str, small: bool) -> list[Recorded]:
    """The launches of layers with tiles for ROCm, one of each kernel."""
    from tests.kernels.amdgcn.rocm_tiles import CASES, config_of
    from tests.kernels.moe.test_int8_moe import make, run

    launcher = Launcher(arch, small)
    found: dict[str, Recorded] = {}

    def launch(
        function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        kernel, arguments = launcher.compile(function, args, dict(kwargs))
        tensors = [v for v, _ in arguments if isinstance(v, torch.Tensor)]
        for tensor in tensors:
            if not tensor.isfinite().all():
                tensor.nan_to_num_(nan=77.0)
        before = [
            v.clone() if isinstance(v, torch.Tensor) else None for v, _ in arguments
        ]
        launcher.run(function, *args, grid=grid, warmup=warmup, **kwargs)
        key = f"{kernel.name} {len(kernel.instructions)}"
        found.setdefault(key, Recorded(kernel, tuple(grid), arguments, before))

    original = JITFunction.run
    JITFunction.run = launch
    try:
        for case in CASES.values():
            case = dataclasses.replace(case, dtype=torch.bfloat16)
            layer = make(case)
            run(layer, config_of(layer))
    finally:
        JITFunction.run = original
    return list(found.values())


def try_changes(recorded: Recorded, most: int, rng: np.random.Generator) -> Iterator:
    """Kind, text of the instruction, its index, and how the change was caught: "fault",
    "result" or ""."""
    kernel = recorded.kernel
    expected, counts = recorded.run(kernel)
    by_kind: dict[str, list[tuple[int, Instruction]]] = collections.defaultdict(list)
    for index, inst in enumerate(kernel.instructions):
        if counts[index]:
            for kind, other in changes_of(inst):
                by_kind[kind].append((index, other))
    for kind, places in by_kind.items():
        chosen = rng.permutation(len(places))[:most]
        for index, other in (places[i] for i in sorted(chosen)):
            instructions = list(kernel.instructions)
            instructions[index] = other
            mutant = dataclasses.replace(kernel, instructions=instructions)
            try:
                found, _ = recorded.run(mutant)
                caught = "" if found == expected else "result"
            except Fault:
                caught = "fault"
            yield kind, kernel.instructions[index].text, index, caught


def report(arch: str, small: bool, most: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    missed = []
    for recorded in record(arch, small):
        for kind, text, index, caught in try_changes(recorded, most, rng):
            kinds[kind]["all"] += 1
            kinds[kind][caught or "missed"] += 1
            if not caught:
                missed.append(
                    {
                        "kernel": recorded.kernel.name,
                        "kind": kind,
                        "index": index,
                        "instruction": text,
                        "context": [
                            other.text
                            for other in recorded.kernel.instructions[
                                max(index - 4, 0) : index + 5
                            ]
                        ],
                    }
                )
    return {"arch": arch, "small": small, "kinds": kinds, "missed": missed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--arch", default="gfx942")
    parser.add_argument("--large-tensors", action="store_true")
    parser.add_argument("--most", type=int, default=1000, help="of a kind and kernel")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = report(given.arch, not given.large_tensors, given.most, given.seed)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
