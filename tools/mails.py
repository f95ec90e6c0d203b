# SPDX-License-Identifier: Apache-2.0
"""Write mails that give the fork to whoever has vLLM's source, with `git am` alone.

build/mails holds a mail a patch, with each overlay file inside the first one that names
it in an `Overlay:` trailer. GROUPS: these groups of patches, with `fix` and what they
depend on; all if there are none.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from tools.errors import ForkError
from tools.groups import with_fix
from tools.imports import missing_imports
from tools.repack import check_named, overlay_of, patched_files
from tools.series import Patch, choose, git, read_series, touched_files
from tools.tree import COMMITTER, am, default_base, export, make_pristine
from tools.upstream import ROOT, Release, release

MAILS = ROOT / "build/mails"


def make_mails(
    folder: Path, release: Release, groups: Sequence[str] = ()
) -> list[Path]:
    """Write the self-contained stack to `folder` and prove it: `git am` of it on the
    base gives the files that a build has, and what they import is there. Raises
    ForkError."""
    patches = read_series(release.series)
    check_named()
    if groups:
        patches = choose(patches, with_fix(patches, groups))
    base = default_base(release)
    with tempfile.TemporaryDirectory() as scratch:
        tree, again = Path(scratch) / "tree", Path(scratch) / "again"
        make_pristine(base, tree)
        git("clone", "--quiet", tree, again, cwd=Path(scratch))
        overlay = overlay_of(patches)
        for patch in patches:
            am(patch.path, tree)
            for name in patch.message.overlay:
                if source := overlay.pop(name, None):  # no earlier patch brought it
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, tree / name)
                    git("add", "--force", name, cwd=tree)
            git("commit", "--quiet", "--amend", "--no-edit", cwd=tree, env=COMMITTER)
        shutil.rmtree(folder, ignore_errors=True)
        export(tree, folder)
        mails = _in_one_folder(folder, patches)
        for mail in mails:
            am(mail, again)
        check_tree(again, base, patches)
    return mails


def _in_one_folder(folder: Path, patches: Sequence[Patch]) -> list[Path]:
    """Number the mails in the order in which they apply, for `git am build/mails/*`."""
    mails = []
    for place, patch in enumerate(patches, start=1):
        mail = folder / f"{place:02d}-{patch.path.stem}.patch"
        mails.append((folder / patch.name).rename(mail))
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()
    (folder / "series").write_text("".join(f"{mail.name}\n" for mail in mails))
    return mails


def check_tree(tree: Path, base_path: Path, patches: Sequence[Patch]) -> None:
    """See that a tree is what a build of these patches is, and that the files which the
    fork brings or changes import nothing that is not there. Raises ForkError."""
    overlay = overlay_of(patches)
    with ZipFile(base_path) as base:
        built = patched_files(base, patches)
        members = set(base.namelist())
    built |= {name: path.read_bytes() for name, path in overlay.items()}
    for name, data in built.items():
        if not (tree / name).is_file() or (tree / name).read_bytes() != data:
            raise ForkError(f"{name}: git am does not give the file that a build has.")
    changed = git("diff", "--name-only", "base", cwd=tree).stdout.split("\n")
    if others := sorted(set(filter(None, changed)) - built.keys()):
        raise ForkError(f"git am changes {others[0]} as well, which a build does not.")
    check_imports(tree, members | overlay.keys(), patches)


def check_imports(tree: Path, files: set[str], patches: Sequence[Patch]) -> None:
    """See that what the patches and their overlay import from vllm is among `files`,
    whose sources are below `tree`. Raises ForkError."""
    ours = [*touched_files(patches), *overlay_of(patches)]
    python = [name for name in ours if name.endswith(".py")]
    missing = missing_imports(python, files, lambda name: (tree / name).read_text())
    if missing:
        raise ForkError(
            f"imported, but not there: {'; '.join(missing)}. Name the file in a "
            "trailer `Overlay:` of the patch that needs it, or in `Depends:` the patch "
            "that brings it."
        )


def main() -> None:
    console = Console()
    try:
        chosen = release(os.environ.get("VLLM_BASE_VERSION"))
        mails = make_mails(MAILS, chosen, sys.argv[1:])
        console.print(f"{MAILS}: {len(mails)} mails; git am gives the fork's tree")
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
