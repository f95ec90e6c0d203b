# SPDX-License-Identifier: Apache-2.0
"""A Step-3.5 so small that building and loading it takes milliseconds: its export, the
model as the engine builds it, and what each rank of it has to hold."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model

from tests.moe_layers import plain_name
from tests.quantization.utils import random_int8, random_scales

# Layer 0 is dense; layer 1 holds routed experts and a shared one.
DENSE, MOE = "model.layers.0", "model.layers.1"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROUTED = tuple(f"{MOE}.moe.{name}" for name in PROJECTIONS)
SHARED = tuple(f"{MOE}.share_expert.{name}" for name in PROJECTIONS)
NEVER_INT8 = ("lm_head", f"{MOE}.moe.gate")


@dataclass(frozen=True)
class Sizes:
    """`groups` are the key and value heads."""

    hidden: int = 32
    width: int = 16
    experts: int = 4
    heads: int = 4
    groups: int = 2
    head: int = 32  # the least that ROCm attends to
    vocab: int = 64


@dataclass(frozen=True)
class Share:
    """One rank's share of the weights: of each tensor, or of the experts alone too."""

    rank: int = 0
    size: int = 1
    by_expert: bool = False

    def part(self, count: int) -> slice:
        """This rank's of `count` things; the first ranks take what is over."""
        each, over = divmod(count, self.size)
        start = self.rank * each + min(self.rank, over)
        return slice(start, start + each + (self.rank < over))

    def kv_heads(self, count: int) -> slice:
        """Ranks in excess of the heads share them, neighbours the same one."""
        if count >= self.size:
            return self.part(count)
        head = self.rank * count // self.size
        return slice(head, head + 1)


def config(sizes: Sizes, quark: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of an export."""
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "tie_word_embeddings": False,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "max_seq_len": 64,
        "num_attention_heads": sizes.heads,
        "num_attention_groups": sizes.groups,
        "head_dim": sizes.head,
        "layer_types": ["full_attention", "full_attention"],
        "rope_theta": [10000.0, 10000.0],
        "intermediate_size": sizes.width,
        "use_moe": True,
        "moe_layers_enum": "1",
        "moe_num_experts": sizes.experts,
        "moe_top_k": 1,
        "moe_intermediate_size": sizes.width,
        "share_expert_dim": sizes.width,
        "moe_router_activation": "sigmoid",
        "quantization_config": quark,
    }


def _linear_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Weights of linear layers, routed experts stacked, by name in the checkpoint."""
    hidden, width = sizes.hidden, sizes.width
    query, key = sizes.heads * sizes.head, sizes.groups * sizes.head
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (DENSE, MOE):
        attention = f"{layer}.self_attn"
        shapes[f"{attention}.q_proj"] = (query, hidden)
        shapes[f"{attention}.k_proj"] = (key, hidden)
        shapes[f"{attention}.v_proj"] = (key, hidden)
        shapes[f"{attention}.o_proj"] = (hidden, query)
    for prefix, experts in (
        (f"{DENSE}.mlp", ()),
        (f"{MOE}.share_expert", ()),
        (f"{MOE}.moe", (sizes.experts,)),
    ):
        for name in PROJECTIONS:
            shape = (hidden, width) if name == "down_proj" else (width, hidden)
            shapes[f"{prefix}.{name}"] = (*experts, *shape)
    shapes[f"{MOE}.moe.gate"] = (sizes.experts, hidden)
    shapes["lm_head"] = (sizes.vocab, hidden)
    return shapes


def export(
    sizes: Sizes,
    exclude: Iterable[str],
    rng: torch.Generator,
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random tensors of a 3-key export, per channel, by name in the checkpoint.

    Linear layers are int8 [.., N, K] with scales [.., N], but for `exclude`.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu").bfloat16()

    exclude = set(exclude)
    tensors = {"model.embed_tokens.weight": normal(sizes.vocab, sizes.hidden)}
    for name, shape in _linear_shapes(sizes).items():
        if name in exclude:
            tensors[f"{name}.weight"] = normal(*shape)
        else:
            tensors[f"{name}.weight"] = random_int8(*shape, rng=rng)
            scales = random_scales(*shape[:-1], rng=rng).to(scale_dtype)
            tensors[f"{name}.weight_scale"] = scales
    for layer in (DENSE, MOE):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = normal(sizes.hidden)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = normal(sizes.head)
    tensors[f"{MOE}.moe.router_bias"] = normal(sizes.experts).float()
    tensors["model.norm.weight"] = normal(sizes.hidden)
    return tensors


def one_by_one(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A 3-key export's tensors as another has them, each expert on its own."""
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ROUTED:
            prefix, _, projection = module.rpartition(".")
            for expert, one in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.{projection}.{kind}", one.clone()
        else:
            yield name, tensor


def build(folder: Path, by_expert: bool = False) -> tuple[Any, VllmConfig]:
    """The model that the engine makes of a folder's config.json, not yet loaded."""
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
        ),
        load_config=LoadConfig(load_format="safetensors"),
    )
    vllm_config.parallel_config.enable_expert_parallel = by_expert
    return initialize_model(vllm_config), vllm_config


def write_config(folder: Path, sizes: Sizes, quark: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config(sizes, quark)))


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 values of a 3-key export's weights; scales [.., N] or [.., N, 1]."""
    values = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale"):
            values[name] = tensor.double()
            if (scale := tensors.get(f"{name}_scale")) is not None:
                values[name] *= scale.double().reshape(*tensor.shape[:-1], 1)
    return values


def expected(
    tensors: dict[str, Tensor], sizes: Sizes, share: Share
) -> dict[str, Tensor]:
    """float64 values of the parameters that a rank holds of a 3-key export."""
    values = dequantized(tensors)
    whole_experts = Share(share.rank, share.size) if share.by_expert else Share()
    in_expert = Share() if share.by_expert else share

    def heads(tensor: Tensor, chosen: slice) -> Tensor:
        return tensor.unflatten(0, (-1, sizes.head))[chosen].flatten(0, 1)

    def mlp(prefix: str, of: Share) -> tuple[Tensor, Tensor]:
        gate, up, down = (values[f"{prefix}.{name}.weight"] for name in PROJECTIONS)
        rows = of.part(sizes.width)
        return torch.cat([gate[..., rows, :], up[..., rows, :]], -2), down[..., rows]

    held = {}
    vocab = share.part(sizes.vocab)
    for name in ("model.embed_tokens", "lm_head"):
        held[f"{name}.weight"] = values[f"{name}.weight"][vocab]
    held["model.norm.weight"] = values["model.norm.weight"]
    for layer in (DENSE, MOE):
        attention = f"{layer}.self_attn"
        query = share.part(sizes.heads)
        key = share.kv_heads(sizes.groups)
        held[f"{attention}.qkv_proj.weight"] = torch.cat(
            [
                heads(values[f"{attention}.{name}_proj.weight"], chosen)
                for name, chosen in (("q", query), ("k", key), ("v", key))
            ]
        )
        o_proj = values[f"{attention}.o_proj.weight"]
        held[f"{attention}.o_proj.weight"] = heads(o_proj.T, query).T
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            held[f"{layer}.{norm}.weight"] = values[f"{layer}.{norm}.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            held[f"{layer}.{norm}.weight"] = values[f"{layer}.{norm}.weight"]
    for prefix, name in (
        (f"{DENSE}.mlp", f"{DENSE}.mlp"),
        (f"{MOE}.moe.share_expert", f"{MOE}.share_expert"),
    ):
        gate_up, down = mlp(name, share)
        held[f"{prefix}.gate_up_proj.weight"] = gate_up
        held[f"{prefix}.down_proj.weight"] = down
    experts = whole_experts.part(sizes.experts)
    gate_up, down = mlp(f"{MOE}.moe", in_expert)
    held[f"{MOE}.moe.experts.w13_weight"] = gate_up[experts]
    held[f"{MOE}.moe.experts.w2_weight"] = down[experts]
    held[f"{MOE}.moe.gate.weight"] = values[f"{MOE}.moe.gate.weight"]
    held[f"{MOE}.moe.router_bias"] = values[f"{MOE}.moe.router_bias"]
    return held


def found(model: nn.Module) -> dict[str, Tensor]:
    """float64 values of a model's weights, between loading and processing."""
    parameters = dict(model.named_parameters())
    values = {}
    for name, parameter in parameters.items():
        if name.endswith(("_scale", "_zero_point")):
            continue
        value = parameter.data.cpu().double()
        if parameter.dtype == torch.int8:
            scale = parameters[f"{name}_scale"].data.cpu().double()
            value *= scale.reshape(*parameter.shape[:-1], 1)
        values[plain_name(name)] = value
    return values
