# SPDX-License-Identifier: Apache-2.0
"""What each patch is, from what the patches say themselves: patches/README.md, and the
sizes of groups in README.md."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tools.repack import overlay_of
from tools.series import Patch, group_lines, groups_of, read_series
from tools.upstream import ROOT, releases, series_folders

TABLE, README = ROOT / "patches/README.md", ROOT / "README.md"
HEAD = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `make patches-table` from the patches; do not edit. -->
# The patches

A number is a patch's name for good, not its place: it is the same in every series. Each
group needs `fix`, the patches in its column "needs", and nothing else of other groups.
From 0.22.0 on vLLM holds the fix, and each group applies by itself. Take a group:
[cherry-pick](../docs/guide/cherry-pick.md). Change one: [the rules for
patches](../docs/maintain/patches.md).
"""
COLUMNS = ("patch", "what", "why", "needs", "offered upstream", "goes when")


CHANGED = re.compile(r"^[+-](?!\+\+ |-- )", re.MULTILINE)


@dataclass(frozen=True)
class Size:
    """How large a group is: its patches, the lines that they add and take away, and the
    Python files of the overlay that it is the first to name, with their lines. As text,
    lines of files are rounded to hundreds."""

    patches: int
    changed: int
    files: int
    lines: int

    def __str__(self) -> str:
        text = f"{self.patches} patches, {self.changed} lines"
        if self.files:
            plural = "s" * (self.files > 1)
            text += f"; {self.files} new file{plural}, {round(self.lines, -2):,} lines"
        return text


def sizes(folder: Path) -> dict[str, Size]:
    """Group -> its size, of a series. What two groups name counts for the first."""
    patches = read_series(folder)
    seen: set[str] = set()
    found = {}
    for group in groups_of(patches):
        mine = [patch for patch in patches if patch.group == group]
        new = {name for name in overlay_of(mine) if name.endswith(".py")} - seen
        seen |= new
        changed = sum(
            len(CHANGED.findall(patch.path.read_text().partition("\ndiff --git")[2]))
            for patch in mine
        )
        found[group] = Size(len(mine), changed, len(new), _num_lines(new))
    return found


def total(groups: Iterable[Size]) -> str:
    """What README says of a whole series."""
    every = list(groups)
    lines = round(sum(size.lines for size in every), -3)
    return f"{sum(size.patches for size in every)} patches hook {lines:,} lines"


def with_sizes(readme: str, folder: Path) -> str:
    """README with the size of a series, and of each group in the second cell of its
    row."""
    found = sizes(folder)
    readme = re.sub(r"\d+ patches hook [\d,]+ lines", total(found.values()), readme)
    for group, size in found.items():
        row = re.compile(rf"^(\| `{group}` \|)[^|]*\|", re.MULTILINE)
        readme = row.sub(rf"\1 {size} |", readme, count=1)
    return readme


def _num_lines(names: Iterable[str]) -> int:
    return sum(len((ROOT / name).read_text().splitlines()) for name in names)


def table() -> str:
    """The whole file: a table for each group of each series."""
    parts = [HEAD]
    for folder in series_folders():
        patches = read_series(folder)
        told = group_lines(folder)
        versions = [v for v, r in releases().items() if r.series == folder]
        parts.append(f"## {folder.name}: vLLM {', '.join(versions)}\n")
        for group in groups_of(patches):
            parts.append(f"### {group}\n\n{_sentence(told.get(group, ''))}\n")
            rows = [_row(patch) for patch in patches if patch.group == group]
            lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def _row(patch: Patch) -> tuple[str, ...]:
    message = patch.message
    name = patch.path.relative_to(TABLE.parent).as_posix()
    if applied := message.value("Applied-Upstream"):
        version, _, url = applied.partition(", ")
        upstream = f"[in {version}]({url})" if url else f"in {version}"
    else:
        upstream = message.value("Forwarded")
    cells = (
        f"[{patch.number}]({name})",
        message.subject,
        _first_sentence(message.reason),
        ", ".join(message.depends),
        upstream,
        message.value("Remove-when"),
    )
    return tuple(cell.replace("|", "\\|") for cell in cells)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""
