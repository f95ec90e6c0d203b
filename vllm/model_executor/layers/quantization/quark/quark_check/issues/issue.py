# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A finding, and what comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..findings import Finding
from ..releases import Outcome


@dataclass(frozen=True)
class Issue:
    """A finding, and what comes of it on which target; elsewhere it is right."""

    finding: Finding
    outcomes: Mapping[str, Outcome]
