# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All that is wrong with a checkpoint."""

from collections.abc import Iterator

from ..findings import Finding, finding
from ..known import Known
from ..opened import Checkpoint, quantization_config
from ..problems import KINDS
from ..releases import ALL, FORK, Scope, on, releases
from ..weights import int8_with_scales
from .fork import fork_issues
from .issue import Issue
from .releases import release_issues, too_old
from .scales import scheme_issues, storage_issues
from .unknown import unknown_issues

# What --deep finds that this fork refuses.
_REFUSED_WHEN_READ = ("non-finite", "scale-not-positive", "zero-point-not-zero")


def deep_issue(found: Finding, scope: Scope = ALL) -> Issue:
    """What comes of something that --deep found."""
    if found.severity != "garbage":
        return Issue(found, {})
    refused = found.id in _REFUSED_WHEN_READ
    return Issue(
        found,
        on(scope.stock(), "garbage") | on(FORK, "refused" if refused else "garbage"),
    )


def find_issues(
    checkpoint: Checkpoint, known: Known | None, scope: Scope = ALL
) -> Iterator[Issue]:
    yield from _release_unknown(scope)
    if "auto_map" in checkpoint.model:
        yield Issue(
            finding(
                "code-in-config",
                "note",
                "config.json names Python code of the checkpoint (auto_map)",
                "vLLM runs it where --trust-remote-code is given; nothing of it was "
                "run here.",
                "read that code before you give --trust-remote-code",
            ),
            {},
        )
    if checkpoint.has_keys_twice:
        yield Issue(
            finding(
                "keys-twice",
                "note",
                "config.json has a key twice",
                "The last one counts, to transformers and here.",
                "delete the other one",
            ),
            {},
        )
    if checkpoint.problem is not None:
        yield _config_unreadable(checkpoint.problem, scope)
    elif known is None:
        yield from _without_int8(checkpoint, scope)
    else:
        old = too_old(known)
        # What a release makes of a checkpoint that it refuses anyhow is of no interest.
        but = {name for issue in old.values() for name in issue.outcomes}
        yield from fork_issues(known)
        yield from old.values()
        yield from unknown_issues(checkpoint, known, but)
        yield from scheme_issues(known.int8, scope, but)
        yield from release_issues(known, but)
        yield from storage_issues(known, but)


def _release_unknown(scope: Scope) -> Iterator[Issue]:
    rows = [row for row in scope.rows if not row.version]
    if rows:
        ranges = ", ".join(each.name for each in releases())
        yield Issue(
            finding(
                "release-unknown",
                "note",
                f"nobody has looked into vLLM {rows[0].name}",
                f"Known are {ranges}, and builds of this fork on these.",
                "see what is said of the releases before and after it",
            ),
            on((each for row in rows for each in row.targets), "not known"),
        )


def _config_unreadable(problem: ValueError, scope: Scope) -> Issue:
    kind = KINDS["config-unreadable"]
    return Issue(
        finding(kind.id, "refused", kind.summary, str(problem), kind.remedy),
        on([*scope.stock(), *FORK], "refused"),
    )


def _without_int8(checkpoint: Checkpoint, scope: Scope) -> Iterator[Issue]:
    int8 = [tensor.name for tensor in int8_with_scales(checkpoint.tensors)]
    if int8 and quantization_config(checkpoint.model) is None:
        kind = KINDS["config-lost"]
        yield Issue(
            finding(
                kind.id,
                "garbage",
                kind.summary,
                f"{kind.why} This fork refuses it.",
                kind.remedy,
                int8,
            ),
            on(scope.stock(), "garbage") | on(FORK, "refused"),
        )
        return
    yield Issue(
        finding(
            "not-quark-int8",
            "note",
            "not a Quark INT8 checkpoint",
            "Other formats are left to vLLM as upstream has them; what follows says "
            "what is stored, not whether it is read right.",
            "nothing to do",
        ),
        {},
    )
