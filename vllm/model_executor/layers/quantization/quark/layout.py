# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a model as a whole. Needs Python alone."""

import re
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization.quark.checkpoint import misfit

NUM_EXPERTS = (
    "moe_num_experts",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# Far beyond any real model: the config of a stranger's checkpoint may say anything.
MAX_EXPERTS = 100_000
MAX_LAYERS = 100_000

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


def _count(config: Mapping[str, Any], what: str, most: int, *keys: str) -> int | None:
    count = first_value(config, *keys)
    if not isinstance(count, int) or isinstance(count, bool):
        return None
    if not 0 <= count <= most:
        # Numbers of thousands of digits cannot be printed.
        found = str(count) if abs(count) < 10**20 else "one of over 20 digits"
        raise misfit("config.json", f"{what} from 0 to {most}", found, "correct it")
    return count


def num_experts(config: Mapping[str, Any]) -> int | None:
    """As config.json counts them. Raises CheckpointError for a senseless number."""
    return _count(config, "a number of experts", MAX_EXPERTS, *NUM_EXPERTS)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """As config.json counts them. Raises CheckpointError for a senseless number."""
    return _count(config, "a number of layers", MAX_LAYERS, "num_hidden_layers")
