# SPDX-License-Identifier: Apache-2.0
"""Prove the patches on every release that they are for.

The whole series, patch by patch; then each group with what it depends on, and with the
group `fix` where the release does not hold that itself. With `git am` and with `git
apply`, as the builder does: both give the same files, which are Python, import nothing
that is not there, and have each patch's change in the place where the whole series has
it. CI=1: of each series the release that it is written for, and one wheel of it.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from tools.download import fetch
from tools.errors import ForkError
from tools.fix import PROBES, edits_held
from tools.groups import FIX, with_fix
from tools.mails import check_imports
from tools.places import Places, places
from tools.repack import check_named, overlay_of
from tools.series import (
    Patch,
    apply_patch,
    choose,
    git,
    groups_of,
    read_series,
    series_release,
)
from tools.table import TABLE, table
from tools.tree import am, make_pristine
from tools.upstream import (
    Release,
    listed_wheel,
    release,
    releases,
    series_folders,
)


def check(chosen: list[Release], console: Console, brief: bool = False) -> None:
    """Check the patches on each base, one of each release if `brief`, and look for the
    fix before and after. Raises ForkError."""
    check_named()
    if TABLE.read_text() != table():
        raise ForkError(f"{TABLE} is not what the patches say; `make patches-table`.")
    for candidate in chosen:
        for target in sorted(candidate.wheels)[: 1 if brief else None]:
            base = fetch(listed_wheel(candidate, target))
            with tempfile.TemporaryDirectory() as scratch:
                remarks, groups = check_base(base, candidate, Path(scratch))
            moved = f"{len(remarks)} hunks moved" if remarks else "no fuzz, no offset"
            console.print(
                f"vLLM {candidate.version} {target}: applies, {moved}; each alone: "
                f"{', '.join(groups) or 'no other group'}",
                soft_wrap=True,
            )


def check_base(
    base_path: Path, release: Release, scratch: Path
) -> tuple[list[str], list[str]]:
    """Check the series and its groups on one base, in the empty folder `scratch`.
    Returns git's remarks on hunks that moved, and the groups. Raises ForkError."""
    patches = read_series(release.series)
    tree, copy = scratch / "tree", scratch / "copy"
    make_pristine(base_path, tree)
    git("clone", "--quiet", tree, copy, cwd=scratch)
    held = edits_held(lambda name: (tree / name).read_text())
    own = {patch.number for patch in patches}
    if held != (expected := [number for number in PROBES if number not in own]):
        raise ForkError(
            f"{base_path.name}: before patching it holds what {held} do; expected "
            f"{expected}. A series has the patches of {FIX} that its releases lack."
        )
    with ZipFile(base_path) as base:
        files = set(base.namelist())
    remarks, whole = _apply(patches, tree, copy, files)
    if (held := edits_held(lambda name: (tree / name).read_text())) != list(PROBES):
        raise ForkError(
            f"{base_path.name}: with the series it holds what {held} do; expected "
            f"{list(PROBES)}."
        )
    groups = [group for group in groups_of(patches) if group != FIX]
    for group in groups:
        _reset(tree, copy)
        pair = choose(patches, with_fix(patches, [group]))
        try:
            _, alone = _apply(pair, tree, copy, files)
        except ForkError as error:
            raise ForkError(
                f"{base_path.name}: the group {group} is not whole by itself, "
                f"patches {', '.join(patch.number for patch in pair)}: {error}"
            ) from None
        check_places(whole, alone, " and ".join(groups_of(pair)))
    return remarks, groups


def _reset(*trees: Path) -> None:
    for tree in trees:
        git("reset", "--quiet", "--hard", "base", cwd=tree)
        git("clean", "--quiet", "-d", "--force", "-x", cwd=tree)


def _apply(
    patches: Sequence[Patch], tree: Path, copy: Path, files: set[str]
) -> tuple[list[str], dict[str, Places]]:
    """Apply patches with `git am` to `tree` and with `git apply` to `copy`; returns
    git's remarks, and where each patch landed."""
    remarks = []
    for patch in patches:
        am(patch.path, tree)
        remarks += apply_patch(patch.path, copy)
        changed = git("diff", "--name-only", "HEAD~1", cwd=tree).stdout.split()
        for name in changed:
            source = (tree / name).read_text()
            compile(source, name, "exec")
            if source != (copy / name).read_text():
                raise ForkError(f"{patch.name}: git am and git apply differ.")
    overlay = overlay_of(patches)
    for name, path in overlay.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / name)
    check_imports(tree, files | overlay.keys(), patches)
    commits = git("rev-list", "--reverse", "base..HEAD", cwd=tree).stdout.split()
    numbers = [patch.number for patch in patches]
    return remarks, dict(zip(numbers, places(tree, commits), strict=True))


def check_places(whole: dict[str, Places], alone: dict[str, Places], what: str) -> None:
    """See that patches land where the whole series puts them. Raises ForkError."""
    for number, changes in alone.items():
        for name, landed in changes.items():
            if landed != whole[number][name]:
                found = [line for line, *_ in landed]
                expected = [line for line, *_ in whole[number][name]]
                raise ForkError(
                    f"{number}: with {what} alone its change of {name} lands below the "
                    f"base's lines {found}, in the whole series below {expected}, or "
                    "is another: give it lines of its own around it."
                )


def main() -> None:
    console = Console()
    try:
        if os.environ.get("CI"):
            written_for = [release(series_release(f)) for f in series_folders()]
            check(written_for, console, brief=True)
        else:
            check(list(releases().values()), console)
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
