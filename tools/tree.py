# SPDX-License-Identifier: Apache-2.0
"""The patch stack as a git repository, for maintainers.

tree     build/tree: the base's Python files, one commit a patch, to edit there
patches  write patches/ back from build/tree
mails    build/mails: the stack with each overlay file inside the patch that names it
         in an `Overlay:` trailer; `git am` of these alone gives the fork's tree
check    apply every prefix of the series to every release
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from tools.download import fetch
from tools.errors import ForkError
from tools.fix import PROBES, edits_held
from tools.series import apply_patch, git, read_series
from tools.upstream import (
    ROOT,
    Release,
    fixed_release,
    listed_wheel,
    overlay_files,
    release,
    releases,
)

TREE = ROOT / "build/tree"
MAILS = ROOT / "build/mails"
# Who commits, and when, is the same on every machine, so that exports are too. A
# patch brings its author; the pristine base has this one.
COMMITTER = {
    "GIT_COMMITTER_NAME": "vllm-quark-int8",
    "GIT_COMMITTER_EMAIL": "maintainers@vllm-quark-int8.invalid",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
}
AUTHOR = {key.replace("COMMITTER", "AUTHOR"): v for key, v in COMMITTER.items()}


def default_base(release: Release) -> Path:
    """The smallest listed base: all targets hold the same files where we patch."""
    return fetch(listed_wheel(release, "cpu"))


def make_pristine(base_path: Path, folder: Path) -> None:
    """Unpack the base's Python files as a repository whose tag `base` is pristine."""
    with ZipFile(base_path) as base:
        names = [n for n in base.namelist() if n.endswith(".py")]
        base.extractall(folder, names)
    git("init", "--quiet", "--initial-branch=main", cwd=folder)
    git("add", "--all", cwd=folder)
    message = f"Pristine {base_path.name}"
    git("commit", "--quiet", "-m", message, cwd=folder, env=COMMITTER | AUTHOR)
    git("tag", "base", cwd=folder)


def am(patch: Path, folder: Path) -> None:
    """Commit a patch. Raises ForkError."""
    try:
        git("am", "--quiet", "--keep-non-patch", patch, cwd=folder, env=COMMITTER)
    except subprocess.CalledProcessError as error:
        git("am", "--abort", cwd=folder, env=COMMITTER)
        raise ForkError(f"git am {patch.name}: {error.stderr.strip()}") from None


def make_tree(folder: Path, release: Release) -> None:
    """Write `folder` anew: the pristine base and a commit a patch. Raises ForkError."""
    if (folder / ".git").exists() and _edited(folder, release):
        raise ForkError(
            f"{folder} has edits that are not in {release.series}. Write them back "
            "with `make patches`, or remove the folder."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_pristine(default_base(release), folder)
    for patch in read_series(release.series):
        am(patch, folder)


def _edited(folder: Path, release: Release) -> bool:
    if git("status", "--porcelain", cwd=folder).stdout:
        return True
    with tempfile.TemporaryDirectory() as exported:
        export(folder, Path(exported))
        return _contents(Path(exported)) != _contents(release.series)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def export(tree: Path, folder: Path) -> list[Path]:
    """Write the commits since `base` and a `series` to `folder`; return the patches."""
    options = ["--zero-commit", "--no-signature", "--full-index", "--no-renames"]
    options += ["--no-numbered", "--no-stat", "-o", str(folder)]
    said = git("format-patch", *options, "base..HEAD", cwd=tree).stdout
    patches = [Path(line) for line in said.splitlines()]
    (folder / "series").write_text("".join(f"{path.name}\n" for path in patches))
    return patches


def write_patches(tree: Path, release: Release) -> None:
    """Put the tree's commits in the place of the release's series. Raises ForkError."""
    if not (tree / ".git").exists():
        raise ForkError(f"{tree} does not exist; `make tree` makes it.")
    if changes := git("status", "--porcelain", cwd=tree).stdout:
        raise ForkError(
            f"{tree} has changes that no commit holds:\n{changes}Commit them first "
            "(`git commit --fixup` and `git rebase -i --autosquash base` mend one)."
        )
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "new"
        export(tree, new)
        shutil.rmtree(release.series)
        shutil.copytree(new, release.series)


def make_mails(folder: Path, release: Release) -> list[Path]:
    """Write the self-contained stack to `folder` and prove it. Raises ForkError."""
    patches = read_series(release.series)
    overlay = overlay_files()
    with tempfile.TemporaryDirectory() as scratch:
        tree, again = Path(scratch) / "tree", Path(scratch) / "again"
        make_pristine(default_base(release), tree)
        git("clone", "--quiet", tree, again, cwd=Path(scratch))
        for patch in patches:
            am(patch, tree)
            for name in _overlay_trailers(tree):
                if name not in overlay:
                    raise ForkError(
                        f"{patch.name}: its trailer `Overlay: {name}` names no file of "
                        "the overlay, or one that an earlier patch named."
                    )
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(overlay.pop(name), tree / name)
                git("add", "--force", name, cwd=tree)
            git("commit", "--quiet", "--amend", "--no-edit", cwd=tree, env=COMMITTER)
        if overlay:
            raise ForkError(
                f"no patch names {', '.join(sorted(overlay))}: add `Overlay: <file>` "
                "to the message of the patch that first uses it."
            )
        shutil.rmtree(folder, ignore_errors=True)
        mails = export(tree, folder)
        for mail in mails:
            am(mail, again)
        if _tree_hash(again) != _tree_hash(tree):
            raise ForkError(f"git am of {folder} does not give the fork's tree.")
    return mails


def _overlay_trailers(tree: Path) -> list[str]:
    form = "--format=%(trailers:key=Overlay,valueonly)"
    return git("log", "-1", form, cwd=tree).stdout.split()


def _tree_hash(tree: Path) -> str:
    return git("rev-parse", "HEAD^{tree}", cwd=tree).stdout


def check(chosen: list[Release], fixed: Release | None, console: Console) -> None:
    """Apply each prefix of the series to each base, and look for the fix before and
    after. Raises ForkError."""
    for candidate in chosen:
        for target in candidate.wheels:
            remarks = check_base(fetch(listed_wheel(candidate, target)), candidate)
            moved = f"{len(remarks)} hunks moved" if remarks else "no fuzz, no offset"
            console.print(f"vLLM {candidate.version} {target}: applies, {moved}")
    if fixed:
        with ZipFile(default_base(fixed)) as base:
            if (held := edits_held(base.read)) != list(PROBES):
                raise ForkError(f"vLLM {fixed.version} holds only the edits {held}.")
        console.print(f"vLLM {fixed.version}: already holds {', '.join(held)}")


def check_base(base_path: Path, release: Release) -> list[str]:
    """Apply the series one by one, with `git am` and with `git apply` as the builder
    does. Returns git's remarks on hunks that moved. Raises ForkError."""
    remarks = []
    with tempfile.TemporaryDirectory() as scratch:
        tree, copy = Path(scratch) / "tree", Path(scratch) / "copy"
        make_pristine(base_path, tree)
        git("clone", "--quiet", tree, copy, cwd=Path(scratch))
        if held := edits_held(lambda name: (tree / name).read_text()):
            raise ForkError(f"{base_path.name} already holds {held} before patching.")
        for patch in read_series(release.series):
            am(patch, tree)
            remarks += apply_patch(patch, copy)
            changed = git("diff", "--name-only", "HEAD~1", cwd=tree).stdout.split()
            for name in changed:
                source = (tree / name).read_text()
                compile(source, name, "exec")
                if source != (copy / name).read_text():
                    raise ForkError(f"{patch.name}: git am and git apply differ.")
        if (held := edits_held(lambda name: (tree / name).read_text())) != list(PROBES):
            raise ForkError(f"{base_path.name}: the series leaves only {held} done.")
    return remarks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["tree", "patches", "mails", "check"])
    command = parser.parse_args().command
    console = Console()
    try:
        chosen = release(os.environ.get("VLLM_BASE_VERSION"))
        if command == "tree":
            make_tree(TREE, chosen)
            console.print(f"{TREE}: edit there, commit, then `make patches`")
        elif command == "patches":
            write_patches(TREE, chosen)
            console.print(f"{chosen.series}: written from {TREE}")
        elif command == "mails":
            mails = make_mails(MAILS, chosen)
            console.print(f"{MAILS}: {len(mails)} mails; git am gives the fork's tree")
        elif os.environ.get("CI"):
            check([chosen], None, console)
        else:
            check(list(releases().values()), fixed_release(), console)
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
