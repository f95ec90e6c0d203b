# SPDX-License-Identifier: Apache-2.0
"""Ask a stock release, on a CPU, the exports of families.py and matrix.py.

    python -m examples.stock_release --python PYTHON --vllm VERSION [--stand-in]
        [--no-pictures] RESULTS.json [FAMILY | FAMILY--EXPORT | CELL ...]

PYTHON is the interpreter of an environment with that release, and nothing of this fork;
this process needs an environment with the fork, for the references. With --stand-in
INT8 experts and the router's operators, which no CPU has there, are computed in torch
(ask_stand_in.py). RESULTS gets `{"vllm", "device", "has_amx", "date", "command",
"rows": [{"case", "architecture", "outcome", ..}]}`, as they come; the outcome is right,
garbage, refused, or "needs a GPU": the unquantized model is refused too. What RESULTS
has of other cases stays.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples import families as asked_families
from examples import matrix
from examples.compare_builds import (
    ROOT,
    Answers,
    ask,
    device_name,
    make_prompts,
)
from tests.fixtures import families
from tests.fixtures.cells import CELLS

STAND_IN = ROOT / "examples/ask_stand_in.py"
WORK = ROOT / "build/stock"
SECONDS = 900.0  # for an engine to start and answer
ABOUT = (
    "import torch, vllm\nprint(vllm.__version__, torch.cpu._is_amx_tile_supported())"
)


def about(python: str, version: str) -> bool:
    """Whether the release sees AMX here; ends where it is another release."""
    run = subprocess.run([python, "-c", ABOUT], capture_output=True, text=True)
    found, _, has_amx = (run.stdout.split("\n")[-2:] or [""])[0].partition(" ")
    if run.returncode or found != version:
        said = (run.stderr.strip().splitlines() or [""])[-1]
        sys.exit(f"error: {python}: expected vLLM {version}, found {found or said}")
    return has_amx == "True"


def ask_families(
    python: str,
    script: Path | None,
    wanted: Mapping[families.Family, list[str] | None],
    with_pictures: bool,
) -> Iterator[dict[str, Any]]:
    """Rows as they come. Families that want the same environment share processes."""
    prompts = families.make_prompts(asked_families.NUM_PROMPTS)
    cells = [
        cell
        for family, exports in wanted.items()
        for cell in asked_families.make_cells(family, prompts, exports)
    ]
    by_key = {cell.key: cell for cell in cells}
    number = asked_families.NUM_PICTURES if with_pictures else 0
    environments = {tuple(family.env.items()) for family in wanted}
    for env in sorted(environments):
        here = [cell for cell in cells if tuple(cell.family.env.items()) == env]
        found = ask(
            "stock-release",
            {cell.key: cell.folder for cell in here},
            prompts,
            None,
            script,
            env=dict(env),
            seconds=SECONDS,
            pictures={c.key: families.make_pictures(c.family, number) for c in here},
            python=python,
        )
        for key, answers in found:
            cell = by_key[key]
            if cell.export == families.FLOAT:  # the first of its family
                plain = asked_families.judge_control(cell, answers)
                continue
            case = {"case": key, "architecture": cell.family.architecture}
            judged = judge_family(cell, answers, plain)
            yield case | judged | {"unquantized": plain["outcome"]}


def judge_family(
    cell: asked_families.Cell, answers: Answers, control: Answers
) -> dict[str, Any]:
    found = asked_families.judge(cell, answers, control, is_stock=True)
    outcome, _, error = found.pop("outcome").partition(": ")
    return {"outcome": outcome, "error": error or None, **found}


def ask_cells(
    python: str, script: Path | None, names: set[str]
) -> Iterator[dict[str, Any]]:
    wanted = [cell for cell in CELLS if cell.key in names]
    prompts = make_prompts()
    references = matrix.references(prompts)
    folders = {cell.key: cell.write(WORK / cell.key) for cell in wanted}
    found = ask(
        "stock-release", folders, prompts, None, script, seconds=SECONDS, python=python
    )
    for (name, answers), cell in zip(found, wanted, strict=True):
        config = json.loads((folders[name] / "config.json").read_text())
        [architecture] = config["architectures"]
        judged = matrix.judge(answers, references[cell.model])
        if "error" in judged:  # when it first runs, too
            judged["outcome"] = "refused"
        yield {"case": name, "architecture": architecture, **judged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--vllm", required=True, metavar="VERSION")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    args = parser.parse_args()
    has_amx = about(args.python, args.vllm)
    script = STAND_IN if args.stand_in else None
    cell_names = {cell.key for cell in CELLS}
    of_families = [name for name in args.cases if name not in cell_names]
    wanted = asked_families.chosen(of_families)
    if args.cases:
        wanted = wanted if of_families else {}
        cell_names &= set(args.cases)
    before = json.loads(args.results.read_text()) if args.results.exists() else {}
    rows = {row["case"]: row for row in before.get("rows", ())}

    def keep(row: dict[str, Any]) -> None:
        said = row.get("error") or row.get("overlap20")
        print(f"{row['case']}: {row['outcome']} {said}"[:160], flush=True)
        rows[row["case"]] = row
        results = {
            "vllm": args.vllm,
            "device": device_name(),
            "has_amx": has_amx,
            "date": datetime.date.today().isoformat(),
            "command": command(args),
            "rows": sorted(rows.values(), key=lambda row: row["case"]),
        }
        args.results.write_text(json.dumps(results, indent=1) + "\n")

    for row in ask_families(args.python, script, wanted, not args.no_pictures):
        keep(row)
    for row in ask_cells(args.python, script, cell_names) if cell_names else ():
        keep(row)


def command(args: argparse.Namespace) -> str:
    """The command, without the machine's paths and the cases."""
    parts = ["python -m examples.stock_release --python PYTHON --vllm", args.vllm]
    parts += ["--stand-in"] * args.stand_in + ["--no-pictures"] * args.no_pictures
    return " ".join([*parts, "RESULTS.json"])


if __name__ == "__main__":
    main()
