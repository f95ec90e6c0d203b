# SPDX-License-Identifier: Apache-2.0
"""Ask stock vLLM checkpoints that `vllm quark-check --fix` wrote.

    python -m examples.rewritten [--stock FOLDER]

FOLDER holds a stock build of vLLM, to be put on PYTHONPATH. Without it, on a CPU, stock
is the base release plus the patches that a CPU needs, which read no checkpoint. For
INT8 experts in compressed-tensors format examples/ask_rewritten.py adds the kernel
that stock lacks there. Every export is asked as it is and as it was rewritten, and
compared with the float32 reference as examples/matrix.py does. Writes
build/rewritten.json and exits with 1 where a rewritten checkpoint is not answered
right.
"""

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.quark.quark_check.fix.planned import Target
from vllm.model_executor.layers.quantization.quark.quark_check.fix.rewrite import (
    rewrite,
)

from examples.compare_builds import ROOT, ask, device_name, make_prompts
from examples.matrix import STOCK_ON_CPU, judge, references
from tests.fixtures.cells import BASE, CELLS
from tools.fix import CPU_PATCHES
from tools.mutants import install_only

WORK, JSON = ROOT / "build/rewritten", ROOT / "build/rewritten.json"
SCRIPT = ROOT / "examples/ask_rewritten.py"
BY_KEY = {cell.key: cell for cell in CELLS}


@dataclass(frozen=True)
class Case:
    """A cell of tests/fixtures/cells.py and the layout that it is to get."""

    cell: str
    target: Target

    @property
    def name(self) -> str:
        return f"{self.cell}-as-{self.target}"


CASES = (
    Case("int8-3key", "compressed-tensors"),
    Case(BASE, "compressed-tensors"),
    Case("weight-per-tensor-act-static", "compressed-tensors"),
    Case("exclude-forgotten", "compressed-tensors"),
    Case(f"qwen2-moe-tiny-{BASE}", "compressed-tensors"),
    Case("int8-3key", "quark"),
    Case("scales-columns", "quark"),
)


def write(cases: Iterable[Case]) -> dict[str, Path]:
    """The exports as they are, by their keys, and rewritten, by the cases' names."""
    folders: dict[str, Path] = {}
    for case in cases:
        if case.cell not in folders:
            folders[case.cell] = BY_KEY[case.cell].write(WORK / case.cell)
        out = WORK / case.name
        shutil.rmtree(out, ignore_errors=True)
        folders[case.name] = rewrite(folders[case.cell], out, case.target).folder
    return folders


def run(cases: Iterable[Case], stock: Path | None = None) -> dict[str, dict[str, Any]]:
    """Name of an export or a case -> what `matrix.judge` says of stock's answers."""
    prompts = make_prompts()
    by_model = references(prompts)
    folders = write(cases)
    models = {case.cell: BY_KEY[case.cell].model for case in cases}
    models |= {case.name: models[case.cell] for case in cases}
    build = stock or install_only(*CPU_PATCHES)
    return {
        name: judge(answers, by_model[models[name]])
        for name, answers in ask("rewritten", folders, prompts, build, SCRIPT)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stock", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if torch.cuda.is_available() and not args.stock:
        sys.exit("error: on a GPU say --stock FOLDER: an unpacked stock build of vLLM")
    found = run(CASES, args.stock)
    for name, each in found.items():
        print(name, each, flush=True)
    head = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "stock": args.stock.name if args.stock else STOCK_ON_CPU,
    }
    JSON.write_text(json.dumps({**head, "outcomes": found}, indent=1) + "\n")
    wrong = [case.name for case in CASES if found[case.name]["outcome"] != "right"]
    if wrong:
        sys.exit(f"error: not answered right: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
