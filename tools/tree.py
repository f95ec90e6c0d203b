# SPDX-License-Identifier: Apache-2.0
"""The patch stack as a git repository, for maintainers.

tree     build/tree: the base's Python files, one commit a patch, to edit there
patches  write patches/ back from build/tree
table    write patches/README.md from the patches; `patches` does too
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from tools.download import fetch
from tools.errors import ForkError
from tools.series import (
    Message,
    check_order,
    git,
    parse_message,
    read_series,
    series_release,
)
from tools.table import README, TABLE, table, with_sizes
from tools.upstream import ROOT, Release, listed_wheel, release, series_folders

TREE = ROOT / "build/tree"
# In a tree's repository: the release that it is made of, and what it was made.
RELEASE = "vllm-quark-int8.release"
MADE = "made"
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
    target = "cpu" if "cpu" in release.wheels else "cuda"
    return fetch(listed_wheel(release, target))


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
    if (folder / ".git").exists() and _edited(folder):
        raise ForkError(
            f"{folder} has edits that are not in patches/. Write them back with `make "
            "patches`, or remove the folder."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_pristine(default_base(release), folder)
    git("config", RELEASE, release.version, cwd=folder)
    for patch in read_series(release.series):
        am(patch.path, folder)
    git("tag", MADE, cwd=folder)


def _edited(folder: Path) -> bool:
    """Whether a tree holds anything but what it was made of or written back to."""
    if git("status", "--porcelain", cwd=folder).stdout:
        return True
    try:
        return _history(folder, MADE) != _history(folder, "HEAD")
    except subprocess.CalledProcessError:  # nobody knows what it was made
        return True


def _history(tree: Path, end: str) -> str:
    return git("log", "--format=%T%n%an %ae %ad%n%B", f"base..{end}", cwd=tree).stdout


def commits(tree: Path) -> list[tuple[str, Message]]:
    """Hashes and messages of the commits since `base`, oldest first."""
    form = "--format=%x01%H%n%B"
    said = git("log", "--reverse", form, "base..HEAD", cwd=tree).stdout
    rows = [row.split("\n", 1) for row in said.split("\x01")[1:]]
    return [(commit, parse_message(text)) for commit, text in rows]


def number_commits(tree: Path, taken: set[str]) -> None:
    """Give commits without a trailer `Patch:` the numbers after those `taken`, by
    writing them and what follows them anew. Raises ForkError."""
    known = commits(tree)
    for _, message in known:
        if not message.group:
            raise ForkError(
                f"{tree}: the commit {message.subject!r} has no trailer `Group:`. Say "
                "which group of patches it belongs to: git commit --amend --trailer "
                '"Group: <group>" (git rebase -i base, for one that is not the last).'
            )
    if all(message.number for _, message in known):
        return
    taken = taken | {message.number for _, message in known if message.number}
    parent = "base"
    for commit, message in known:
        form = "--format=%an%n%ae%n%ad%n%B"
        said = git("log", "-1", "--date=raw", form, commit, cwd=tree).stdout
        name, mail, date, text = said.split("\n", 3)
        if not message.number:
            number = f"{int(max(taken, default='0')) + 1:04d}"
            taken.add(number)
            add = ["interpret-trailers", "--where", "start", "--no-divider"]
            trailer = f"Patch: {number}"
            text = git(*add, "--trailer", trailer, cwd=tree, stdin=text).stdout
        author = {"NAME": name, "EMAIL": mail, "DATE": date}
        env = COMMITTER | {f"GIT_AUTHOR_{key}": value for key, value in author.items()}
        make = ["commit-tree", f"{commit}^{{tree}}", "-p", parent, "-F", "-"]
        parent = git(*make, cwd=tree, env=env, stdin=text).stdout.strip()
    git("reset", "--quiet", "--soft", parent, cwd=tree)


def export(tree: Path, folder: Path, series: str = "") -> list[Path]:
    """Write the commits since `base` to `folder`, each where its trailers say, and a
    `series` that has the comments of the text `series`. Returns the patches. Raises
    ForkError."""
    messages = [message for _, message in commits(tree)]
    check_order(messages)
    options = ["--zero-commit", "--no-signature", "--full-index", "--no-renames"]
    options += ["--no-numbered", "--no-stat", "--numbered-files"]
    with tempfile.TemporaryDirectory() as scratch:
        out = ["-o", scratch]
        git("format-patch", *options, *out, "base..HEAD", cwd=tree)
        for place, message in enumerate(messages, start=1):
            path = folder / message.path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(scratch, str(place)), path)
    (folder / "series").write_text(_series_text(messages, series))
    return [folder / message.path for message in messages]


def _series_text(messages: Sequence[Message], old: str) -> str:
    """A series of these patches, with the comments of `old`: its first lines up to an
    empty one, those before a group, those before a patch, and those at the end."""
    head, empty, rest = old.partition("\n\n")
    if not empty or re.search(r"^[^#]", head, re.M):
        head, rest = "", old
    before: dict[str, list[str]] = {}
    block: list[str] = []
    groups: set[str] = set()
    for line in rest.splitlines():
        if not line or line.startswith("#"):
            block.append(line)
            continue
        group, name = line.split("/")
        before[name[:4] if group in groups else group] = block
        groups.add(group)
        block = []
    lines = [head, ""] if head else []
    for message in messages:
        if message.group in before:
            lines += before.pop(message.group)
        elif message.group not in groups:
            lines += ["", f"# {message.group}: say here who needs this group."]
            groups.add(message.group)
        lines += [*before.get(message.number, []), message.path]
    return "\n".join([*lines, *block, ""])


def write_patches(tree: Path, release: Release) -> None:
    """Put the tree's commits in the place of the series. Raises ForkError."""
    if not (tree / ".git").exists():
        raise ForkError(f"{tree} does not exist; `make tree` makes it.")
    made_of = git("config", "--default", "", "--get", RELEASE, cwd=tree).stdout.strip()
    if made_of != (own := series_release(release.series)):
        raise ForkError(
            f"{tree} is a tree of vLLM {made_of or '(not known)'}, but the patches in "
            f"{release.series} are written for {own} (`# release:` in its series). "
            f"Make the edits in a tree of {own}, or give the release a series of its "
            "own (docs/maintain/new-release.md)."
        )
    for stopped, name in (("rebase-apply", "am"), ("rebase-merge", "rebase")):
        if (tree / ".git" / stopped).exists():
            raise ForkError(
                f"{tree}: `git {name}` stopped there, and not all of its commits are "
                f"in. Go on with `git {name} --continue` or `git {name} --abort`."
            )
    if changes := git("status", "--porcelain", cwd=tree).stdout:
        raise ForkError(
            f"{tree} has changes that no commit holds:\n{changes}Commit them first "
            "(`git commit --fixup` and `git rebase -i --autosquash base` mend one)."
        )
    every = [patch for folder in series_folders() for patch in read_series(folder)]
    number_commits(tree, {patch.number for patch in every})
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "new"
        export(tree, new, (release.series / "series").read_text())
        for other in release.series.iterdir():  # a file that is no patch stays
            if other.is_dir():
                shutil.rmtree(other)
        shutil.copytree(new, release.series, dirs_exist_ok=True)
    git("tag", "--force", MADE, cwd=tree)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["tree", "patches", "table"])
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
        if command != "tree":
            TABLE.write_text(table())
            README.write_text(with_sizes(README.read_text(), release().series))
            console.print(f"{TABLE}, and sizes in {README}: written from the patches")
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
