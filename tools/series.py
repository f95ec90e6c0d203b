# SPDX-License-Identifier: Apache-2.0
"""A patch series, and applying it to a folder of files with git.

A series is a folder: `series` lists its patches, <group>/<number>-<name>.patch, in the
order in which they apply. What a patch is stands in the trailers of its message:
`Patch:` its number, a name for good and not a position, `Group:`, `Depends:` the
patches that it needs besides the group `fix`, `Overlay:` the new files that it uses.
"""

import email.header
import email.policy
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.errors import DoesNotApply, ForkError

TRAILER = re.compile(r"([A-Za-z][A-Za-z-]*): (.*)")


def git(
    *arguments: str | Path,
    cwd: Path,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
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
            input=stdin,
        )
    except FileNotFoundError:
        raise ForkError("git is not installed; patches are applied with it.") from None


@dataclass(frozen=True)
class Message:
    """What a commit says: `reason` is its body, less the trailers."""

    subject: str
    reason: str
    trailers: tuple[tuple[str, str], ...]

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.trailers if name == key]

    def value(self, key: str) -> str:
        return next(iter(self.values(key)), "")

    @property
    def number(self) -> str:
        return self.value("Patch")

    @property
    def group(self) -> str:
        return self.value("Group")

    @property
    def depends(self) -> list[str]:
        return self.values("Depends")

    @property
    def overlay(self) -> list[str]:
        return self.values("Overlay")

    @property
    def path(self) -> str:
        """Where the patch lies in its series: group, number, and the subject's words,
        as many as fit into 60 characters."""
        name = self.number
        for word in re.findall(r"[A-Za-z0-9._]+", self.subject):
            if len(longer := f"{name}-{word.rstrip('.')}") > 60:
                break
            name = longer
        return f"{self.group}/{name}.patch"


def parse_message(text: str) -> Message:
    """Take a commit's message apart."""
    subject, _, body = text.strip().partition("\n\n")
    reason, _, last = ("\n\n" + body.strip()).rpartition("\n\n")
    lines = re.sub(r"\n +", " ", last).splitlines()
    found = [TRAILER.fullmatch(line) for line in lines]
    trailers = [(line[1], line[2]) for line in found if line]
    if len(trailers) < len(lines):
        reason, trailers = f"{reason}\n\n{last}", []
    return Message(" ".join(subject.split()), reason.strip(), tuple(trailers))


@dataclass(frozen=True)
class Patch:
    """A patch of a series. `name` is its place there: `fix/0001-A-reason.patch`."""

    path: Path
    name: str

    @cached_property
    def message(self) -> Message:
        mail = email.message_from_bytes(
            self.path.read_bytes(), policy=email.policy.compat32
        )
        header = email.header.make_header(email.header.decode_header(mail["Subject"]))
        payload = mail.get_payload(decode=True)
        assert isinstance(payload, bytes)
        body = re.split(r"^(?:---$|diff --git )", payload.decode(), flags=re.M)[0]
        subject = re.sub(r"^\[PATCH[^]]*\] ", "", str(header))
        return parse_message(f"{subject}\n\n{body}")

    @property
    def number(self) -> str:
        return self.message.number

    @property
    def group(self) -> str:
        return self.message.group


def series_lines(folder: Path) -> list[str]:
    return (folder / "series").read_text().splitlines()


def series_release(folder: Path) -> str:
    """The release that the patches are written for. Raises ForkError."""
    for line in series_lines(folder):
        if line.startswith("# release: "):
            return line.removeprefix("# release: ").strip()
    raise ForkError(
        f"{folder / 'series'}: expected a line `# release: <version>` that says which "
        "release the patches are written for, found none."
    )


def group_lines(folder: Path) -> dict[str, str]:
    """What the comments `# <group>: ...` say of each group."""
    found: dict[str, str] = {}
    group = ""
    for line in [*series_lines(folder), ""]:
        if match := re.fullmatch(r"# ([a-z0-9]+): (.*)", line):
            group = match[1]
            found[group] = match[2].strip()
        elif group and line.startswith("# "):
            found[group] += f" {line[2:].strip()}"
        else:
            group = ""
    found.pop("release", None)
    return found


def read_series(folder: Path, without: Collection[str] = ()) -> list[Patch]:
    """Patches in the order of `folder`/series, less those numbered in `without`.

    Raises ForkError where the series, the folder and the patches do not agree.
    """
    names = [line for line in series_lines(folder) if line and not line.startswith("#")]
    present = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.patch"))
    if sorted(names) != present:
        raise ForkError(
            f"{folder / 'series'} names {sorted(names)}, but the patches beside it are "
            f"{present}."
        )
    patches = [Patch(folder / name, name) for name in names]
    for patch in patches:
        if not patch.name.startswith(f"{patch.group}/{patch.number}-"):
            raise ForkError(
                f"{folder / patch.name}: its trailers are `Patch: {patch.number}` and "
                f"`Group: {patch.group}`; expected its name to be {patch.message.path}."
            )
    check_order([patch.message for patch in patches])
    if unknown := set(without) - {patch.number for patch in patches}:
        raise ForkError(f"{folder} has no patch numbered {', '.join(sorted(unknown))}.")
    return [patch for patch in patches if patch.number not in without]


def check_order(messages: Sequence[Message]) -> None:
    """Patches have numbers of their own, groups are in one piece, and what a patch
    depends on comes before it. Raises ForkError."""
    seen: dict[str, Message] = {}
    groups: list[str] = []
    for message in messages:
        said = f"{message.number} ({message.subject})"
        if message.number in seen:
            raise ForkError(
                f"{said}: its number is that of {seen[message.number].subject!r} too; "
                "drop the trailer `Patch:` of the new one, and it gets the next."
            )
        for number in message.depends:
            if number not in seen:
                raise ForkError(
                    f"{said}: its trailer `Depends: {number}` names no patch before it."
                )
        if message.group not in groups:
            groups.append(message.group)
        elif message.group != groups[-1]:
            last = [m for m in seen.values() if m.group == message.group][-1]
            raise ForkError(
                f"{said} is of the group {message.group}, but comes after patches of "
                f"{groups[-1]}: move it behind {last.number} (git rebase -i base)."
            )
        seen[message.number] = message


def groups_of(patches: Iterable[Patch]) -> list[str]:
    return list(dict.fromkeys(patch.group for patch in patches))


def choose(patches: Sequence[Patch], groups: Collection[str]) -> list[Patch]:
    """The patches of these groups, and those they depend on. Raises ForkError."""
    known = groups_of(patches)
    if unknown := [group for group in groups if group not in known]:
        raise ForkError(
            f"{', '.join(unknown)}: no such group of patches. Expected some of "
            f"{', '.join(known)}."
        )
    return with_dependencies(patches, [p.number for p in patches if p.group in groups])


def with_dependencies(
    patches: Sequence[Patch], numbers: Collection[str]
) -> list[Patch]:
    """The patches of these numbers, and those they depend on."""
    by_number = {patch.number: patch for patch in patches}
    chosen: set[str] = set()
    wanted = list(numbers)
    while wanted:
        number = wanted.pop()
        if number not in chosen:
            chosen.add(number)
            wanted += by_number[number].message.depends
    return [patch for patch in patches if patch.number in chosen]


def dependants(patches: Sequence[Patch], numbers: Collection[str]) -> set[str]:
    """Numbers of the patches that depend on these, themselves or through others."""
    found: set[str] = set()
    for patch in patches:  # what one depends on comes before it
        if {*numbers, *found} & set(patch.message.depends):
            found.add(patch.number)
    return found - set(numbers)


def touched_files(patches: Sequence[Patch]) -> list[str]:
    """The files that the patches change, as paths in the tree."""
    if not patches:
        return []
    paths = [patch.path for patch in patches]
    with tempfile.TemporaryDirectory() as folder:
        rows = git("apply", "--numstat", "-z", *paths, cwd=Path(folder)).stdout
    return sorted({row.split("\t", 2)[2] for row in rows.rstrip("\0").split("\0")})


def apply_patch(patch: Path, tree: Path) -> list[str]:
    """Apply one patch to the files below `tree`.

    Returns git's remarks on hunks that it had to move. Raises ForkError.
    """
    try:
        said = git("apply", "--verbose", patch, cwd=tree).stderr
    except subprocess.CalledProcessError as error:
        raise DoesNotApply(
            f"{patch.name} does not apply to this base:\n{error.stderr.strip()}\n"
            "The base is not the release it is named after, or it holds this edit.",
            patch.name,
        ) from None
    return [line for line in said.splitlines() if line.startswith("Hunk #")]
