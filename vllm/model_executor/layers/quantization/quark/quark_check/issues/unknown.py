# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is not known of a checkpoint."""

import os
from collections.abc import Iterator

from ..findings import finding
from ..known import Known
from ..opened import Checkpoint
from ..releases import FORK, FORK_CPU, listed, on, stock, targets
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
            on(FORK, "unknown"),
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
            on(FORK, "unknown"),
        )
    lacking = [
        row
        for row in stock()
        if row not in but
        and (
            row not in known.releases
            or any(each.unknown(known.export.tensors) for each in known.releases[row])
        )
    ]
    if lacking:
        yield Issue(
            finding(
                "releases-unknown",
                "note",
                f"what vLLM {listed(lacking)} makes of it is not known",
                "Of those releases nothing, or not all, is known of this architecture.",
                "nothing to do",
            ),
            on(lacking, "unknown"),
        )
    yield from _cpu_issues(known)
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
            on(targets(), "unknown"),
        )


def _cpu_issues(known: Known) -> Iterator[Issue]:
    structure = known.structure
    if structure is None:
        return
    # What a model was seen to lack was seen without that setting.
    is_told = structure.is_derived or os.environ.get("VLLM_MLA_DISABLE", "0") != "1"
    is_here = known.looked is None or known.looked.platform == "cpu"
    for each in structure.lacks_on_cpu if is_told and is_here else ():
        yield Issue(
            finding(
                "platform-lacks",
                "refused",
                "this platform cannot compute the model's attention",
                each,
                "VLLM_MLA_DISABLE=1, for models with multi-head latent attention",
            ),
            on([FORK_CPU], "refused"),
        )
    if not known.cpu:
        yield Issue(
            finding(
                "cpu-unknown",
                "note",
                "nobody has seen this architecture run on a CPU",
                "Upstream's CPU platform lacks some models' layers.",
                "see docs/families.md for those that were run",
            ),
            on([FORK_CPU], "unknown"),
        )
