# SPDX-License-Identifier: Apache-2.0
"""ask_checkpoints.py for stock vLLM and compressed-tensors checkpoints.

On a GPU it changes nothing. On a CPU stock vLLM has no kernel for INT8 experts in that
format: the kernel alone is taken from the fork (fused_moe/cpu_int8_moe.py). Stock still
reads the config, chooses what is quantized, loads and shapes every tensor, and has its
own linear layers.
"""

from typing import Any

import ask_checkpoints  # beside this script
import torch
from vllm.model_executor.layers.fused_moe.oracle.int8 import make_int8_moe_quant_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
    compressed_tensors_moe_w8a8_int8 as stock,
)
from vllm.platforms import current_platform


def keep_quant_config(method: Any, layer: Any) -> None:
    method.moe_quant_config = make_int8_moe_quant_config(
        layer.w13_weight_scale, layer.w2_weight_scale, None, None, True
    )


def apply(
    method: Any,
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
) -> torch.Tensor:
    from vllm.model_executor.layers.fused_moe.cpu_int8_moe import (
        cpu_int8_fused_experts,
    )

    return cpu_int8_fused_experts(
        x,
        layer.w13_weight,
        layer.w2_weight,
        topk_weights,
        topk_ids,
        layer.activation,
        layer.apply_router_weight_on_input,
        layer.expert_map,
        method.moe_quant_config,
    )


def main() -> None:
    if current_platform.is_cpu():
        stock.select_int8_moe_backend = lambda **config: (None, None)
        method = stock.CompressedTensorsW8A8Int8MoEMethod
        method.process_weights_after_loading = keep_quant_config
        method.apply = apply
        method.is_monolithic = False
    ask_checkpoints.main()


if __name__ == "__main__":
    main()
