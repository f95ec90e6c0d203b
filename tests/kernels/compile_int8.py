# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that need not be here, and describe them.

    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 python compile_int8.py sm_90

Runs the fused MoE on tensors without memory, at Step-3.5-Flash's shape, whole and cut
to an eighth of the width, and numbers of tokens that reach every choice of tiles; then
linear layers of few tokens, gated and not, and the router, with each choice of tiles,
and heads that are normalized and rotated; and compiles each launch, for ROCm in both
forms: for tensors of any size and for those below 2 GiB. Prints a JSON list.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

# From 0.23.0 a vLLM for CPUs drops a Triton without a back end of that name.
_NOTHING = SimpleNamespace(
    is_active=lambda: False, supports_target=lambda target: False
)
backends.setdefault("cpu", SimpleNamespace(driver=_NOTHING, compiler=_NOTHING))

# ruff: noqa: E402
from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import (
    few_kernels,
    few_tokens,
    hopper_kernels,
    many_tokens,
    product_kernels,
    sort_kernels,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.layer import apply_experts
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    Experts,
    Routing,
    shape_of,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    Architecture,
    choose_config,
)
from vllm.model_executor.layers.fused_moe.router import triton_router
from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

TARGETS: dict[str, tuple[GPUTarget, Architecture]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), "cuda"),
    "sm_89": (GPUTarget("cuda", 89, 32), "cuda"),
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper"),
    "sm_100": (GPUTarget("cuda", 100, 32), "cuda"),
    "sm_120": (GPUTarget("cuda", 120, 32), "cuda"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "rocm"),
    "gfx950": (GPUTarget("hip", "gfx950", 64), "rocm"),
}
EXPERTS, HIDDEN, TOPK = 36, 4096, 8
WIDTHS = (1280, 160)
TOKENS = (1, 4, 16, 64, 256, 400, 1024, 4096)
LINEAR = ((1792, 1536), (5120, 2048), (14336, 4096), (4096, 8192), (4096, 12288))
HEADS, HEAD_DIM = ((64, 64), (96, 128)), 128
ROUTER_TOKENS, ROUTER_EXPERTS = (1, 4, 16, 1024, 4096), 288
TYPES = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}
INSTRUCTIONS = "|".join(
    (
        r"wgmma\.mma_async\S+",
        r"wgmma\.wait_group\S+ \d",
        r"mma\.sync\S+",
        r"tcgen05\.mma\S+",
        r"v_mfma_\w+",
        r"dp4a\S+",
        r"v_dot4\w+",
    )
)


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def run_experts(
    architecture: Architecture,
    num_tokens: int,
    topk: int,
    num_ids: int,
    num_experts: int,
    hidden_size: int,
    width: int,
    bias: bool = False,
) -> None:
    """The fused MoE on tensors without memory; this rank has num_experts of num_ids."""
    experts = Experts(
        empty(num_experts, 2 * width, hidden_size, dtype=torch.int8),
        empty(num_experts, hidden_size, width, dtype=torch.int8),
        empty(num_experts, 2 * width, 1),
        empty(num_experts, hidden_size, 1),
        w13_bias=empty(num_experts, 2 * width) if bias else None,
        w2_bias=empty(num_experts, hidden_size) if bias else None,
    )
    routing = Routing(
        empty(num_tokens, topk, dtype=torch.int32),
        empty(num_tokens, topk),
        empty(num_ids, dtype=torch.int32) if num_ids > num_experts else None,
    )
    x = empty(num_tokens, hidden_size, dtype=torch.bfloat16)
    config = choose_config(architecture, shape_of(experts, routing))
    apply_experts(x, experts, routing, torch.empty_like(x), config)


def launches(
    architecture: Architecture, has_pdl: bool
) -> list[tuple[Any, tuple, dict]]:
    found = []
    modules = few_kernels, hopper_kernels, product_kernels, sort_kernels
    of_the_moe = {id(value) for module in modules for value in vars(module).values()}

    def record(kernel: Any, grid: Any, pdl: bool, *args: Any, **options: Any) -> None:
        # Some ask the GPU; tensors without memory are on none.
        if id(kernel) not in of_the_moe:
            pdl = has_pdl
        if pdl:
            options["launch_pdl"] = True
        found.append((kernel, args, options | {"PDL": pdl}))

    many_tokens.launch = few_tokens.launch = int8_few_tokens.launch = record
    triton_router.launch = qk_norm_rope.launch = record
    for width, num_tokens in itertools.product(WIDTHS, TOKENS):
        run_experts(architecture, num_tokens, TOPK, EXPERTS, EXPERTS, HIDDEN, width)
    # Tiles of 64 pairs differ with the number of experts.
    run_experts(architecture, 2048, TOPK, 288, 288, HIDDEN, WIDTHS[0])
    # A bias takes registers.
    for width in WIDTHS:
        run_experts(
            architecture, TOKENS[-1], TOPK, EXPERTS, EXPERTS, HIDDEN, width, bias=True
        )
    for (n, k), is_gated in itertools.product(LINEAR, (False, True)):
        tiles = int8_few_tokens.choose_tiles(1, n, k)
        assert tiles
        x = empty(1, k, dtype=torch.bfloat16)
        gate = empty(1, k // HEAD_DIM, dtype=torch.bfloat16) if is_gated else None
        weight = empty(n, k, dtype=torch.int8)
        int8_few_tokens.run_int8_linear(tiles, x, weight, empty(n, 1), None, None, gate)
        if gate is not None:
            int8_few_tokens.run_gate_and_quantize(x, None, gate)
    for num_tokens in ROUTER_TOKENS:
        x = empty(num_tokens, HIDDEN, dtype=torch.bfloat16)
        logits = triton_router.router_logits(x, empty(ROUTER_EXPERTS, HIDDEN))
        ids, rows = (empty(num_tokens, TOPK, dtype=torch.int32) for _ in range(2))
        bias = empty(ROUTER_EXPERTS)
        triton_router.topk_sigmoid(
            empty(num_tokens, TOPK), ids, rows, logits, True, bias
        )
    for num_heads, rotary_dim in HEADS:
        weight = empty(HEAD_DIM, dtype=torch.bfloat16)
        qk_norm_rope.qk_norm_rope(
            empty(1, (num_heads + 16) * HEAD_DIM, dtype=torch.bfloat16),
            empty(1, dtype=torch.int64),
            empty(9, rotary_dim, dtype=torch.bfloat16),
            weight,
            weight,
            1e-5,
            num_heads,
            8,
        )
    return found


def compile_launch(
    target: GPUTarget, kernel: Any, args: tuple, options: dict, small: bool = False
) -> Any:
    """small: tensors are below 2 GiB. Triton's HIP runtime tells the compiler so, which
    then uses instructions for buffers, and other registers."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in options:
            value = options.pop(name)
            if name == "DOT4":
                value = target.backend == "cuda"
            elif name == "OPERAND":
                value = tl.bfloat16
        else:
            value = args[i]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
            if small:
                attributes[(i,)].append(["tt.pointer_range", 32])
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            layout = f",{value.layout!r}" if kernel.is_gluon() else ""
            signature[name] = f"tensordesc<i8{value.block_shape}{layout}>"
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def spills(compiled: Any) -> int:
    """Bytes of stack on CUDA, registers on ROCm."""
    if "cubin" not in compiled.asm:
        found = re.findall(r"[sv]gpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return sum(map(int, found))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"STACK:(\d+)", usage.stdout)
    assert match, usage.stdout
    return int(match[1])


def main() -> None:
    target, architecture = TARGETS[sys.argv[1]]
    report = {}
    forms = (False, True) if target.backend == "hip" else (False,)
    # As `int8_triton.has_pdl` answers on such a GPU.
    has_pdl = target.backend == "cuda" and target.arch >= 90
    for (kernel, args, options), small in itertools.product(
        launches(architecture, has_pdl), forms
    ):
        name = f"{kernel.fn.__name__} {options} {small}"
        if name in report:
            continue
        compiled = compile_launch(target, kernel, args, dict(options), small)
        asm = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        report[name] = {
            "kernel": kernel.fn.__name__,
            "options": str(options),
            "small": small,
            "spills": spills(compiled),
            "shared": compiled.metadata.shared,
            "instructions": sorted(set(re.findall(INSTRUCTIONS, asm))),
        }
    print(json.dumps(list(report.values())))


if __name__ == "__main__":
    main()
