# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost on MI300 and MI350 by the instructions that they execute:
derived, not measured.

    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 python -m tests.kernels.amdgcn.costs \
        --arch gfx942 docs/results/amdgcn-gfx942.json

One workgroup of each kernel and choice of tiles runs in the machine, at the shape of
Step-3.5-Flash. Prints a table too. What limits a workgroup is the largest of four
numbers of clocks of a compute unit, each as if nothing else took time:

- MFMA: clocks of the matrix instructions, on four SIMDs;
- LDS: clocks of the banks, and 4 a wave's instruction;
- issue: 4 clocks a vector instruction of a wave, on four SIMDs;
- HBM: bytes of weights and results, at this compute unit's share of the bandwidth.

Registers and LDS say how many workgroups share a compute unit.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
from vllm.model_executor.layers.fused_moe.experts.quark_int8.layer import apply_experts
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    Experts,
    Routing,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    _ROCM,
    Config,
    FewConfig,
    Shape,
    choose_config,
)
from vllm.model_executor.layers.fused_moe.router import triton_router
from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

from tests.kernels.amdgcn.code import Kernel
from tests.kernels.amdgcn.launches import Launcher, pack_argument
from tests.kernels.amdgcn.machine import Machine, Options, Statistics

HIDDEN, WIDTH, EXPERTS, TOPK = 4096, 1280, 288, 8


@dataclass(frozen=True)
class Chip:
    """AMD's data sheets: compute units, clock in GHz, bytes a second, LDS in bytes."""

    units: int
    clock: float
    bandwidth: float
    lds: int


CHIPS = {
    "gfx942": Chip(304, 2.1, 5.3e12, 64 << 10),
    "gfx950": Chip(256, 2.4, 8.0e12, 160 << 10),
}
REGISTERS, WAVE_SLOTS, SIMDS = 512, 8, 4
# Clocks: passes of four, as AMD's amd_matrix_instruction_calculator prints for CDNA3.
# Those of gfx950 with twice the depth take as many (LLVM's scheduling model).
MFMA_CLOCKS = {16: 16, 32: 32}
# The kernels on whose results the course of later ones depends: all workgroups run.
SORTING = ("prepare_kernel", "count_kernel", "scan_kernel", "align_kernel")
# Arguments that come from memory and not from a cache: weights and their scales.
WEIGHTS = {"w13", "w2", "w13_ptr", "w2_ptr", "w_ptr", "parts_ptr"}


@dataclass
class Sampler:
    """Takes the place of `JITFunction.run`, to measure a workgroup of each launch."""

    arch: str
    tile: str = ""
    found: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.launcher = Launcher(self.arch)

    def run(
        self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        kernel, arguments = self.launcher.compile(function, args, kwargs)
        packed = [
            pack_argument("an argument", value, kind)
            for value, kind in arguments
            if kind != "constexpr"
        ]
        names = [
            name
            for name, (_, kind) in zip(function.arg_names, arguments, strict=True)
            if kind != "constexpr"
        ]
        most = None if kernel.name in SORTING else 1
        machine = Machine(kernel, Options(measure=True))
        statistics = machine.launch(tuple(grid), packed, most)
        self.found.append(
            {"kernel": kernel.name, "tile": self.tile}
            | describe(CHIPS[self.arch], kernel, statistics, names)
        )


def describe(
    chip: Chip, kernel: Kernel, statistics: Statistics, names: list[str]
) -> dict[str, Any]:
    groups = statistics.groups
    executed = dict.fromkeys(("vector", "matrix", "scalar", "lds", "memory"), 0)
    mfma = 0
    for inst, count in zip(kernel.instructions, statistics.counts, strict=True):
        name = inst.name
        if match := re.match(r"v_mfma_\w+?_(\d+)x", name):
            mfma += MFMA_CLOCKS[int(match[1])] * int(count)
        executed[kind_of(name)] += int(count)

    def by_name(bytes_of: dict[str, int]) -> dict[str, int]:
        named: dict[str, int] = {}
        for argument, count in bytes_of.items():
            if argument.startswith("argument "):
                named[names[int(argument.split()[1])]] = count // groups
        return named

    loaded = by_name(statistics.loaded_bytes)
    stored = by_name(statistics.stored_bytes)
    from_memory = sum(n for name, n in loaded.items() if name in WEIGHTS)
    share = chip.bandwidth / chip.units / chip.clock / 1e9
    registers = max(-(-kernel.vector_registers // 8) * 8, 8)
    waves = min(WAVE_SLOTS, REGISTERS // registers)
    resident = waves * SIMDS // kernel.num_warps
    if kernel.lds_bytes:
        resident = min(resident, chip.lds // kernel.lds_bytes)
    clocks = {
        "mfma": mfma / groups / SIMDS,
        "lds": max(statistics.lds_clocks, 4 * executed["lds"] / SIMDS) / groups,
        "issue": 4 * executed["vector"] / groups / SIMDS,
        "hbm": (from_memory + sum(stored.values())) / share,
    }
    return {
        "warps": kernel.num_warps,
        "registers": kernel.vector_registers,
        "lds_bytes": kernel.lds_bytes,
        "groups_a_unit": resident,
        "instructions": {k: v // groups for k, v in executed.items()},
        "lds_moved": statistics.lds_bytes // groups,
        "loaded": loaded,
        "stored": stored,
        "clocks": {k: round(v) for k, v in clocks.items()},
        "limit": max(clocks, key=lambda k: clocks[k]),
    }


def kind_of(name: str) -> str:
    if name.startswith("v_mfma"):
        return "matrix"
    if name.startswith(("global", "buffer", "s_load")):
        return "memory"
    return {"v_": "vector", "ds": "lds", "s_": "scalar"}[name[:2]]


def experts(num_experts: int) -> Experts:
    def weight(*size: int) -> torch.Tensor:
        return torch.randint(-127, 128, size, dtype=torch.int8)

    return Experts(
        weight(num_experts, 2 * WIDTH, HIDDEN),
        weight(num_experts, HIDDEN, WIDTH),
        torch.rand(num_experts, 2 * WIDTH, 1) * 1e-3,
        torch.rand(num_experts, HIDDEN, 1) * 1e-3,
    )


def layers(configs: list[Config]) -> Iterator[tuple[str, Any]]:
    """Names of tiles, and what to run with them."""

    def tokens(num_tokens: int, size: int = HIDDEN) -> torch.Tensor:
        return torch.randn(num_tokens, size, dtype=torch.bfloat16)

    def many(config: Config) -> None:
        """A full tile of one expert."""
        x = tokens(config.block_size_m)
        routing = Routing(torch.zeros(len(x), 1).int(), torch.ones(len(x), 1))
        apply_experts(x, experts(1), routing, torch.empty_like(x), config)

    def few() -> None:
        config = choose_config("rocm", Shape(1, TOPK, EXPERTS, EXPERTS, HIDDEN, WIDTH))
        assert isinstance(config, FewConfig)
        routing = Routing(torch.arange(TOPK).int()[None], torch.ones(1, TOPK))
        x = tokens(1)
        apply_experts(x, experts(TOPK), routing, torch.empty_like(x), config)

    def linear(n: int, k: int) -> None:
        tiles = int8_few_tokens.choose_tiles(1, n, k)
        assert tiles
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        scale = torch.rand(n, 1)
        int8_few_tokens.run_int8_linear(tiles, tokens(1, k), weight, scale, None, None)

    def router(num_tokens: int) -> None:
        x = tokens(num_tokens)
        logits = triton_router.router_logits(x, torch.randn(EXPERTS, HIDDEN))
        ids, rows = (torch.empty(num_tokens, TOPK, dtype=torch.int32) for _ in range(2))
        weights, bias = torch.empty(num_tokens, TOPK), torch.rand(EXPERTS)
        triton_router.topk_sigmoid(weights, ids, rows, logits, True, bias)

    def heads() -> None:
        weight = torch.rand(128, dtype=torch.bfloat16)
        qk_norm_rope.qk_norm_rope(
            tokens(1, 80 * 128),
            torch.zeros(1, dtype=torch.int64),
            torch.rand(9, 64, dtype=torch.bfloat16),
            weight,
            weight,
            1e-5,
            64,
            8,
        )

    for config in configs:
        yield tile_name(config), lambda config=config: many(config)
    yield "few", few
    for n, k in ((1792, 1536), (5120, 2048), (14336, 4096), (4096, 8192)):
        yield f"{n} x {k}", lambda n=n, k=k: linear(n, k)
    for num_tokens in (1, 16, 1024):
        yield f"{num_tokens} tokens", lambda m=num_tokens: router(m)
    yield "64 + 8 heads", heads


def tile_name(config: Config) -> str:
    w13, w2 = config.w13, config.w2
    name = f"{config.block_size_m} x {w13.block_size_w} x {w13.block_size_k}"
    if w13 != w2:
        name += f", {w2.block_size_w} x {w2.block_size_k}"
    return name


def measure(arch: str, configs: list[Config], only: str = "") -> list[dict[str, Any]]:
    torch.manual_seed(0)
    sampler = Sampler(arch)
    original = JITFunction.run

    def run(function: JITFunction, *args: Any, **kwargs: Any) -> None:
        sampler.run(function, *args, **kwargs)

    JITFunction.run = run
    # Tensors of a CPU have one compute unit; programs share rows among all.
    num_sms, int8_few_tokens.num_sms = (
        int8_few_tokens.num_sms,
        lambda x: CHIPS[arch].units,
    )
    try:
        for name, fn in layers(configs):
            if only in name:
                sampler.tile = name
                fn()
    finally:
        JITFunction.run, int8_few_tokens.num_sms = original, num_sms
    return sampler.found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | tile | warps | VGPRs | LDS | groups a CU | vector, matrix, LDS, "
        "memory instructions | MFMA | LDS | issue | HBM | limit |",
        "|" + "---|" * 12,
    ]
    for row in found:
        executed, clocks = row["instructions"], row["clocks"]
        counts = " / ".join(
            f"{executed[k]:,}" for k in ("vector", "matrix", "lds", "memory")
        )
        numbers = [f"{clocks[k]:,}" for k in ("mfma", "lds", "issue", "hbm")]
        cells = [
            f"`{row['kernel']}`",
            row["tile"],
            str(row["warps"]),
            str(row["registers"]),
            f"{row['lds_bytes']:,}",
            str(row["groups_a_unit"]),
            counts,
            *numbers,
            row["limit"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="gfx942", choices=list(CHIPS))
    given = parser.parse_args()
    found = measure(given.arch, [config for _, config in _ROCM])
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
