# SPDX-License-Identifier: Apache-2.0
"""Step-3.5 with EPLB and redundant experts.

    python reproduce.py

With `--eplb-config.num_redundant_experts N` a layer has N more experts than the
checkpoint, copies of its first ones until EPLB moves them. Exits with 1 where the
model's loader leaves them as they were allocated. A few seconds on a CPU; nothing is
downloaded.
"""

import os
import sys
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.model_executor.models import step3p5
from vllm.model_executor.utils import set_weight_attrs

EXPERTS, REDUNDANT = 4, 2
LAYOUTS = {
    "stacked": {"layers.1.moe.up_proj.weight": torch.ones(EXPERTS, 8, 8)},
    "one by one": {
        f"layers.1.moe.experts.{expert}.up_proj.weight": torch.ones(8, 8)
        for expert in range(EXPERTS)
    },
}


class Layer(torch.nn.Module):
    """A layer of experts that notes which of them are filled."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: set[int] = set()
        self.w13_weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        set_weight_attrs(self.w13_weight, {"weight_loader": self.load})

    def load(self, param, weight, name, shard_id, expert_id, return_success=False):
        self.filled.add(expert_id)
        return True


class Model(torch.nn.Module):
    """What the loader asks of the model."""

    def __init__(self) -> None:
        super().__init__()
        eplb = SimpleNamespace(num_redundant_experts=REDUNDANT)
        parallel = SimpleNamespace(eplb_config=eplb, enable_eplb=True)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.config = SimpleNamespace(
            num_attention_groups=8, num_hidden_layers=2, num_nextn_predict_layers=0
        )
        self.moe_num_experts = EXPERTS
        self.quant_config = None
        self.experts = Layer()

    def named_parameters(self, *args, **kwargs):
        # Under each name that a release has for the layer of experts.
        for prefix in ("experts", "experts.routed_experts"):
            yield f"layers.1.moe.{prefix}.w13_weight", self.experts.w13_weight


def main() -> None:
    step3p5.is_pp_missing_parameter = lambda *_: False
    for layout, weights in LAYOUTS.items():
        model = Model()
        step3p5.Step3p5Model.load_weights(model, weights.items())
        wanted = set(range(EXPERTS + REDUNDANT))
        if model.experts.filled != wanted:
            sys.exit(
                f"experts {layout}: expected {sorted(wanted)} to be filled, found "
                f"{sorted(model.experts.filled)}"
            )
    print("each redundant expert is filled")


if __name__ == "__main__":
    main()
