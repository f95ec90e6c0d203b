# SPDX-License-Identifier: Apache-2.0
"""The tests of the Triton kernels on what is compiled for MI300 (gfx942) and MI350
(gfx950): the machine code runs, on a CPU.

Each in a process of its own: Triton's interpreter, which other tests use, is chosen
when Triton is imported.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.utils import GPU

pytestmark = [
    pytest.mark.needs_group("kernels"),
    pytest.mark.skipif(GPU, reason="runs on a CPU; the kernels run on the GPU here"),
]
ROOT = Path(__file__).parents[3]
MOE = "tests/kernels/moe/test_int8_moe.py"
LINEAR = "tests/kernels/quantization/test_int8_linear.py"
ROUTER = "tests/kernels/moe/test_triton_router.py"
HEADS = "tests/kernels/core/test_qk_norm_rope.py"
TILES = "tests/kernels/amdgcn/rocm_tiles.py"


@dataclass(frozen=True)
class Choice:
    """Which tests to run, with which of the plugin's options, and how many must pass
    at least: one that is skipped shows nothing."""

    files: tuple[str, ...]
    at_least: int
    options: tuple[str, ...] = ()
    chosen: str = ""


ALL = Choice((MOE, LINEAR, ROUTER, HEADS), 120)


def run(tests: Choice) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.kernels.amdgcn.plugin", "-m", "", *tests.options]
    command += ["-k", tests.chosen] if tests.chosen else []
    done = subprocess.run(
        [*command, *tests.files],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= tests.at_least, done.stdout[-2000:]


# Every choice of tiles and one or two of the other kernels; then some, in other forms.
QUICK = {
    "gfx942": "bf16 or every_choice or whoever_shares or moves_that_head or "
    "equal_scores or zero_stay_zero or 7-17-2-24-16-torch.float32",
    "gfx950": "few-bf16 or 16-bf16 or 64-bf16 or equal_scores",
}


@pytest.mark.parametrize(
    ("arch", "at_least", "options"),
    [("gfx942", 12, ()), ("gfx950", 4, ("--large-tensors",))],
)
def test_quick(arch: str, at_least: int, options: tuple[str, ...]) -> None:
    files = TILES, *ALL.files
    run(Choice(files, at_least, ("--amdgcn", arch, *options), QUICK[arch]))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("large", [False, True], ids=["", "large"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_all(arch: str, large: bool) -> None:
    options = ("--amdgcn", arch, *(["--large-tensors"] if large else []))
    run(Choice((TILES, *ALL.files), ALL.at_least, options))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_other_orders(order: str) -> None:
    """Waves one after another; what is approximate is off by a unit."""
    run(Choice((TILES, MOE), 70, ("--waves", order, "--nudge")))
