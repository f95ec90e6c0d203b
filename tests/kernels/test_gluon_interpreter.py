# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on a GPU goes wrong in the tests' interpreter of Gluon as well."""

import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import hopper_kernels

from tests.kernels.gluon_interpreter import interpret

BLOCK = 32
STEPS, EXPERTS, COLUMNS = 5, 2, 48
# Of both kernels.
OPTIONS: dict[str, Any] = dict(
    BLOCK_SIZE_M=BLOCK,
    BLOCK_SIZE_N=BLOCK,
    BLOCK_SIZE_K=BLOCK,
    STAGES=3,
    NUM_WARPS=4,
    PER_CHANNEL=False,
    HAS_BIAS=False,
    PDL=False,
    num_warps=4,
)


def box(matrix: torch.Tensor) -> Any:
    return SimpleNamespace(base=matrix, shape=matrix.shape, block_shape=[BLOCK, BLOCK])


def run_w2(module: ModuleType, programs: int = 2) -> bool:
    """Multiply random pairs of two experts; whether the sums are right."""
    k = STEPS * BLOCK - 16
    pairs, experts = 3 * BLOCK - 5, torch.tensor([0, 1, 1], dtype=torch.int32)
    a = torch.randint(-128, 128, (3 * BLOCK, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (EXPERTS, COLUMNS, k), dtype=torch.int8)
    y = torch.full((pairs, COLUMNS), torch.nan)
    interpret(module)["w2_kernel"][(programs,)](
        box(a),
        torch.ones(3 * BLOCK),
        box(w.view(-1, k)),
        torch.ones(EXPERTS),
        None,
        None,
        torch.arange(3 * BLOCK, dtype=torch.int32),
        experts,
        torch.tensor([3], dtype=torch.int32),
        y,
        pairs,
        COLUMNS,
        k,
        0,
        COLUMNS,
        APPLY_ROUTER_WEIGHT=False,
        **OPTIONS,
    )
    of_pairs = w[experts.repeat_interleave(BLOCK).long()][:pairs]
    exact = torch.einsum("pk,pnk->pn", a[:pairs].double(), of_pairs.double())
    return torch.equal(y.double(), exact.float().double())


def run_w13(module: ModuleType, groups: int = 1) -> bool:
    """The same of the other kernel, whose threads copy; without an activation."""
    k, topk = STEPS * BLOCK - 16, 2
    pairs = 2 * BLOCK - 5
    tokens = torch.arange(pairs) // topk
    x = torch.randint(-128, 128, (pairs, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (1, 2 * BLOCK, k), dtype=torch.int8)
    h = torch.full((2 * BLOCK, BLOCK), torch.nan)
    interpret(module)["w13_kernel"][(3 - groups,)](
        x,
        torch.full((pairs,), 2.0**-20),
        box(w.view(-1, k)),
        torch.ones(1),
        None,
        torch.arange(2 * BLOCK, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        h,
        pairs,
        BLOCK,
        k,
        topk,
        GROUPS=groups,
        SWIGLUSTEP_LIMIT=None,
        **OPTIONS,
    )
    exact = x[tokens].double() @ w[0].double().T * 2.0**-20
    gate, up = exact.chunk(2, dim=1)
    expected = gate * gate.sigmoid() * up
    return torch.allclose(h[:pairs].double(), expected, rtol=1e-5, atol=1e-7)


def changed(tmp_path: Path, old: str, new: str) -> ModuleType:
    assert hopper_kernels.__file__
    source = Path(hopper_kernels.__file__).read_text()
    assert old in source
    file = tmp_path / "changed.py"
    file.write_text(source.replace(old, new))
    return cast(ModuleType, SimpleNamespace(__file__=str(file), __name__="changed"))


def test_right_kernels_are_right() -> None:
    assert run_w2(hopper_kernels) and run_w13(hopper_kernels)
    assert run_w2(hopper_kernels, programs=7)
    assert run_w13(hopper_kernels, groups=2)


# What is changed in the kernels, and what is said of it.
FREE = "mbarrier.arrive(free.index((step + STAGES - 1) % STAGES)"
NEXT = (
    "    if GROUPS == 2:\n        mbarrier.arrive(ready.index(1 - GROUP))\n"
    "    sums = warpgroup_mma_wait(0, deps=(sums,))\n    "
)
MISTAKES = {
    "a buffer is freed while it is read": (
        f"{FREE}, pred=k > 0)\n        step += 1\n{NEXT}{FREE})",
        f"mbarrier.arrive(free.index(step % STAGES))\n        step += 1\n{NEXT}pass",
        "wrong",
    ),
    "a buffer is never freed": (f"{FREE}, pred=k > 0)", "pass", "deadlock"),
    "nobody waits for a copy": (
        "mbarrier.wait(full.index(buffer), step // STAGES & 1)",
        "pass",
        "wrong|deadlock",
    ),
    "nobody waits for a buffer": (
        "mbarrier.wait(free.index(buffer), step // STAGES & 1 ^ 1)",
        "pass",
        "deadlock|more arrive|wrong",
    ),
    "a group does not wait for its turn": (
        "mbarrier.wait(ready.index(GROUP), turn // 2 + 1 + GROUP & 1)",
        "pass",
        "wrong|deadlock",
    ),
    "a group is not told of its turn": (
        "mbarrier.arrive(ready.index(1 - GROUP))",
        "pass",
        "deadlock",
    ),
    "a group takes the other's turn": (
        "turn // 2 + 1 + GROUP & 1",
        "turn // 2 + GROUP & 1",
        "deadlock|wrong",
    ),
    "a phase is taken for the other": (
        "step // STAGES & 1 ^ 1",
        "step // STAGES & 1",
        "deadlock",
    ),
    "fewer bytes are announced": (
        "hq.block_type.nbytes + w2",
        "w2",
        "more bytes",
    ),
    "more bytes are announced": (
        "2 * w13.block_type",
        "3 * w13.block_type",
        "deadlock",
    ),
    "fewer threads are counted": ("32 * GATHER_WARPS", "32", "more arrive"),
    "threads' copies are not fenced": ("fence_async_shared()", "pass", "fence"),
    "a product is not waited for": (
        "warpgroup_mma_wait(0",
        "warpgroup_mma_wait(1",
        "wrong|unfinished",
    ),
    "rows of another tile": (
        "a_row = i // num_n * BLOCK_SIZE_M",
        "a_row = tile",
        "wrong",
    ),
    "columns beyond the tensor": ("mask=mask)", "mask=None)", "outside"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, tmp_path: Path) -> None:
    old, new, said = MISTAKES[name]
    module = changed(tmp_path, old, new)
    try:
        found = "right" if run_w2(module) and run_w13(module) else "wrong"
    except AssertionError as error:
        found = str(error)
    assert re.search(said, found), found


@pytest.mark.parametrize(
    ("rows", "columns", "num_warps"),
    [
        (128, 128, 8),
        (128, 64, 4),
        (128, 128, 4),
        (64, 128, 4),
        (64, 64, 4),
        (64, 32, 4),
    ],
)
def test_lines_are_exchanged_within_four_threads(
    rows: int, columns: int, num_warps: int
) -> None:
    """The layout of results holds each element once; four threads have those that they
    have of the tensor cores' sums (PTX ISA, wgmma.mma_async, matrix D)."""
    layout = hopper_kernels._quads(rows, columns, num_warps)
    bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
    bits = range(len(bases))
    assert 2 ** len(bases) == rows * columns
    of_quads: dict[tuple[int, int], set[tuple[int, int]]] = {}
    in_registers = len(layout.reg_bases)
    for n in range(rows * columns):
        row = sum(bases[b][0] for b in bits if n >> b & 1)
        column = sum(bases[b][1] for b in bits if n >> b & 1)
        thread = n >> in_registers
        of_quads.setdefault((thread // 32, thread % 32 // 4), set()).add((row, column))
        assert column % 8 == n % 8  # eight on end
    assert len(of_quads) == num_warps * 8
    for (warp, quad), found in of_quads.items():
        # A warp has 16 rows of each 16 x num_warps, eight of them a quad's step apart.
        first = 16 * warp + quad
        of_sums = range(first, rows, 16 * num_warps)
        assert found == {
            (row + half, column)
            for row in of_sums
            for half in (0, 8)
            for column in range(columns)
        }
