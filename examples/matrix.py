# SPDX-License-Identifier: Apache-2.0
"""Run every cell of tests/fixtures/cells.py through two builds of vLLM.

    python -m examples.matrix [--stock FOLDER] [CELL ...]

Writes build/matrix.json, and docs/measured/matrix.md where all cells were run. The fork
is the installed vLLM. FOLDER holds a stock build, to be put on PYTHONPATH. Without it,
stock is built here: the base release plus the patches that a CPU needs, since the
release itself cannot run Step-3.5 on a CPU. Exits with 1 where the fork answers
garbage or crashes, or refuses a cell that it is to answer right.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.compare_builds import (
    QUESTIONS,
    ROOT,
    TOP,
    Answers,
    ask,
    compare,
    device_name,
    make_prompts,
    make_reference,
)
from tests.fixtures import addition, qwen2_moe_tiny
from tests.fixtures.cells import CELLS, FIXTURES, Cell
from tools.fix import CPU_PATCHES
from tools.mutants import install_only

WORK = ROOT / "build/matrix"
JSON, MARKDOWN = ROOT / "build/matrix.json", ROOT / "docs/measured/matrix.md"
STOCK_ON_CPU = "stock: the base release plus the patches that a CPU needs, 0004 to 0007"

# What counts as right, against the float32 reference of the bfloat16 model.
BAR_EXACT_MATCH = 0.02  # so far below the reference's at most
BAR_OVERLAP, BAR_OVERLAP_RANDOM = 0.97, 0.9  # for trained and for random weights
BAR_DIFFERENCE = 0.1  # mean |d logprob| of the reference's 20 likeliest tokens

Outcome = Literal["right", "garbage", "crashed", "refused", "not run"]
COLOURS = {"right": "green", "garbage": "red", "crashed": "red"}
COLOURS |= {"refused": "yellow", "not run": "dim"}

console = Console()


def references(prompts: list[list[int]]) -> dict[str, Answers]:
    """By model; a model of random weights has log probabilities alone."""
    qwen2_moe = FIXTURES / "qwen2-moe-tiny/bf16"
    return {
        "step3p5-tiny": make_reference(prompts),
        "qwen2-moe-tiny": {"logprobs": qwen2_moe_tiny.logprobs(qwen2_moe, prompts)},
    }


def judge(answers: Answers, reference: Answers) -> dict[str, Any]:
    """The outcome, and the figures or the error it rests on."""
    if "error" in answers:
        outcome = "crashed" if answers["loaded"] else "refused"
        return {"outcome": outcome, "error": answers["error"]}
    figures = compare(reference["logprobs"], answers)
    del figures["top1"]
    difference = figures["mean_abs_dlogprob"]
    right = difference is not None and difference <= BAR_DIFFERENCE
    if texts := reference.get("texts"):
        lost = addition.exact_match(QUESTIONS, texts) - figures["exact_match"]
        right = right and lost <= BAR_EXACT_MATCH
        right = right and figures["overlap20"] >= BAR_OVERLAP
    else:
        right = right and figures["overlap20"] >= BAR_OVERLAP_RANDOM
        del figures["exact_match"]
    return {"outcome": "right" if right else "garbage", **figures}


def as_expected(cell: Cell, outcome: Outcome) -> bool:
    """A cell that is to be refused may be answered right, but none wrong."""
    return outcome == "right" or outcome == cell.expected == "refused"


def row(cell: Cell, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    fork, stock = found["fork"], found["stock"]
    return {
        "cell": cell.key,
        "made_by": cell.made_by,
        "why_by_hand": cell.why_by_hand or None,
        "varies": cell.varies,
        "expected": cell.expected,
        "stock": stock["outcome"],
        "fork": fork["outcome"],
        "as_expected": as_expected(cell, fork["outcome"]),
        "exact_match": fork.get("exact_match"),
        "overlap20": fork.get("overlap20"),
        "mean_abs_dlogprob": fork.get("mean_abs_dlogprob"),
        "error": fork.get("error"),
        "stock_exact_match": stock.get("exact_match"),
        "stock_error": stock.get("error"),
    }


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def figures(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        share(found["exact_match"]),
        number(found["overlap20"]),
        number(found["mean_abs_dlogprob"]),
    )


def show(rows: list[dict[str, Any]], heading: str) -> None:
    table = Table(title=heading, title_justify="left")
    for name in ("cell", "by", "stock", "fork"):
        table.add_column(name, no_wrap=True)
    for name in ("right", f"top {TOP}", "|d logprob|"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in rows:
        wanted = "" if found["as_expected"] else f", not {found['expected']}"
        table.add_row(
            found["cell"],
            found["made_by"],
            Text(found["stock"], COLOURS[found["stock"]]),
            Text(found["fork"] + wanted, COLOURS[found["fork"]]),
            *figures(found),
        )
    console.print(table)
    for found in rows:
        if found["error"]:
            said = Text(f"{found['cell']}: {found['error'][:300]}")
            console.print(said, soft_wrap=True)


def markdown(rows: list[dict[str, Any]], heading: str) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [
        "# Which Quark INT8 exports are read right",
        "",
        f"Written by `make matrix`. {heading}.",
        "",
        "The reference is the bfloat16 model in plain torch, float32.",
        "",
        f"- `right`: of {len(QUESTIONS)} sums at most {BAR_EXACT_MATCH:.0%} fewer "
        f"right answers than the reference, overlap of the {TOP} likeliest tokens at "
        f"least {BAR_OVERLAP}, mean |d logprob| of them at most {BAR_DIFFERENCE}. The "
        "Qwen2-MoE has random weights and gives no sums: there the last two count, "
        f"with an overlap of at least {BAR_OVERLAP_RANDOM}.",
        "- `refused`: loading ended with an error. `crashed`: the first question did. "
        "`garbage`: the rest.",
        "- Figures are the fork's.",
        "",
        "| cell | what varies | made by | stock | fork | right answers "
        f"| top {TOP} | \\|d logprob\\| |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        outcome = found["fork"]
        if not found["as_expected"]:
            outcome = f"**{outcome}**, to be {found['expected']}"
        columns = [
            f"`{found['cell']}`",
            cell(found["varies"]),
            found["made_by"],
            found["stock"],
            outcome,
            *figures(found),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    errors = [found for found in rows if found["error"]]
    if errors:
        lines += ["", "What the fork said where it refused:", ""]
        lines += [f"- `{found['cell']}`: `{cell(found['error'])}`" for found in errors]
    by_hand = [found for found in rows if found["why_by_hand"]]
    lines += ["", "Why a cell is made by hand:", ""]
    lines += [f"- `{found['cell']}`: {cell(found['why_by_hand'])}" for found in by_hand]
    return "\n".join(lines) + "\n"


def parse_cells(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with `--stock FOLDER` and `chosen`: the cells that it names, by
    their names, or all. Ends the program for a name that is none."""
    parser.add_argument("--stock", type=Path, metavar="FOLDER")
    parser.add_argument("cells", nargs="*", metavar="CELL", help="all if none is named")
    args = parser.parse_args()
    known = {cell.key: cell for cell in CELLS}
    if unknown := [name for name in args.cells if name not in known]:
        sys.exit(f"error: no cell {unknown}; there are {', '.join(known)}")
    args.chosen = {name: known[name] for name in args.cells or known}
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    args = parse_cells(parser)
    if torch.cuda.is_available() and not args.stock:
        sys.exit("error: on a GPU say --stock FOLDER: an unpacked stock build of vLLM")
    started = time.monotonic()

    prompts = make_prompts()
    with console.status("The references answer"):
        by_model = references(prompts)
    with console.status("Writing the checkpoints"):
        folders = {k: cell.write(WORK / k) for k, cell in args.chosen.items()}
    with console.status("Building stock"):
        builds = {"stock": args.stock or install_only(*CPU_PATCHES), "fork": None}
    found: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in args.chosen}
    for build, package in builds.items():
        for key, answers in ask(f"matrix-{build}", folders, prompts, package):
            found[key][build] = judge(answers, by_model[args.chosen[key].model])
            outcome = found[key][build]["outcome"]
            console.print(f"{build} {key}: {outcome}", highlight=False)

    rows = [row(cell, found[key]) for key, cell in args.chosen.items()]
    stock = f"stock: {args.stock.name}" if args.stock else STOCK_ON_CPU
    date = datetime.date.today().isoformat()
    heading = f"{device_name()}, {date}; {stock}"
    show(rows, heading)
    JSON.write_text(json.dumps(rows, indent=1) + "\n")
    if not args.cells:
        MARKDOWN.write_text(markdown(rows, heading))
    console.print(
        f"{len(rows)} cells, two builds: {time.monotonic() - started:.0f} s; "
        f"{JSON.relative_to(ROOT)}",
        highlight=False,
    )
    if wrong := [found["cell"] for found in rows if not found["as_expected"]]:
        sys.exit(f"error: the fork is not as expected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
