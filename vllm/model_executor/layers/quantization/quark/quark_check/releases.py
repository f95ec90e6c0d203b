# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the releases of vLLM know of Quark INT8: the facts of releases.toml, and which
releases verdicts are asked for."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

# Worst last: what decides a verdict is the last that is met. "not known": it may be
# right, and nobody has looked.
Outcome = Literal["right", "not known", "garbage", "refused"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FORK_GPU, FORK_CPU = "this fork, GPU", "this fork, CPU"
FORK = (FORK_GPU, FORK_CPU)
# The release whose models stand for the fork's where none is asked for.
BASE = "0.20.2"


@dataclass(frozen=True)
class Release:
    """Releases that read a checkpoint alike; `first` is the oldest looked into."""

    name: str
    looked_into: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.looked_into[0]


@dataclass(frozen=True)
class Fact:
    """What a release has since `since` ("" for none), not from `until` on, and again
    from `again` on; and this fork by `patch`."""

    id: str
    says: str
    since: str
    patch: str
    checked: bool
    why: str = ""
    until: str = ""
    again: str = ""

    def is_in(self, version: str) -> bool:
        if not self.since or numbers(version) < numbers(self.since):
            return False
        if not self.until or numbers(version) < numbers(self.until):
            return True
        return bool(self.again) and numbers(version) >= numbers(self.again)

    @property
    def remedy(self) -> str:
        """`vLLM 0.20.0 or later, or `, to go before what else helps."""
        if not self.since:
            return ""
        if not self.until:
            return f"vLLM {self.since} or later, or "
        last = max(v for v in every_release() if numbers(v) < numbers(self.until))
        return f"vLLM {self.since} to {last}, or "


def numbers(version: str) -> list[int]:
    """[0, 20, 2] for `0.20.2`."""
    return [int(part) for part in version.split(".")]


@cache
def facts_file() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("releases.toml").read_text())


@cache
def releases() -> tuple[Release, ...]:
    return tuple(
        Release(each["name"], tuple(each["looked_into"]))
        for each in facts_file()["release"]
    )


def every_release() -> list[str]:
    """All that were looked into, oldest first."""
    return [version for each in releases() for version in each.looked_into]


@cache
def fact(id: str) -> Fact:
    return Fact(id, **facts_file()["fact"][id])


def range_of(version: str) -> Release | None:
    """The releases that a version belongs to; None where nobody has looked into it."""
    same = (each for each in releases() if version in each.looked_into)
    return next(same, None)


def on(names: Iterable[str], outcome: Outcome) -> dict[str, Outcome]:
    """That outcome on each of these targets."""
    return dict.fromkeys(names, outcome)


# --- which releases are asked for -------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A range of releases, or one of them, that a verdict is about.

    version: a release whose facts it has, "" where nobody has looked; patches: those of
    this fork's that were put into it; by_platform: whether GPUs and CPUs have a verdict
    each.
    """

    name: str
    version: str
    patches: frozenset[str] = frozenset()
    by_platform: bool = False

    @property
    def range(self) -> Release | None:
        return range_of(self.version)

    @property
    def on_gpu(self) -> str:
        return f"{self.name}, GPU" if self.by_platform else self.name

    @property
    def on_cpu(self) -> str:
        return f"{self.name}, CPU"

    @property
    def targets(self) -> list[str]:
        return [self.on_gpu, self.on_cpu] if self.by_platform else [self.on_gpu]

    def has(self, id: str) -> bool:
        found = fact(id)
        return found.is_in(self.version) or found.patch in self.patches


def _ranges() -> tuple[Row, ...]:
    return tuple(Row(each.name, each.first) for each in releases())


@dataclass(frozen=True)
class Scope:
    """What verdicts are about: rows of releases, and this fork.

    base: the release that this fork stands on; first: the row, or FORK, that is told
    before the others, "" for none; is_one: nothing but what `--vllm` names.
    """

    rows: tuple[Row, ...]
    has_fork: bool = True
    base: str = BASE
    first: str = ""
    is_one: bool = False

    @property
    def known(self) -> list[Row]:
        return [row for row in self.rows if row.version]

    def stock(self) -> list[str]:
        """The names of all rows that were looked into, oldest first."""
        return [row.name for row in self.known]

    def without(self, id: str, but: Iterable[str] = ()) -> list[str]:
        """The rows that lack a fact, but for some."""
        return [
            row.name for row in self.known if not row.has(id) and row.name not in but
        ]

    def targets(self) -> list[str]:
        """Releases, oldest first, then this fork; what is `first` before all."""
        fork = list(FORK) if self.has_fork else []
        stock = [each for row in self.rows for each in row.targets]
        return [*fork, *stock] if self.first == "fork" else [*stock, *fork]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def of_range(self, name: str) -> list[Row]:
        """The rows that a range of releases.toml tells of."""
        return [row for row in self.known if row.range and row.range.name == name]

    def listed(self, names: Iterable[str]) -> str:
        """`0.16.0-0.21.0 and 0.33.0`: ranges that follow each other are one."""
        ranges = [each.name for each in releases()]
        wanted = set(names)
        spans: list[list[str]] = []
        before = None
        for at, name in enumerate(ranges):
            if name in wanted:
                first, last = name.partition("-")[0], name.rpartition("-")[2]
                if before == at - 1:
                    spans[-1][1] = last
                else:
                    spans.append([first, last])
                before = at
        shown = [first if first == last else f"{first}-{last}" for first, last in spans]
        # One release, where its range is not among them.
        shown += [
            row.name
            for row in self.rows
            if row.name in wanted and row.name not in ranges
            if row.range is None or row.range.name not in wanted or row.patches
        ]
        return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


ALL = Scope(_ranges())

_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)((?:\.?[a-z]+\d*)*)(?:\+([a-z0-9.]+))?")
_PLATFORM = re.compile(r"cpu|rocm\d*|cu\d+|xpu")


@dataclass(frozen=True)
class Build:
    """A version of vLLM: the release it stands on, "" where nobody has looked into
    that, whether it is this fork's, and the groups of patches that it names, if not the
    usual ones."""

    version: str
    release: str
    is_fork: bool
    groups: tuple[str, ...]

    @property
    def row(self) -> Row:
        """Of a build that is not the whole fork: a release with the group `fix`, or
        one of which nothing is known."""
        if not self.is_fork:
            return Row(self.release or self.version, self.release, by_platform=True)
        is_fix = self.groups == ("fix",)
        patches = frozenset(facts_file()["fork"]["fix"]) if is_fix else frozenset[str]()
        release = self.release if is_fix else ""
        return Row(self.version, release, patches, by_platform=True)


def build_of(version: str) -> Build | None:
    """What a version says; None where it is none."""
    found = _VERSION.fullmatch(version.strip().lower())
    if found is None:
        return None
    parts = [int(each) for each in found[1].split(".")]
    public = ".".join(map(str, [*parts, 0, 0][: max(3, len(parts))]))
    release = public if not found[2] and range_of(public) else ""
    local = (found[3] or "").split(".")
    is_fork = re.fullmatch(r"quark\d+", local[0]) is not None
    groups = local[1:]
    if groups and _PLATFORM.fullmatch(groups[-1]):
        groups = groups[:-1]
    # `serve` comes beside the usual ones.
    named = tuple(each for each in groups if each != "serve") if is_fork else ()
    return Build(version, release, is_fork, named)


def scope_of(version: str) -> Scope:
    """What `--vllm VERSION` asks for. Raises ValueError for a release that nobody has
    looked into."""
    build = build_of(version)
    if build is None or not build.release:
        ranges = ", ".join(each.name for each in releases())
        found = "another release" if build else "no version"
        raise ValueError(
            f"--vllm {version}: expected a release that was looked into ({ranges}), "
            f"or this fork on one of them, such as {BASE}+quark2; found {found}; leave "
            "out --vllm for what is known of all of them"
        )
    if build.is_fork and not build.groups:
        return Scope((), True, build.release, "fork", True)
    return Scope((build.row,), False, build.release, build.row.name, True)


def beside(version: str, is_fork: bool) -> Scope:
    """All releases, and the installed vLLM, of that version, before the others."""
    build = build_of(version)
    if build is None:
        return ALL
    if is_fork or (build.is_fork and not build.groups):
        return replace(ALL, base=build.release or BASE, first="fork")
    return replace(ALL, rows=(build.row, *ALL.rows), first=build.row.name)
