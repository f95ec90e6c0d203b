# SPDX-License-Identifier: Apache-2.0
"""ask_checkpoints.py for a stock release, 0.30.0 to 0.32.0, on a CPU, where none of its
INT8 experts run: their kernel and the router's operators are computed in torch.

The scales of experts are read by the rules of the release's Triton kernel, errors and
all. Config, exclude, names, loading, shapes of scales and linear layers are stock's.
"""

from pathlib import Path
from types import SimpleNamespace

import ask_checkpoints  # beside this script
import torch
import vllm._custom_ops as ops
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import router
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.router import router_factory
from vllm.model_executor.layers.quantization.quark import quark_moe

OVERLAY = Path(__file__).resolve().parents[1] / "vllm/model_executor/layers/fused_moe"
fused_moe.__path__.append(str(OVERLAY))
router.__path__.append(str(OVERLAY / "router"))

from vllm.model_executor.layers.fused_moe.cpu_moe_utils import (  # noqa: E402
    activate,
    sort_pairs,
)
from vllm.model_executor.layers.fused_moe.router import cpu_topk  # noqa: E402


def scales_of(weight_scale: torch.Tensor, expert: int) -> torch.Tensor:
    """What the kernel reads: [N] of a scale a channel. Of one a tensor, [E], its stride
    between experts is 0 before 0.33.0, so that each expert has the first one's."""
    if weight_scale.dim() == 1:
        return weight_scale[:1]
    return weight_scale[expert].flatten()


def rounded(x: torch.Tensor, is_int8: bool) -> torch.Tensor:
    """Activations as the kernel has them: one INT8 scale a row, or as they are."""
    if not is_int8:
        return x
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-128, 127) * scale


class TorchExperts(TritonExperts):
    """The Triton experts of the release, with the products in float32."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def workspace_shapes(self, M, N, K, *_, **__):
        return (0,), (0,), (M, K)

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ):
        config = self.quant_config
        is_int8 = config.use_int8_w8a8
        result = torch.zeros_like(output, dtype=torch.float32)
        pairs = sort_pairs(topk_weights, topk_ids, expert_map, w1.shape[0])
        for expert, tokens, weights in pairs.by_expert():
            x = hidden_states[tokens].float()
            x = rounded(x, is_int8) @ w1[expert].float().T
            x *= scales_of(config.w1_scale, expert)
            if config.w1_bias is not None:
                x += config.w1_bias[expert]
            x = activate(activation.value, x)
            x = rounded(x, is_int8) @ w2[expert].float().T
            x *= scales_of(config.w2_scale, expert)
            if config.w2_bias is not None:
                x += config.w2_bias[expert]
            if not apply_router_weight_on_input:
                x *= weights
            result.index_add_(0, tokens, x)
        output.copy_(result)


def topk_softmax(weights, ids, _, logits, renormalize=False, bias=None, *__, **___):
    cpu_topk.topk_softmax(weights, ids, logits, renormalize, bias)


def topk_sigmoid(
    weights,
    ids,
    _,
    logits,
    renormalize=False,
    bias=None,
    routed_scaling_factor=1.0,
    *__,
    **___,
):
    cpu_topk.topk_sigmoid(weights, ids, logits, renormalize, bias)
    weights *= routed_scaling_factor


def main() -> None:
    selected = Int8MoeBackend.TRITON, TorchExperts
    quark_moe.select_int8_moe_backend = lambda *args, **kwargs: selected
    # Its router on a CPU knows softmax alone.
    router_factory.current_platform = SimpleNamespace(is_cpu=lambda: False)
    ops.topk_softmax, ops.topk_sigmoid = topk_softmax, topk_sigmoid
    ask_checkpoints.main()


if __name__ == "__main__":
    main()
