# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Step-3.5's loader fills the redundant experts of EPLB.

Goes to tests/model_executor/test_step3p5_redundant_experts.py.
"""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.models import step3p5
from vllm.model_executor.utils import set_weight_attrs

EXPERTS = 4


class Experts(torch.nn.Module):
    """A rank's layer of experts: notes what is loaded into which."""

    def __init__(self, local: set[int]):
        super().__init__()
        self.local = local
        self.loaded: dict[int, float] = {}
        self.w13_weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        set_weight_attrs(self.w13_weight, {"weight_loader": self.load})

    def load(self, param, weight, name, shard_id, expert_id, return_success=False):
        if expert_id not in self.local:
            return False
        self.loaded[expert_id] = weight.flatten()[0].item()
        return True


class Model(torch.nn.Module):
    """What Step3p5Model.load_weights asks of the model."""

    quant_config = None
    moe_num_experts = EXPERTS
    config = SimpleNamespace(
        num_attention_groups=8, num_hidden_layers=2, num_nextn_predict_layers=0
    )

    def __init__(self, redundant: int, local: set[int]):
        super().__init__()
        eplb = SimpleNamespace(num_redundant_experts=redundant)
        parallel = SimpleNamespace(eplb_config=eplb, enable_eplb=redundant > 0)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.experts = Experts(local)

    def named_parameters(self, *args, **kwargs):
        for name in ("experts", "experts.routed_experts"):
            yield f"layers.1.moe.{name}.w13_weight", self.experts.w13_weight


def weights(stacked: bool) -> dict[str, torch.Tensor]:
    experts = [torch.full((8, 8), float(expert)) for expert in range(EXPERTS)]
    if stacked:
        return {"layers.1.moe.up_proj.weight": torch.stack(experts)}
    return {
        f"layers.1.moe.experts.{expert}.up_proj.weight": weight
        for expert, weight in enumerate(experts)
    }


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("redundant", "local"),
    [(0, {0, 1, 2, 3}), (2, {0, 1, 2, 3, 4, 5}), (2, {3, 4, 5}), (2, {0, 4})],
)
def test_copies_are_filled(monkeypatch, stacked: bool, redundant: int, local: set[int]):
    monkeypatch.setattr(step3p5, "is_pp_missing_parameter", lambda *_: False)
    model = Model(redundant, local)
    step3p5.Step3p5Model.load_weights(model, weights(stacked).items())
    # EPLB numbers the copies after the experts, those of the first ones first.
    assert model.experts.loaded == {expert: expert % EXPERTS for expert in local}
