# SPDX-License-Identifier: Apache-2.0
"""What a model that renames its layers makes of an export's quantization config."""

from copy import deepcopy

import pytest
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.models.utils import WeightsMapper

ALGORITHMS = [{"name": "rotation", "r1": True}, {"name": "awq", "scaling_layers": []}]


@pytest.mark.needs_patch("0034")
def test_lists_of_names_alone_are_renamed(quark_dict):
    given = quark_dict(exclude=("model.layers.0.mlp", "lm_head"))
    given |= {"algo_config": ALGORITHMS, "empty": []}
    config = QuarkConfig(deepcopy(given))
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "text.model."})
    )
    found = config.quant_config
    assert found["exclude"] == ["text.model.layers.0.mlp", "lm_head"]
    assert found["algo_config"] == ALGORITHMS and found["empty"] == []
    assert found["global_quant_config"] == given["global_quant_config"]
