# SPDX-License-Identifier: Apache-2.0
"""A patch series, and applying it to a folder of files with git."""

import os
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from tools.errors import ForkError


def git(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run git in `cwd`, apart from the user's configuration and repositories.

    Raises subprocess.CalledProcessError, with what git said as its `stderr`.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    isolated = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        # Inside somebody's repository `git apply` passes over files in silence.
        "GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent),
    }
    try:
        return subprocess.run(
            ["git", *map(str, arguments)],
            cwd=cwd,
            env=inherited | isolated | (env or {}),
            capture_output=True,
            check=True,
            text=True,
        )
    except FileNotFoundError:
        raise ForkError("git is not installed; patches are applied with it.") from None


def read_series(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """Patches in the order of `folder`/series, less those numbered in `without`.

    Raises ForkError where the series and the folder do not agree.
    """
    lines = (folder / "series").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    present = sorted(path.name for path in folder.glob("*.patch"))
    if sorted(names) != present:
        raise ForkError(
            f"{folder / 'series'} names {sorted(names)}, but the patches beside it are "
            f"{present}."
        )
    if unknown := set(without) - {name[:4] for name in names}:
        raise ForkError(f"{folder} has no patch numbered {', '.join(sorted(unknown))}.")
    return [folder / name for name in names if name[:4] not in without]


def touched_files(patches: Sequence[Path]) -> list[str]:
    """The files that the patches change, as paths in the tree."""
    if not patches:
        return []
    with tempfile.TemporaryDirectory() as folder:
        rows = git("apply", "--numstat", "-z", *patches, cwd=Path(folder)).stdout
    return sorted({row.split("\t", 2)[2] for row in rows.rstrip("\0").split("\0")})


def apply_patch(patch: Path, tree: Path) -> list[str]:
    """Apply one patch to the files below `tree`.

    Returns git's remarks on hunks that it had to move. Raises ForkError.
    """
    try:
        said = git("apply", "--verbose", patch, cwd=tree).stderr
    except subprocess.CalledProcessError as error:
        raise ForkError(
            f"{patch.name} does not apply to this base:\n{error.stderr.strip()}\n"
            "The base is not the release it is named after, or it holds this edit."
        ) from None
    return [line for line in said.splitlines() if line.startswith("Hunk #")]
