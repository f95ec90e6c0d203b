# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which kernel applies Quark's INT8 experts: the part of the INT8 oracle that upstream
lacks.

Upstream's oracle chooses for compressed-tensors, which has one scheme. Quark has four,
and a kernel of upstream's that reads three of them, one through patch 0009.
"""

from importlib.util import find_spec

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt8DynamicTokenSym,
    kInt8StaticChannelSym,
    kStaticTensorScale,
)

logger = init_logger(__name__)

kInt8StaticTensorSym = QuantKey(
    kInt8StaticChannelSym.dtype, kStaticTensorScale, symmetric=True
)
# Weights per channel or per tensor; activations per token, or static per tensor.
SCHEMES = tuple(
    (weight_key, activation_key)
    for weight_key in (kInt8StaticChannelSym, kInt8StaticTensorSym)
    for activation_key in (kInt8DynamicTokenSym, kInt8StaticTensorSym)
)

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts"


def experts_classes() -> list[type[mk.FusedMoEExperts]]:
    """The fork's own experts that this build holds, of `--moe-backend quark_int8`."""
    classes: list[type[mk.FusedMoEExperts]] = []
    if find_spec(f"{_EXPERTS}.quark_int8"):
        from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import (
            Int8Experts,
        )

        classes.append(Int8Experts)
    if find_spec(f"{_EXPERTS}.quark_int8_cpu"):
        from vllm.model_executor.layers.fused_moe.experts.quark_int8_cpu import (
            Int8CpuExperts,
        )

        classes.append(Int8CpuExperts)
    return classes


def quant_keys(per_channel: bool, static: bool) -> tuple[QuantKey, QuantKey]:
    """Of Quark's weights, and of their activations."""
    return (
        kInt8StaticChannelSym if per_channel else kInt8StaticTensorSym,
        kInt8StaticTensorSym if static else kInt8DynamicTokenSym,
    )


def select_quark_int8_experts(
    moe_config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    layer_name: str = "Experts",
) -> type[mk.FusedMoEExperts]:
    """The class for Quark's INT8 experts: the fork's own where it serves, else
    upstream's Triton kernel, which any `--moe-backend` but auto and quark_int8 names.

    Raises:
        NotImplementedError: no kernel serves; it names the layer and each reason.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
        TritonInt8Experts,
    )

    backend = moe_config.moe_backend
    candidates: list[type[mk.FusedMoEExperts]] = []
    if backend in ("auto", "quark_int8"):
        candidates += experts_classes()
    if backend != "quark_int8":
        candidates.append(TritonInt8Experts)
    activation_format = (
        mk.FusedMoEActivationFormat.BatchedExperts
        if moe_config.moe_parallel_config.use_batched_activation_format
        else mk.FusedMoEActivationFormat.Standard
    )
    reasons = []
    for experts_cls in candidates:
        supported, reason = experts_cls.is_supported_config(
            experts_cls, moe_config, weight_key, activation_key, activation_format
        )
        if supported:
            logger.info_once(
                "Using %s for Quark's INT8 MoE out of potential experts: %s.",
                experts_cls.__name__,
                ", ".join(candidate.__name__ for candidate in candidates),
            )
            return experts_cls
        reasons.append(f"{experts_cls.__name__}: {reason}")
        logger.debug_once("%s does not serve: %s", experts_cls.__name__, reason)
    raise NotImplementedError(
        f"{layer_name}: expected INT8 experts that a kernel reads, found weights "
        f"{weight_key} with activations {activation_key}, which none does with "
        f"--moe-backend {backend} here: {'; '.join(reasons) or 'this build has none'}."
    )
