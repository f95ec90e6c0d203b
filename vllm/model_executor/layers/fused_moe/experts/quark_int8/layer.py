# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The INT8 (W8A8) fused MoE layer: the choice of a path by the number of tokens."""

import torch
from vllm.model_executor.layers.fused_moe.experts.quark_int8.few_tokens import (
    apply_few_tokens,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.many_tokens import (
    apply_many_tokens,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    Experts,
    Routing,
    check,
    shape_of,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    Config,
    FewConfig,
    choose_config,
    get_architecture,
)


def apply_experts(
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    out: torch.Tensor,
    config: Config | FewConfig | None = None,
) -> None:
    """Apply INT8 experts to x [M, K], one of `DTYPES`, and write out [M, K] like it.

    Integer products are exact. All between them is float32, but the intermediate, each
    pair's output and the result are rounded to the dtype of x. Values are quantized as
    x * (127 / max(abs(x))), or x / scale, rounded once, halves to even.

    The two paths differ in two ways, each within rounding: the one for few tokens adds
    up a token's experts in the order of a reduction over a tile, the other in the order
    of topk_ids; and `config` chooses between them by the number of tokens, so that a
    token's bits may depend on its batch. For ROCm the compiler also fuses a product and
    a sum in the one and not in the other. With the same tokens both give the same bits
    each time.

    Launches kernels and allocates by shape alone, so that it can be captured in a CUDA
    graph. `config` is chosen by device and shape where it is None.

    Raises:
        ValueError: a shape or dtype that the kernels do not know.
    """
    check(x, experts, routing)
    if routing.topk_ids.numel() == 0:
        out.zero_()
        return
    config = config or choose_config(get_architecture(), shape_of(experts, routing))
    if isinstance(config, FewConfig):
        apply_few_tokens(config, x, experts, routing, out)
    else:
        apply_many_tokens(config, x, experts, routing, out)
