# SPDX-License-Identifier: Apache-2.0
"""Every cell of the matrix through the engine on a GPU, by each of its kernels."""

from pathlib import Path
from typing import Any

import pytest

from examples import matrix
from examples.compare_builds import MAX_TOKENS, make_prompts
from tests.engine import Answers, ask_each
from tests.fixtures import addition
from tests.fixtures.cells import CELLS, Cell
from tests.fixtures.step3p5_tiny import EOS_ID
from tests.v1.utils import HOPPER

# The kernels that platforms prefer to upstream's Triton one for INT8 linear layers.
PREFERRED = ",".join(
    f"{name}Int8ScaledMMLinearKernel" for name in ("FewTokens", "Cutlass", "Aiter")
)
TRITON: dict[str, Any] = {
    "moe_backend": "triton",
    "env": {"VLLM_DISABLED_KERNELS": PREFERRED},
}
# Graphs for the sizes that 200 prompts meet.
COMPILED: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64, 256]},
}
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": COMPILED,
    "triton, eager": TRITON | {"enforce_eager": True},
    "triton, compiled": COMPILED | TRITON,
}
# Of which the Triton kernel reads other channels' scales.
REFUSED_BY_TRITON = "act-static"

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def references() -> dict[str, matrix.Answers]:
    return matrix.references(make_prompts())


def texts(answers: Answers) -> list[str]:
    """The answers up to the end token."""
    found = []
    for row in answers.tokens.tolist():
        end = row.index(EOS_ID) if EOS_ID in row else len(row)
        found.append(addition.decode(row[:end]))
    return found


# Each starts four engines, of which two compile: what people have stands for all.
QUICK = ("int8-3key",)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, id=c.key, marks=[] if c.key in QUICK else pytest.mark.slow)
        for c in CELLS
    ],
)
def test_cell(cell: Cell, tmp_path: Path, references) -> None:
    """Right or refused as it should be, judged as `make matrix` judges; the INT8 MoE's
    own kernels run where they serve and were not put aside."""
    folder = str(cell.write(tmp_path / "cell"))
    engines = [{"model": folder} | options for options in ENGINES.values()]
    prompts = make_prompts()
    found = {}
    for name, answers in zip(
        ENGINES, ask_each(engines, prompts, MAX_TOKENS), strict=True
    ):
        if isinstance(answers, str):
            found[name] = {"outcome": "refused", "error": answers}
            continue
        given = {"texts": texts(answers), "logprobs": answers.logprobs[:, 0].tolist()}
        found[name] = matrix.judge(given, references[cell.model])
        runs_own = HOPPER and not name.startswith("triton")
        assert (answers.runs[0]["moe"] > 0) == runs_own, name

    print(found)
    for name, judged in found.items():
        by_triton = name.startswith("triton") or not HOPPER
        refused = cell.name == REFUSED_BY_TRITON and by_triton
        expected = "refused" if refused else cell.expected
        assert judged["outcome"] == expected, (name, judged)
