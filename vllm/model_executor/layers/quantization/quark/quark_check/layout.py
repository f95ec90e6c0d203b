# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What config.json says of a model as a whole. Needs Python alone."""

import re
from collections.abc import Mapping
from typing import Any

NUM_EXPERTS = (
    "moe_num_experts",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# Of stacked tensors that are taken apart; far beyond any real model.
MAX_EXPERTS = 100_000
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})(?:\.|$)")


def layer_index(name: str) -> int | None:
    """3 for `model.layers.3.mlp`; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def first_value(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that a model's config has, or its text_config."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            if each.get(key) is not None:
                return each[key]
    return None


def count(config: Mapping[str, Any], *keys: str) -> int | None:
    """How many of something config.json says that the model has. It may be any
    number, and is no reason to make room for as many."""
    found = first_value(config, *keys)
    is_number = isinstance(found, int) and not isinstance(found, bool)
    return found if is_number and found >= 0 else None


def num_experts(config: Mapping[str, Any]) -> int | None:
    """As config.json counts them."""
    return count(config, *NUM_EXPERTS)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """As config.json counts them."""
    return count(config, "num_hidden_layers")


def shown(number: int) -> str:
    """A number that a stranger wrote; one of thousands of digits cannot be printed."""
    return str(number) if abs(number) < 10**20 else "a number of over 20 digits"
