# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The report about a checkpoint: for people with rich, for machines as JSON."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .findings import Finding
from .known import Known
from .opened import Checkpoint, quantization_config
from .plan import Kind, by_layer, scheme_of
from .releases import BASE, FORK, fact, facts_file, releases
from .rules import part_of
from .verdicts import Judgement

# Of the JSON. It grows when a key changes its meaning or goes, not when one is added.
VERSION = 2
FINE, GARBAGE, UNREADABLE = 0, 1, 2
_STYLES = {
    "garbage": "bold red",
    "refused": "yellow",
    "warning": "yellow",
    "not known": "dim",
    "note": "dim",
    "right": "green",
}
# Columns of a report that is not shown on a terminal.
WIDTH = 132
MAX_ROWS = 2000
# Characters of a text, such as a name, that are shown.
_SHOWN = 600


@dataclass(frozen=True)
class Report:
    """What is known of a checkpoint; `deep` and `fix` are what came of --deep and
    --fix, as for the JSON; `vllm`: the version that --vllm names; `installed`: that of
    the vLLM beside which this runs."""

    checkpoint: Checkpoint
    kinds: list[Kind]
    judgement: Judgement
    known: Known | None = None
    deep: dict[str, Any] | None = None
    fix: dict[str, Any] | None = None
    vllm: str = ""
    installed: str = ""

    @property
    def findings(self) -> list[Finding]:
        return self.judgement.findings

    @property
    def exit_status(self) -> int:
        return FINE if self.judgement.is_fine else GARBAGE


def printable(text: object) -> str:
    """The text without control characters: names come from strangers' files."""
    return "".join(
        char if char.isprintable() else repr(char)[1:-1] for char in str(text)
    )


def _line(text: object, style: str = "") -> Text:
    return Text(textwrap.shorten(printable(text), _SHOWN, placeholder="..."), style)


def kernels(kind: Kind) -> dict[str, list[str]]:
    """The kernels of INT8 by platform, in the order in which they are tried."""
    if kind.treatment.reads != "INT8":
        return {}
    return facts_file()["kernel"]["experts" if kind.treatment.fused else "linear"]


def quantization(checkpoint: Checkpoint) -> str:
    """`Quark 0.13, INT8: weights per channel; activations per token`."""
    config = quantization_config(checkpoint.model)
    if config is None:
        return "none"
    method = f"{config.get('quant_method', 'unnamed')}"
    if checkpoint.export is None:
        return method
    scheme = scheme_of(part_of(config, "global_quant_config"))
    return f"{method} {config.get('version', '')}, INT8: {scheme}"


# --- for machines ---------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
    """The report as docs/guide/quark-check.md has it."""
    checkpoint = report.checkpoint
    return {
        "version": VERSION,
        "vllm": report.vllm or None,
        "installed": report.installed or None,
        "model": checkpoint.name,
        "architecture": checkpoint.architecture,
        "quantization": quantization(checkpoint),
        "bytes": checkpoint.num_bytes,
        "files": checkpoint.num_files,
        "tensors": len(checkpoint.tensors),
        "modules": [
            {
                "name": kind.name,
                "count": len(kind.modules),
                "layers": sorted(kind.layers),
                "experts": len(kind.experts),
                **{
                    key: value
                    for key, value in asdict(kind.treatment).items()
                    if key != "fused"
                },
                "kernels": kernels(kind),
            }
            for kind in report.kinds
        ],
        "findings": [asdict(each) for each in report.findings],
        "verdicts": [
            {
                "vllm": verdict.target,
                "outcome": verdict.outcome,
                "because": [each.id for each in verdict.because],
            }
            for verdict in report.judgement.verdicts
        ],
        "deep": report.deep,
        "fix": report.fix,
        "exit_status": report.exit_status,
    }


def error_json(error: Exception) -> dict[str, Any]:
    """What stands in the place of a report where nothing can be read."""
    return {"version": VERSION, "error": str(error), "exit_status": UNREADABLE}


# --- for people -----------------------------------------------------------------------


def make_console() -> Console:
    """Of the terminal; elsewhere plain text of a fixed width."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(
        highlight=False, markup=False, emoji=False, width=WIDTH, color_system=None
    )


def show(
    report: Report, console: Console, layers: bool = False, verbose: bool = False
) -> None:
    """Print it; with `layers` a line for each layer, with `verbose` all that is known
    of a module and of releases."""
    _show_heading(report, console)
    kinds = by_layer(report.kinds) if layers else report.kinds
    console.print(_modules(kinds, console, verbose))
    _show_findings(report.findings, console)
    if report.deep:
        _show_deep(report.deep, console)
    console.print(_verdicts(report, console))
    if verbose:
        console.print()
        console.print(_facts(console))
    if report.fix:
        _show_fix(report.fix, console)


def _table(console: Console, *columns: str) -> Table:
    edges = box.SIMPLE_HEAD if console.is_terminal or console.record else box.ASCII2
    table = Table(box=edges, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show_heading(report: Report, console: Console) -> None:
    checkpoint = report.checkpoint
    console.print(_line(checkpoint.name, "bold"))
    console.print(
        _line(
            f"{checkpoint.architecture}; quantization: {quantization(checkpoint)}; "
            f"{size(checkpoint.num_bytes)} in {checkpoint.num_files} files, "
            f"{len(checkpoint.tensors):,} tensors"
        )
    )
    console.print()


def size(num_bytes: int) -> str:
    """`12.3 GB`, in powers of 1000 as Hugging Face has it."""
    number, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _modules(kinds: Iterable[Kind], console: Console, verbose: bool) -> Table:
    table = _table(console, "module", "where", "stored", "scales", "vLLM reads", "by")
    if verbose:
        table.add_column("zero points")
        table.add_column("scheme; kernels", overflow="fold")
    rows = list(kinds)
    for kind in rows[:MAX_ROWS]:
        each = kind.treatment
        style = "bold" if each.reads == "INT8" else ""
        row = [kind.name, kind.where, each.stored, each.scales, each.reads, each.rule]
        if verbose:
            by_platform = "; ".join(
                f"{platform}: {', '.join(names)}"
                for platform, names in kernels(kind).items()
            )
            row += [each.zero_points, f"{each.scheme}. {by_platform}".strip(". ")]
        table.add_row(*(_line(cell) for cell in row), style=style)
    if len(rows) > MAX_ROWS:
        table.add_row(f"and {len(rows) - MAX_ROWS} more; --json has all")
    return table


def _show_findings(findings: list[Finding], console: Console) -> None:
    console.print()
    if not findings:
        console.print("no findings")
    for number, each in enumerate(findings, 1):
        style = _STYLES[each.severity]
        heading = Text(f"{number}. {each.severity}: ", style)
        heading.append(printable(each.summary), "bold")
        heading.append(f"  [{each.id}]", "dim")
        console.print(heading)
        lines = [_line(f"why: {each.why}"), _line(f"remedy: {each.remedy}")]
        if each.tensors:
            shown = ", ".join(each.tensors)
            more = each.count - len(each.tensors)
            lines.append(
                _line(f"seen in: {shown}" + (f" and {more} more" * (more > 0)))
            )
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 3), expand=False))
        console.print()


def _show_deep(deep: dict[str, Any], console: Console) -> None:
    """What --deep read, asked and found, also where it found nothing."""
    found = ", ".join(deep["found"]) or "nothing"
    line = (
        f"--deep read {deep['tensors']:,} tensors ({size(deep['bytes'])}) and measured "
        f"{len(deep['modules']):,} INT8 weights. Found: {found}."
    )
    console.print(_line(line, "bold"))
    asked = _line(f"Looked for: {'; '.join(deep['asked'])}.")
    console.print(Padding(asked, (0, 0, 1, 3), expand=False))


def _verdicts(report: Report, console: Console) -> Table:
    table = _table(console, "vLLM", "this checkpoint", "because of")
    for verdict in report.judgement.verdicts:
        because = ", ".join(
            f"{report.findings.index(each) + 1} {each.id}" for each in verdict.because
        )
        word = Text(verdict.outcome, _STYLES[verdict.outcome])
        table.add_row(_name(report, verdict.target), word, _line(because))
    return table


def _name(report: Report, target: str) -> Text:
    """`stock 0.33.0`, and so on."""
    scope = report.judgement.scope
    is_fork = target in FORK
    of_build = next((row for row in scope.rows if target in row.targets), None)
    is_own = is_fork or (of_build is not None and bool(of_build.patches))
    name = target if is_own else f"stock {target}"
    is_first = scope.first == ("fork" if is_fork else of_build and of_build.name)
    if is_fork and scope.is_one:
        name += f" on {scope.base}"
    if is_first and report.installed and not scope.is_one:
        name += f" ({report.installed} is installed)" if is_fork else " (installed)"
    return Text(printable(name))


def _facts(console: Console) -> Table:
    """What verdicts are told from: which release knows what, and by which patch this
    fork does."""
    names = [each.name.replace("-", "-\n") for each in releases()]
    table = _table(console, "what a vLLM does", *names, "this fork")
    for id in facts_file()["fact"]:
        each = fact(id)
        knows = ["yes" if each.is_in(one.first) else "no" for one in releases()]
        has_it = not each.patch or each.is_in(BASE)
        patch = "yes" if has_it else f"patch {each.patch}"
        table.add_row(_line(each.says), *knows, patch)
    return table


def _show_fix(fix: dict[str, Any], console: Console) -> None:
    console.print()
    line = (
        f"wrote {fix['folder']} ({fix['layout']}): {fix['written']} shards written, "
        f"{fix['linked']} linked"
    )
    console.print(_line(line, "bold"))
    for change in fix["changes"]:
        console.print(Padding(_line(change), (0, 0, 0, 3), expand=False))
