# SPDX-License-Identifier: Apache-2.0
"""Where in a base's files the changes of a patch land, whatever other patches did."""

import re
from pathlib import Path

from tools.series import git

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")

# File -> changes: the base's line above, the base's lines that go, the lines that come
Places = dict[str, list[tuple[int, tuple[int, ...], tuple[str, ...]]]]


def places(tree: Path, commits: list[str], base: str = "base") -> list[Places]:
    """Of each commit, in the order in which they stand on `base`."""
    origins: dict[str, list[int]] = {}
    found = []
    for commit in commits:
        found.append(_places(tree, commit, origins, base))
    return found


def _places(
    tree: Path, commit: str, origins: dict[str, list[int]], base: str
) -> Places:
    """`origins` holds the number of each line in the base, 0 of a line that a patch
    brought, for each file as it is before the commit and then after it."""
    form = ["--unified=0", "--no-color", "--no-ext-diff", "--no-renames"]
    said = git("diff", *form, f"{commit}~1", commit, cwd=tree).stdout
    found: Places = {}
    for part in re.split(r"^diff --git ", said, flags=re.M)[1:]:
        name = part.split("\n", 1)[0].split(" b/", 1)[1]
        if name not in origins:
            count = _count_lines(tree, base, name)
            origins[name] = list(range(1, count + 1))
        lines = origins[name]
        changes = []
        shift = 0
        for block in re.split(r"^(?=@@ )", part, flags=re.M)[1:]:
            head, _, body = block.partition("\n")
            match = HUNK.match(head)
            assert match
            start, old = int(match[1]), int(match[2] or 1)
            # git counts lines from 1, and names the line above where none goes.
            first = start - 1 + shift + (old == 0)
            added = [line[1:] for line in body.split("\n") if line.startswith("+")]
            gone = tuple(n for n in lines[first : first + old] if n)
            above = next((n for n in reversed(lines[:first]) if n), 0)
            changes.append((above, gone, tuple(added)))
            lines[first : first + old] = [0] * len(added)
            shift += len(added) - old
        found[name] = changes
    return found


def _count_lines(tree: Path, base: str, name: str) -> int:
    rows = git("ls-tree", base, "--", name, cwd=tree).stdout
    if not rows:
        return 0
    return git("show", f"{base}:{name}", cwd=tree).stdout.count("\n")
