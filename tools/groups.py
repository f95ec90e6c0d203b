# SPDX-License-Identifier: Apache-2.0
"""Which groups of patches a build holds, and what its version says of them."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.errors import ForkError
from tools.series import Patch, choose, groups_of
from tools.upstream import extra_groups

VARIABLE = "VLLM_QUARK_GROUPS"
FIX = "fix"  # every other group stands on it
CPU = "cpu"


@dataclass(frozen=True)
class Choice:
    """Groups, in the order of the series; `patches` are theirs and those they depend
    on, `label` is what the version says of them."""

    groups: list[str]
    patches: list[Patch]
    label: list[str]


def asked_for() -> list[str] | None:
    """Groups that the environment names, with blanks or commas between; None if it
    leaves that to us."""
    return re.findall(r"[^\s,]+", os.environ.get(VARIABLE, "")) or None


def with_fix(patches: Sequence[Patch], groups: Iterable[str]) -> list[str]:
    """Groups, and `fix`, on which they stand, where the series has it: not for a
    release that holds it."""
    every = groups_of(patches)
    names = [group for group in groups if group != FIX or FIX in every]
    return list(dict.fromkeys([*(g for g in every if g == FIX), *names]))


def choice(
    patches: Sequence[Patch], target: str, wanted: Iterable[str] | None = None
) -> Choice:
    """What to build of a series: the groups `wanted` and `fix`; if None, those of the
    default build. Raises ForkError."""
    every = groups_of(patches)
    default = [group for group in every if group not in extra_groups()]
    if target != CPU and CPU in default:
        # vLLM takes a build for the CPU's if its version has these letters.
        default.remove(CPU)
        if wanted is None:
            note = f"group {CPU}: left out, it does nothing on {target}"
            print(note, file=sys.stderr)
    names = {*default} if wanted is None else {*with_fix(patches, wanted)}
    if not names and every:
        raise ForkError(
            f"this release holds the group {FIX} itself: use it as it is, or name some "
            f"of {', '.join(every)} in {VARIABLE}."
        )
    if target != CPU and CPU in names:
        raise ForkError(
            f"the group {CPU} does nothing on {target}, and vLLM takes a build whose "
            f"version says {CPU} for one of a CPU: leave it out, or set "
            f"VLLM_TARGET_DEVICE={CPU}."
        )
    chosen = choose(patches, sorted(names))
    groups = [group for group in every if group in names]
    label = groups
    if names >= set(default):
        label = [group for group in groups if group not in default]
    return Choice(groups, chosen, label)
