# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One thing to know about a checkpoint: what `vllm quark-check` reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

# Worst first: answers are wrong on some vLLM; a vLLM refuses it; worth a look; a fact.
Severity = Literal["garbage", "refused", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
# How many names a finding shows of those that it is about.
NUM_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """id: stable, kebab-case, in the JSON and docs/guide/quark-check.md;
    summary: one line; why: what comes of it; remedy: what to do; tensors: a few names
    that show it, of `count` in all."""

    id: str
    severity: Severity
    summary: str
    why: str
    remedy: str
    tensors: tuple[str, ...] = ()
    count: int = 0


def finding(
    id: str,
    severity: Severity,
    summary: str,
    why: str,
    remedy: str,
    tensors: Iterable[str] = (),
) -> Finding:
    """A Finding about all of `tensors`, which shows the first few."""
    names = list(tensors)
    shown = tuple(names[:NUM_SHOWN])
    return Finding(id, severity, summary, why, remedy, shown, len(names))


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Ordered by severity; within one as they came."""
    return sorted(findings, key=lambda each: SEVERITIES.index(each.severity))
