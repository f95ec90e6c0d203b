# SPDX-License-Identifier: Apache-2.0
"""Run the exports of tests/fixtures/families.py through two builds of vLLM.

    python -m examples.families [--stock FOLDER] [FAMILY | FAMILY--EXPORT ...]

Writes build/families.json, and docs/measured/families.md where all families were run.
The builds are those of examples/matrix.py; the unquantized model is asked of stock
first. Exits with 1 where the fork answers garbage, or not right what stock answers
right, or where quark-check says otherwise than what happened.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from examples.compare_builds import (
    ROOT,
    TOP,
    Answers,
    ask,
    compare_logprobs,
    device_name,
    environment,
)
from examples.matrix import STOCK_ON_CPU
from tests.fixtures import families
from tests.fixtures.families import FAMILIES, Family
from tools.fix import CPU_PATCHES
from tools.mutants import install_only

WORK = ROOT / "build/families"
JSON, MARKDOWN = ROOT / "build/families.json", ROOT / "docs/measured/families.md"

NUM_PROMPTS = NUM_PICTURES = 64
SECONDS = 180  # for an engine to start and answer, and for one look of quark-check

# Else hybrid attention wants FlashInfer, which vLLM does not bring along.
ON_GPU = {"gdn_prefill_backend": "triton"}

# How far an overlap may lie below what the reference has with itself, computed with
# activations in INT8 and products in bfloat16: the noise of a mean of so many prompts,
# in standard errors, and what an engine rounds to bfloat16 beside products.
BAR_ERRORS, BAR_BFLOAT16 = 4, 0.01

TRANSFORMERS = f"transformers {version('transformers')}, float32"
DEQUANTIZED = f"{TRANSFORMERS}, dequantized weights"
STOCK_FLOAT = "stock vLLM, unquantized"
COLOURS = {"right": "green", "garbage": "red", "refused": "yellow", "needs": "dim"}

QUARK_CHECK = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
# The command beside the installed vLLM, and its package by itself.
CHECKS: dict[str, list[str]] = {
    "installed": ["-m", "vllm.entrypoints.cli.main", "quark-check"],
    "alone": [str(QUARK_CHECK)],
}

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Cell:
    """One export, or the unquantized model, with the answers that it should give.

    dequantized, unquantized: log probabilities float32 [prompts, vocab] of
    transformers. bars: the least overlap with each of the two that counts as right.
    """

    family: Family
    export: str
    folder: Path
    dequantized: Tensor
    unquantized: Tensor
    bars: tuple[float, float]

    @property
    def key(self) -> str:
        return f"{self.family.name}--{self.export}"


def overlaps(reference: Tensor, found: Tensor) -> Tensor:
    """Of each prompt the share of the likeliest tokens that both have, [prompts]."""
    likeliest, of_found = (each.topk(TOP).indices for each in (reference, found))
    return (likeliest[:, :, None] == of_found[:, None, :]).any(-1).double().mean(-1)


def bar(reference: Tensor, rounded: Tensor) -> float:
    """What counts as right, from the reference and the same computed as coarsely as
    an engine does."""
    each = overlaps(reference, rounded)
    error = each.std().item() / math.sqrt(len(each))
    return each.mean().item() - BAR_ERRORS * error - BAR_BFLOAT16


def make_cells(
    family: Family, prompts: Sequence[Sequence[int]], exports: Sequence[str] | None
) -> Iterator[Cell]:
    """Write a family's exports, the unquantized model first."""
    plain = families.float_export(family)
    unquantized = families.logprobs(families.reference(plain), prompts)
    for name in (families.FLOAT, *families.exports(family)):
        if exports is not None and name not in (families.FLOAT, *exports):
            continue
        export = families.make_export(family, name)
        model = families.reference(export)
        dequantized = families.logprobs(model, prompts)
        with families.Rounded(model):
            rounded = families.logprobs(model, prompts)
        yield Cell(
            family,
            name,
            export.write(WORK / f"{family.name}--{name}"),
            dequantized,
            unquantized,
            (bar(dequantized, rounded), bar(unquantized, rounded)),
        )


def ask_all(
    build: str,
    cells: Sequence[Cell],
    prompts: Sequence[Sequence[int]],
    package: Path | None,
) -> dict[str, Answers]:
    """A build's answers by cell. Families that want the same environment share
    processes."""
    answers: dict[str, Answers] = {}
    by_env: dict[tuple[tuple[str, str], ...], dict[str, Path]] = defaultdict(dict)
    for cell in cells:
        by_env[tuple(cell.family.env.items())][cell.key] = cell.folder
    pictures = {c.key: families.make_pictures(c.family, NUM_PICTURES) for c in cells}
    for env, folders in by_env.items():
        asked = ask(
            f"families-{build}",
            folders,
            prompts,
            package,
            env=dict(env),
            seconds=SECONDS,
            options=ON_GPU if torch.cuda.is_available() else {},
            pictures=pictures,
        )
        for key, one in asked:
            answers[key] = one
            said = one.get("error", "answered")
            console.print(Text(f"{build} {key}: {said[:160]}"), soft_wrap=True)
    return answers


def tensor(rows: Sequence[Sequence[float | None]]) -> Tensor:
    """Log probabilities [prompts, vocab], where null stands for what is not finite."""
    return torch.tensor([[-math.inf if x is None else x for x in row] for row in rows])


def judge_control(cell: Cell, answers: Answers) -> dict[str, Any]:
    """Stock's unquantized answers, with what they are worth."""
    if error := answers.get("error"):
        return answers | {"outcome": f"refused: {error}"}
    found = compare_logprobs(cell.unquantized, answers["logprobs"])["overlap20"]
    least = cell.bars[0]
    is_right = found >= least
    outcome = "right" if is_right else f"garbage: {found:.3f}, the bar is {least:.3f}"
    return answers | {"outcome": outcome}


def judge(
    cell: Cell, answers: Answers, control: Answers, is_stock: bool = False
) -> dict[str, Any]:
    """The outcome, and the overlaps it rests on.

    The control is what stock answers unquantized. Where it ends with the same error, no
    export of the family can run here. Where it is known to differ from transformers
    here, and does, it takes transformers' place for stock. Questions with a picture are
    asked of it alone: releases mask a picture's tokens differently.
    """
    if error := answers.get("error"):
        is_same = error == control.get("error") and not torch.cuda.is_available()
        return {"outcome": f"{'needs a GPU' if is_same else 'refused'}: {error}"}
    rows = answers["logprobs"]
    reference, least, said = cell.dequantized, cell.bars[0], DEQUANTIZED
    reason = cell.family.differs_on_cpu if is_stock else ""
    if reason and "error" not in control and control["outcome"] != "right":
        reference, least = tensor(control["logprobs"]), cell.bars[1]
        said = f"{STOCK_FLOAT}: {reason}"
    found = compare_logprobs(reference, rows)
    is_finite = all(value is not None for row in rows for value in row)
    outcome = "right" if is_finite and found["overlap20"] >= least else "garbage"
    of_pictures = None
    if "pictures" in answers and "pictures" in control:
        figures = compare_logprobs(tensor(control["pictures"]), answers["pictures"])
        of_pictures = figures["overlap20"]
        is_finite = all(value is not None for r in answers["pictures"] for value in r)
        # The control is rounded to bfloat16 too.
        is_right = is_finite and of_pictures >= cell.bars[1] - BAR_BFLOAT16
        if outcome == "right" and not is_right:
            outcome = "garbage: with pictures"
    return {
        "outcome": outcome,
        "overlap20": found["overlap20"],
        "overlap20_pictures": of_pictures,
        "overlap20_unquantized": compare_logprobs(cell.unquantized, rows)["overlap20"],
        "bar": least,
        "reference": said,
    }


def quark_check(folder: Path, mode: str, env: Mapping[str, str]) -> dict[str, str]:
    """What `vllm quark-check` expects of this fork and of stock 0.20, here."""
    command = [sys.executable, *CHECKS[mode], "--json", str(folder)]
    try:
        run = subprocess.run(
            command,
            env=environment(None) | {"VLLM_LOGGING_LEVEL": "ERROR"} | dict(env),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(("fork", "stock"), f"no report in {SECONDS} s")
    start = run.stdout.find("{")
    if start < 0:
        said = (run.stderr or run.stdout).strip().splitlines()
        return dict.fromkeys(("fork", "stock"), said[-1] if said else "nothing")
    verdicts = json.loads(run.stdout[start:])["verdicts"]
    device = "GPU" if torch.cuda.is_available() else "CPU"
    rows = {"fork": f"this fork, {device}", "stock": "0.20"}
    said_of = {
        build: next((v["outcome"] for v in verdicts if v["vllm"].startswith(row)), "")
        for build, row in rows.items()
    }
    return said_of


def short(outcome: str) -> str:
    return outcome.partition(":")[0]


def faults(row: Mapping[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = []
    if short(row["fork"]) == "garbage":
        found.append("the fork answers garbage")
    if row["stock"] == "right" and row["fork"] != "right":
        found.append("stock answers right, the fork does not")
    for mode, said in row["quark_check"].items():
        for build in ("fork", "stock"):
            if build == "stock" and short(row["unquantized"]) == "garbage":
                continue  # so is each export, whatever quark-check says of it
            outcome = short(row[build])
            expected = said[build]
            # It need not know, but what it knows must be so.
            if expected in ("right", "garbage", "refused") and expected != outcome:
                of = "" if mode == "installed" else " alone"
                found.append(f"quark-check{of} says {expected} of {build}: {outcome}")
    return found


def say_check(row: Mapping[str, Any]) -> str:
    """Of the fork, of stock; and what the script says by itself, if another thing."""
    said = [
        "; stock ".join((one["fork"], one["stock"]))
        for one in row["quark_check"].values()
    ]
    return said[0] if len(set(said)) < 2 else f"{said[0]}; alone: {said[1]}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def show(rows: Sequence[Mapping[str, Any]], heading: str) -> None:
    table = Table(title=heading, title_justify="left")
    for name in ("family", "export", "stock", "fork", "quark-check"):
        table.add_column(name, no_wrap=True)
    for name in (f"top {TOP}", "bar"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["family"],
            row["export"],
            *(
                Text(short(row[b]), COLOURS[short(row[b]).split()[0]])
                for b in ("stock", "fork")
            ),
            say_check(row),
            number(row["overlap20"]),
            number(row["bar"]),
        )
    console.print(table)


def markdown(rows: Sequence[Mapping[str, Any]], heading: str) -> str:
    def plain(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [
        "# Which families are read right",
        "",
        f"Written by `make matrix`. {heading}.",
        "",
        "Small models of random weights, exported by hand in the layout that amd-quark "
        "0.13 writes ([families.py](../../tests/fixtures/families.py)). Each is asked "
        f"{NUM_PROMPTS} random prompts; what is not loaded is memory full of NaN. The "
        f"figure is the mean overlap of the {TOP} likeliest first tokens with the "
        f"reference: {DEQUANTIZED}.",
        "",
        "- `right`: finite, and no less than the bar. The bar is what the reference "
        "keeps of itself with activations in INT8 and products in bfloat16, less "
        f"{BAR_ERRORS} standard errors and {BAR_BFLOAT16}.",
        "- `garbage`: less than the bar. `refused`: the engine ended with an error.",
        "- `needs a GPU`: so does the unquantized model, with the same error.",
        "- `garbage: with pictures`: models that take pictures are asked "
        f"{NUM_PICTURES} questions with one too, and those alone are not answered as "
        "by the unquantized model.",
        "- Figures are the fork's, or stock's where the fork has none. quark-check's "
        "verdicts are of the fork, then of stock.",
        "",
        "| family | architecture | export | stock | fork | quark-check "
        f"| top {TOP} | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stock, fork = (
            row[b] if short(row[b]) == "garbage" else short(row[b])
            for b in ("stock", "fork")
        )
        if row["faults"] and fork != "right":
            fork = f"**{fork}**"
        star = "*" if row["reference"].startswith(STOCK_FLOAT) else ""
        columns = [
            row["family"],
            row["architecture"],
            f"`{row['export']}`",
            stock,
            fork,
            plain(say_check(row)),
            number(row["overlap20"]) + star,
            number(row["bar"]),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    for build in ("stock", "fork"):
        said: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if short(row[build]) in ("refused", "needs a GPU"):
                said[row[build]].append(f"{row['family']} `{row['export']}`")
        if said:
            lines += ["", f"What {build} said where it did not answer:", ""]
            lines += [f"- `{plain(e)}`: {', '.join(of)}" for e, of in said.items()]
    others = {row["family"]: row["unquantized"] for row in rows}
    others = {name: said_of for name, said_of in others.items() if said_of != "right"}
    if others:
        lines += [
            "",
            "Unquantized, stock does not answer these as transformers does:",
            "",
        ]
        lines += [f"- {name}: {plain(said_of)}" for name, said_of in others.items()]
    starred = {r["reference"] for r in rows if r["reference"].startswith(STOCK_FLOAT)}
    lines += [f"\n\\* The reference is {reference}." for reference in sorted(starred)]
    wrong = [row for row in rows if row["faults"]]
    if wrong:
        lines += ["", "Not as it should be:", ""]
        lines += [
            f"- {row['family']} `{row['export']}`: {plain('; '.join(row['faults']))}"
            for row in wrong
        ]
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str]) -> dict[Family, list[str] | None]:
    """Families and the exports to run of them; None for all."""
    wanted: dict[Family, list[str] | None] = {}
    for name in names:
        family_name, _, export = name.partition("--")
        family = families.BY_NAME.get(family_name)
        if family is None or export and export not in families.exports(family):
            sys.exit(
                f"error: no family or export {name}; there are "
                f"{', '.join(families.BY_NAME)}, and of one FAMILY--EXPORT: by-name, .."
            )
        if not export:
            wanted[family] = None
        elif (of_family := wanted.setdefault(family, [])) is not None:
            of_family.append(export)
    return wanted or dict.fromkeys(FAMILIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stock", type=Path, metavar="FOLDER")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    args = parser.parse_args()
    if torch.cuda.is_available() and not args.stock:
        sys.exit("error: on a GPU say --stock FOLDER: an unpacked stock build of vLLM")
    wanted = chosen(args.families)
    if importlib.util.find_spec("torchvision") is None:
        # Transformers' processors of pictures want it, and so do vLLM's.
        for family in [family for family in wanted if family.processor]:
            del wanted[family]
            console.print(f"left out, without torchvision: {family.name}")
    started = time.monotonic()
    torch.set_num_threads(1)  # for so small models more cost more than they bring

    prompts = families.make_prompts(NUM_PROMPTS)
    with console.status("Writing the exports, and asking transformers"):
        cells = [
            cell
            for family, exports in wanted.items()
            for cell in make_cells(family, prompts, exports)
        ]
    controls = {c.family: c for c in cells if c.export == families.FLOAT}
    cells = [cell for cell in cells if cell.export != families.FLOAT]
    with console.status("Building stock"):
        package = args.stock or install_only(*CPU_PATCHES)
    answers = {
        "stock": ask_all("stock", [*controls.values(), *cells], prompts, package),
        "fork": ask_all("fork", cells, prompts, None),
    }
    with console.status("quark-check"), ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = [(c.folder, mode, c.family.env) for c in cells for mode in CHECKS]
        said = iter(list(pool.map(lambda one: quark_check(*one), asked)))

    judged = {
        family: judge_control(cell, answers["stock"][cell.key])
        for family, cell in controls.items()
    }
    rows = []
    for cell in cells:
        control = judged[cell.family]
        found = {
            build: judge(cell, of_build[cell.key], control, build == "stock")
            for build, of_build in answers.items()
        }
        figures = found["fork"] if "bar" in found["fork"] else found["stock"]
        row = {
            "family": cell.family.name,
            "architecture": cell.family.architecture,
            "export": cell.export,
            "stock": found["stock"]["outcome"],
            "fork": found["fork"]["outcome"],
            "quark_check": {mode: next(said) for mode in CHECKS},
            "overlap20": figures.get("overlap20"),
            "reference": figures.get("reference", DEQUANTIZED),
            "bar": figures.get("bar"),
            "overlap20_pictures": figures.get("overlap20_pictures"),
            "overlap20_unquantized": figures.get("overlap20_unquantized"),
            "overlap20_stock": found["stock"].get("overlap20"),
            "unquantized": control["outcome"],
        }
        rows.append(row | {"faults": faults(row)})

    stock = f"stock: {args.stock.name}" if args.stock else STOCK_ON_CPU
    heading = f"{device_name()}, {datetime.date.today().isoformat()}; {stock}"
    show(rows, heading)
    JSON.write_text(json.dumps(rows, indent=1) + "\n")
    if not args.families:
        MARKDOWN.write_text(markdown(rows, heading))
    console.print(
        f"{len(rows)} exports, two builds: {time.monotonic() - started:.0f} s; "
        f"{JSON.relative_to(ROOT)}",
        highlight=False,
    )
    for row in rows:
        for fault in row["faults"]:
            said_of = f"error: {row['family']}--{row['export']}: {fault}"
            console.print(Text(said_of), soft_wrap=True)
    if any(row["faults"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
