# SPDX-License-Identifier: Apache-2.0
"""patches/README.md: what each patch is, from what the patches say themselves."""

import re

from tools.series import Patch, group_lines, groups_of, read_series
from tools.upstream import ROOT, releases, series_folders

TABLE = ROOT / "patches/README.md"
HEAD = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `make patches-table` from the patches; do not edit. -->
# The patches

A number is a patch's name for good, not its place: it is the same in every series. Each
group applies on `fix` alone, where the release does not hold that itself, with the
patches that it depends on. docs/maintain/new-release.md has the rules.
"""
COLUMNS = ("patch", "what", "why", "needs", "offered upstream", "goes when")


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
