# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The findings about a checkpoint, and what each vLLM makes of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .findings import Finding, worst_first
from .issues.find import deep_issue, find_issues
from .known import Known
from .opened import Checkpoint
from .releases import ALL, FORK, OUTCOMES, Outcome, Scope

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
    scope: Scope = ALL

    @property
    def is_fine(self) -> bool:
        """No vLLM answers wrong, and this fork, or the one vLLM that is asked about,
        does not refuse it everywhere."""
        refused = {v.target for v in self.verdicts if v.outcome == "refused"}
        if self.scope.is_one:
            is_wrong = any(v.outcome == "garbage" for v in self.verdicts)
            return not is_wrong and not refused.issuperset(self.scope.targets())
        worst = {each.severity for each in self.findings}
        return "garbage" not in worst and not refused.issuperset(FORK)


def judge(
    checkpoint: Checkpoint,
    known: Known | None,
    deep: Iterable[Finding] | None = None,
    scope: Scope = ALL,
) -> Judgement:
    """Everything that the headers tell, and what --deep found in the tensors, of the
    vLLMs in `scope`."""
    issues = list(find_issues(checkpoint, known, scope))
    if deep is not None:
        issues = [each for each in issues if each.finding.id not in _SUSPICIONS]
        issues += (deep_issue(each, scope) for each in deep)
    # Target -> the names under which issues tell of it.
    told_as = {target: {target} for target in scope.targets()}
    for row in scope.rows:
        for target in row.targets:
            told_as[target].add(row.name)
    if scope.is_one:
        named = set().union(*told_as.values())
        issues = [i for i in issues if not i.outcomes or named & set(i.outcomes)]
    verdicts = []
    for target, names in told_as.items():
        met: dict[int, Outcome] = {
            at: max(found, key=OUTCOMES.index)
            for at, issue in enumerate(issues)
            if (found := [v for name, v in issue.outcomes.items() if name in names])
        }
        outcome: Outcome = max(met.values(), key=OUTCOMES.index, default="right")
        if checkpoint.export is None and outcome == "right":
            outcome = "not known"
        because = tuple(
            issues[at].finding
            for at, found in met.items()
            if outcome != "right" and found == outcome
        )
        verdicts.append(Verdict(target, outcome, because))
    findings = worst_first(issue.finding for issue in issues)
    return Judgement(findings, verdicts, scope)
