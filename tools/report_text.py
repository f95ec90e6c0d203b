# SPDX-License-Identifier: Apache-2.0
"""The text of `make report`, for an issue."""

from collections.abc import Iterable
from typing import Any

# GitHub takes 65,536 characters.
MOST_CHARACTERS = 60_000
CUT = "\n(cut here; report.json has all of it)\n"


def markdown(report: dict[str, Any]) -> str:
    """What was run where, what passed, ratios, and then logs of what failed."""
    told, steps = report["about"], report["steps"]
    parts = [f"## Quark INT8 on {told.get('chip', 'a GPU')}\n", _pairs(told)]
    summary = [
        (s["name"], s["status"], f"{s['seconds']:.0f} s", _counts(s)) for s in steps
    ]
    parts.append(_table(("run", "result", "time", ""), summary))
    for step in steps:
        if step["rows"]:
            rows = [
                (r["what"], _number(r["stock"]), _number(r["fork"]), _times(r["ratio"]))
                for r in step["rows"]
            ]
            head = (step["name"], "stock", "fork", "times as good")
            parts.append(_table(head, rows))
    text = "\n".join(parts)
    for step in steps:
        for failure in step["failures"]:
            one = _details(failure["name"], failure["log"])
            if len(text) + len(one) > MOST_CHARACTERS:
                return text + CUT
            text += one
    return text


def _counts(step: dict[str, Any]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in step["counts"].items())


def _pairs(told: dict[str, Any]) -> str:
    return _table(("", ""), [(name, str(value)) for name, value in told.items()])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in r] for r in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _details(name: str, log: str) -> str:
    # A fence of its own length: what is inside may have one.
    fence = "`" * 4
    while fence in log:
        fence += "`"
    title = name.replace("<", "&lt;")
    return (
        f"\n<details><summary>{title}</summary>\n\n{fence}\n{log}\n{fence}\n"
        "</details>\n"
    )
