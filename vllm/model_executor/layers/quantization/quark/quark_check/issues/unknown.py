# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is not known of a checkpoint."""

import os
from collections.abc import Iterator

from ..findings import Finding, finding
from ..known import Known
from ..opened import Checkpoint
from ..releases import FORK, FORK_CPU, on, range_of
from ..rules import is_int8
from .issue import Issue


def unknown_issues(
    checkpoint: Checkpoint, known: Known, but: set[str]
) -> Iterator[Issue]:
    if known.structure is None:
        yield Issue(
            finding(
                "model-unknown",
                "note",
                f"what vLLM makes of {checkpoint.architecture} is not known",
                known.why_not,
                "run `vllm quark-check` where the vLLM that you serve with is "
                "installed: it asks the model itself",
            ),
            on(FORK, "not known"),
        )
    elif known.unknown:
        yield Issue(
            finding(
                "module-unknown",
                "note",
                "where these tensors go is not known",
                "No release that was looked into has told it of this architecture.",
                "run `vllm quark-check` where the vLLM that you serve with is "
                "installed: it asks the model itself",
                known.unknown,
            ),
            on(FORK, "not known"),
        )
    lacking = [
        row
        for row in known.scope.stock()
        if row not in but
        and (
            row not in known.releases
            or row in known.untold
            or any(each.unknown(known.export.tensors) for each in known.releases[row])
        )
    ]
    if lacking:
        yield Issue(
            finding(
                "releases-unknown",
                "note",
                f"what vLLM {known.scope.listed(lacking)} makes of it is not known",
                "Of those releases nothing, or not all, is known of this architecture.",
                "nothing to do",
            ),
            on(lacking, "not known"),
        )
    yield from _cpu_issues(known)
    yield from _stock_cpu_issues(known, but)
    others = [
        stored.weight.name
        for _, layer in known.layers.values()
        if layer.config is not None and not is_int8(layer.config)
        for stored in layer.weights
    ]
    if others:
        yield Issue(
            finding(
                "other-schemes",
                "note",
                "layers of other schemes beside INT8",
                "Those are upstream's matter, and not looked into.",
                "nothing to do",
                others,
            ),
            on([*known.scope.stock(), *FORK], "not known"),
        )


def _cpu_issues(known: Known) -> Iterator[Issue]:
    structure = known.structure
    if structure is None:
        return
    # What a model was seen to lack was seen without that setting.
    is_told = structure.is_derived or os.environ.get("VLLM_MLA_DISABLE", "0") != "1"
    is_here = known.looked is None or known.looked.platform == "cpu"
    for each in structure.lacks_on_cpu if is_told and is_here else ():
        yield Issue(_platform_lacks(each), on([FORK_CPU], "refused"))
    if not known.cpu:
        yield Issue(
            finding(
                "cpu-unknown",
                "note",
                "nobody has seen this architecture run on a CPU",
                "Upstream's CPU platform lacks some models' layers.",
                "see docs/measured/families.md for those that were run",
            ),
            on([FORK_CPU], "not known"),
        )


def _platform_lacks(said: str) -> Finding:
    return finding(
        "platform-lacks",
        "refused",
        "this platform cannot compute the model's attention",
        said,
        "VLLM_MLA_DISABLE=1, for models with multi-head latent attention",
    )


def _stock_cpu_issues(known: Known, but: set[str]) -> Iterator[Issue]:
    """What releases make of it on a CPU, of those that have a verdict of their own
    there."""
    rows = [row for row in known.scope.known if row.by_platform and row.name not in but]
    experts = [each.name for each in known.int8 if each.is_experts]
    refusing = [row for row in rows if not row.has("cpu-experts")] if experts else []
    if refusing:
        yield Issue(
            finding(
                "cpu-experts",
                "refused",
                "INT8 experts, which releases do not run on a CPU",
                f"vLLM {refusing[0].name} ends with an error there when it loads the "
                "model, or at its first token.",
                "a GPU; or this fork: patch 0007",
                experts,
            ),
            on((row.on_cpu for row in refusing), "refused"),
        )
    seen = {each.name for v in known.stock_cpu if (each := range_of(v))}
    unseen = [row for row in rows if row.range and row.range.name not in seen]
    for row in unseen:
        for structure in known.releases.get(row.name, ()):
            for lack in structure.lacks_on_cpu:
                yield Issue(_platform_lacks(lack), on([row.on_cpu], "refused"))
    unseen = [row for row in unseen if row not in refusing]
    if unseen:
        yield Issue(
            finding(
                "cpu-unknown",
                "note",
                f"nobody has seen vLLM {unseen[0].name} run this architecture on a CPU",
                "Upstream's CPU platform lacks some models' layers.",
                "see docs/guide/quark-check.md for those that were run",
            ),
            on((row.on_cpu for row in unseen), "not known"),
        )
