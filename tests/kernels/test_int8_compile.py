# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for every GPU they are chosen for, without one here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

pytestmark = pytest.mark.needs_group("kernels")

# A byte more cannot be launched.
SHARED = {
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}
# Bytes, of kernels whose tiles were chosen for Hopper; others take them if asked to.
SPILLS = {
    (kernel, target): 8
    for kernel in ("int8_linear_kernel", "router_few_kernel")
    for target in ("sm_80", "sm_89")
}
# Of Gluon's w13, without and with a bias per channel: once a tile, between two
# products. Of narrow experts two programs share the registers.
_VERSION = ".".join(triton.__version__.split(".")[:2])
W13_SPILLS = {"3.6": (0, 320), "3.7": (0, 328)}[_VERSION]
NARROW_W13_SPILLS = {"3.6": (0, 72), "3.7": (0, 104)}[_VERSION]
# Triton takes Ampere's instruction on Blackwell as well: no int8 of tcgen05's.
_MMA_S8 = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
PRODUCT = {
    "sm_80": _MMA_S8,
    "sm_89": _MMA_S8,
    "sm_100": _MMA_S8,
    "sm_120": _MMA_S8,
    "sm_90": "wgmma.mma_async.sync.aligned.m64n",
    "gfx942": "v_mfma_i32_",
    "gfx950": "v_mfma_i32_",
}
# The weight is the operand in registers, of 64 rows on Hopper.
_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
ROUTER = {
    "sm_80": _MMA_BF16,
    "sm_89": _MMA_BF16,
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f16",
    "sm_120": _MMA_BF16,
    "sm_90": r"wgmma.mma_async.sync.aligned.m64n\d+k16.f32.bf16.bf16",
    "gfx942": "v_mfma_f32_",
    "gfx950": "v_mfma_f32_",
}


@pytest.mark.parametrize(
    "target",
    # Half a minute each: the GPU that the kernels were chosen for stands for all.
    [pytest.param(t, marks=[] if t == "sm_90" else pytest.mark.slow) for t in SHARED],
)
def test_compiles(target: str) -> None:
    """No spills where chosen, shared memory within limits, int8 on the tensor cores."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_int8.py"), target],
        env=os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    forms = {(entry["kernel"], entry["options"], entry["small"]) for entry in report}
    if target.startswith("gfx"):
        # Tensors below 2 GiB are compiled for in another way.
        assert {(k, o, not small) for k, o, small in forms} == forms
    kernels = {entry["kernel"] for entry in report}
    few = {"w13_few_kernel", "w2_few_kernel", "int8_linear_kernel"}
    router = {"router_kernel", "router_few_kernel", "topk_sigmoid_kernel"}
    others = {"w13_kernel", "w2_kernel"}
    others |= {"gate_and_quantize_kernel", "qk_norm_rope_kernel"}
    assert others | few | router <= kernels
    gluon = {entry["kernel"] for entry in report if "NUM_WARPS" in entry["options"]}
    assert gluon == ({"w13_kernel", "w2_kernel"} if target == "sm_90" else set())
    for entry in report:
        most = SPILLS.get((entry["kernel"], target), 0)
        if entry["kernel"] == "w13_kernel" and "NUM_WARPS" in entry["options"]:
            is_narrow = "'BLOCK_SIZE_N': 64" in entry["options"]
            spills = NARROW_W13_SPILLS if is_narrow else W13_SPILLS
            most = spills["'HAS_BIAS': True" in entry["options"]]
        assert entry["spills"] <= most, entry
        assert entry["shared"] <= SHARED[target] * 1024, entry
        if entry["kernel"] in few and target.startswith("sm"):
            assert any(name.startswith("dp4a") for name in entry["instructions"]), entry
        if entry["kernel"] in ("w13_kernel", "w2_kernel", "w2_narrow_kernel"):
            found = entry["instructions"]
            product = PRODUCT[target]
            if target == "sm_90" and "'BLOCK_SIZE_M': 8," in entry["options"]:
                product = _MMA_S8  # Triton has no wgmma of eight columns
            assert any(name.startswith(product) for name in found), entry
            of_floats = [n for n in found if "mma_async" in n and "s32.s8.s8" not in n]
            assert not of_floats, entry
        if "NUM_WARPS" in entry["options"]:
            # A product goes on while the next one is prepared.
            assert "wgmma.wait_group.sync.aligned 1" in entry["instructions"], entry
        if entry["kernel"] == "router_kernel":
            found = entry["instructions"]
            assert any(re.match(ROUTER[target], name) for name in found), entry
