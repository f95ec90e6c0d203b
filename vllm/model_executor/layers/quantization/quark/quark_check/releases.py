# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the releases of vLLM know of Quark INT8: the facts of releases.toml."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

# Worst last: what decides a verdict is the last that is met. "unknown": it may be
# right, and nobody has looked.
Outcome = Literal["right", "unknown", "wrong", "refused"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FORK_GPU, FORK_CPU = "this fork, GPU", "this fork, CPU"
FORK = (FORK_GPU, FORK_CPU)


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
    """What a release has since `since` ("" for none), and this fork by `patch`."""

    id: str
    says: str
    since: str
    patch: str
    checked: bool
    why: str = ""

    def is_in(self, version: str) -> bool:
        return bool(self.since) and numbers(version) >= numbers(self.since)


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


@cache
def fact(id: str) -> Fact:
    return Fact(id, **facts_file()["fact"][id])


def without(id: str, but: Iterable[str] = ()) -> list[str]:
    """The releases that lack a fact, but for some."""
    lacking = [each.name for each in releases() if not fact(id).is_in(each.first)]
    return [name for name in lacking if name not in but]


def targets() -> list[str]:
    """What verdicts are about: the releases, oldest first, then this fork."""
    return [*stock(), *FORK]


def on(names: Iterable[str], outcome: Outcome) -> dict[str, Outcome]:
    """That outcome on each of these targets."""
    return dict.fromkeys(names, outcome)


def stock() -> list[str]:
    """The names of all releases, oldest first."""
    return [each.name for each in releases()]


def listed(names: list[str]) -> str:
    """`0.19 and 0.20.0-0.21.0`."""
    return " and ".join(names)


def row_of(version: str) -> str | None:
    """The name of the releases that a version belongs to; None where it is older than
    all."""
    rows = [row for row in releases() if numbers(row.first) <= numbers(version)]
    return rows[-1].name if rows else None
