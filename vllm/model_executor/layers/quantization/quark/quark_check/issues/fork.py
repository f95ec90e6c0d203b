# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What this fork's engine says of a checkpoint."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from ..findings import Severity, finding
from ..known import Known
from ..problems import KINDS, Problem
from ..releases import FORK, FORK_CPU, FORK_GPU, on
from .issue import Issue

# Told of releases by what they do with these very layers, not by the kind of problem.
_TOLD_OTHERWISE = ("float-not-excluded", "shards-differ")


def fork_issues(known: Known) -> Iterator[Issue]:
    by_id: dict[str, list[Problem]] = defaultdict(list)
    for problem in known.problems:
        by_id[problem.id].append(problem)
    for id, problems in by_id.items():
        kind = KINDS[id]
        names = list(dict.fromkeys(each.name for each in problems))
        if kind.severity == "warning":
            # What releases make of it is told by what they do with the very layers.
            if known.scope.has_fork:
                yield Issue(
                    finding(id, "note", kind.summary, kind.why, kind.remedy, names), {}
                )
            continue
        outcome = "right" if id in _TOLD_OTHERWISE else kind.stock
        severity: Severity = "garbage" if outcome == "garbage" else "refused"
        why = f"{kind.why} This fork (patch 0010) refuses it: {problems[0].error}"
        remedy = problems[0].remedy or kind.remedy
        yield Issue(
            finding(id, severity, kind.summary, why, remedy, names),
            on(known.scope.stock(), outcome) | on(FORK, "refused"),
        )
    yield from _load_issues(known)


def _load_issues(known: Known) -> Iterator[Issue]:
    """What the model itself says when it is built and loaded, or what it was seen to
    say."""
    looked, structure = known.looked, known.structure
    if structure is None:
        return
    if structure.only_text and known.scope.has_fork:
        yield _only_text()
    if looked is None or not structure.is_derived:
        if error := structure.refuses(each.name for each in known.int8):
            yield _does_not_load(error, FORK)
        return
    engine, here = looked.engine, FORK_CPU if looked.platform == "cpu" else FORK_GPU
    if engine.stage and not _is_told(engine.error, known.problems):
        # A kernel that is missing on this platform is a matter of this platform.
        is_here = engine.error.startswith("NotImplementedError")
        yield _does_not_load(engine.error, [here] if is_here else FORK)


def _is_told(error: str, problems: Iterable[Problem]) -> bool:
    return any(str(each.error) in error for each in problems)


def _does_not_load(error: str, names: Iterable[str]) -> Issue:
    return Issue(
        finding(
            "model-does-not-load",
            "refused",
            "the model cannot be built, or does not take these tensors",
            error,
            "an export that the model takes: upstream's own matter, such as names of "
            "tensors or a scheme without a kernel",
        ),
        on(names, "refused"),
    )


def _only_text() -> Issue:
    return Issue(
        finding(
            "text-alone",
            "note",
            "seen without the model's images",
            "With them the model of this vLLM does not load the checkpoint: the names "
            "of those tensors are not those that it takes.",
            "--language-model-only, or limit_mm_per_prompt of 0 images",
        ),
        {},
    )
