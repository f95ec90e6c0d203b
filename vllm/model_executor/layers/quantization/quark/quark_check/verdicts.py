# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The findings about a checkpoint, and what each vLLM makes of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .findings import Finding, worst_first
from .issues.find import deep_issue, find_issues
from .known import Known
from .opened import Checkpoint
from .releases import FORK, OUTCOMES, Outcome, targets

# What headers can only suspect; --deep settles it.
_SUSPICIONS = ("expert-zero-points", "zero-points-stored")


@dataclass(frozen=True)
class Verdict:
    """What one target makes of the checkpoint, and the findings that make it so."""

    target: str
    outcome: Outcome
    because: tuple[Finding, ...]


@dataclass(frozen=True)
class Judgement:
    findings: list[Finding]
    verdicts: list[Verdict]

    @property
    def is_fine(self) -> bool:
        """No vLLM answers wrong, and this fork does not refuse it everywhere."""
        refused = {v.target for v in self.verdicts if v.outcome == "refused"}
        worst = {each.severity for each in self.findings}
        return "wrong" not in worst and not refused.issuperset(FORK)


def judge(
    checkpoint: Checkpoint, known: Known | None, deep: Iterable[Finding] | None = None
) -> Judgement:
    """Everything that the headers tell, and what --deep found in the tensors."""
    issues = list(find_issues(checkpoint, known))
    if deep is not None:
        issues = [each for each in issues if each.finding.id not in _SUSPICIONS]
        issues += map(deep_issue, deep)
    verdicts = []
    for target in targets():
        met = {issue.outcomes.get(target, "right") for issue in issues}
        outcome: Outcome = max(met, key=OUTCOMES.index, default="right")
        if checkpoint.export is None and outcome == "right":
            outcome = "unknown"
        because = tuple(
            issue.finding
            for issue in issues
            if outcome != "right" and issue.outcomes.get(target) == outcome
        )
        verdicts.append(Verdict(target, outcome, because))
    return Judgement(worst_first(issue.finding for issue in issues), verdicts)
