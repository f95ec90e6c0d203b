# SPDX-License-Identifier: Apache-2.0
"""Step-3.5 in plain torch float32, written from the architecture without vLLM.

Tests compare vLLM's answers with it. Modules carry the names of the Hugging Face
checkpoint, one ``nn.Linear`` per expert, so that amd-quark can quantize it as well.
Batches are lists of token id lists; sequences of one length run together, without
padding.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FILE = "model.safetensors"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMS norm over the last dimension: a weight of 0 scales by 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def rotate(x: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """Rotary embedding of the first ``rotary_dim`` channels.

    x is [..., T, heads, head_dim]; token t stands at position t. Channel i is paired
    with channel i + rotary_dim / 2.
    """
    half = rotary_dim // 2
    channel, token = (
        torch.arange(count, dtype=torch.float64, device=x.device)
        for count in (half, x.shape[-3])
    )
    angle = token[:, None] * theta ** (-channel / half)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    first, second, rest = x.split((half, half, x.shape[-1] - rotary_dim), dim=-1)
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin, rest), dim=-1
    )


def attention_mask(
    length: int, window: int | None, device: torch.device | None = None
) -> Tensor:
    """[query, key] bool: True where a query sees a key.

    A query sees itself and what came before, ``window`` tokens in all if given.
    """
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up; with a limit, the first is capped and the second clamped."""
    gate = F.silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


def route(
    logits: Tensor, bias: Tensor, top_k: int, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts for router logits [..., E]; weights and ids, both [..., k].

    The bias [E] takes part in the choice only: weights are the plain sigmoid scores.
    """
    scores = logits.sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int, limit: float | None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Attention(nn.Module):
    def __init__(self, config: SimpleNamespace, index: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_attention_groups
        dim, hidden = config.head_dim, config.hidden_size
        other = config.attention_other_setting
        self.window = None
        if config.layer_types[index] == "sliding_attention":
            self.window = config.sliding_window
        if config.layer_types[index] == other["attention_type"]:
            heads, kv_heads = (
                other["num_attention_heads"],
                other["num_attention_groups"],
            )
            dim = other["head_dim"]
        self.head_dim = dim
        self.theta = config.rope_theta[index]
        self.rotary_dim = int(dim * config.partial_rotary_factors[index])
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)
        self.g_proj = nn.Linear(hidden, heads, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))
        v = self.v_proj(x).unflatten(-1, heads)
        q = rotate(q, self.theta, self.rotary_dim)
        k = rotate(k, self.theta, self.rotary_dim)
        group = q.shape[-2] // k.shape[-2]
        k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) * self.head_dim**-0.5
        visible = attention_mask(x.shape[-2], self.window, x.device)
        scores = scores.masked_fill(~visible, -torch.inf)
        out = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
        out = out * self.g_proj(x).sigmoid()[..., None]
        return self.o_proj(out.flatten(-2))


class MoE(nn.Module):
    """The routed experts; the shared expert stands beside them in the layer."""

    def __init__(self, config: SimpleNamespace, index: int) -> None:
        super().__init__()
        num_experts = config.moe_num_experts
        limit = config.swiglu_limits[index] or None
        self.gate = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(num_experts))
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size, limit)
            for _ in range(num_experts)
        )
        self.top_k = config.moe_top_k
        self.renormalize = config.norm_expert_weight
        self.scale = config.moe_router_scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        weights, ids = route(
            logits, self.router_bias, self.top_k, self.renormalize, self.scale
        )
        # Every expert sees every token; what the router did not choose weighs nothing.
        weights = torch.zeros_like(logits).scatter(-1, ids, weights)
        outputs = [expert(x) for expert in self.experts]
        return torch.einsum("...e,e...h->...h", weights, torch.stack(outputs))


class DecoderLayer(nn.Module):
    def __init__(self, config: SimpleNamespace, index: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        limit = config.swiglu_limits_shared[index] or None
        self.self_attn = Attention(config, index)
        self.is_moe = str(index) in config.moe_layers_enum.split(",")
        if self.is_moe:
            self.moe = MoE(config, index)
            self.share_expert = MLP(hidden, config.share_expert_dim, limit)
        else:
            self.mlp = MLP(hidden, config.intermediate_size, limit)
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        h = self.post_attention_layernorm(x)
        if self.is_moe:
            return x + self.moe(h) + self.share_expert(h)
        return x + self.mlp(h)


class Backbone(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Step3p5(nn.Module):
    """The whole model: token ids [..., T] int64 to logits [..., T, vocab_size]."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(token_ids))


def split_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename 3-key experts, ``moe.gate_proj.*`` [E, ...], to ``moe.experts.<e>.*``."""
    split = {}
    for name, tensor in weights.items():
        prefix, found, rest = name.partition(".moe.")
        if found and rest.startswith(PROJECTIONS):
            for expert, slice_ in enumerate(tensor):
                split[f"{prefix}.moe.experts.{expert}.{rest}"] = slice_
        else:
            split[name] = tensor
    return split


def stack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``moe.experts.<e>.gate_proj.*`` to 3-key ``moe.gate_proj.*`` [E, ...]."""
    stacked: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        prefix, found, rest = name.partition(".moe.experts.")
        if found:
            expert, rest = rest.split(".", 1)
            groups[f"{prefix}.moe.{rest}"][int(expert)] = tensor
        else:
            stacked[name] = tensor
    for name, group in groups.items():
        stacked[name] = torch.stack([group[expert] for expert in range(len(group))])
    return stacked


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint as float32 under per-expert names.

    INT8 weights come back as scale * (integer - zero point), per tensor or per output
    channel. Raises ValueError for int8 without a scale.
    """
    raw: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw |= split_experts(load_file(file))
    weights = {}
    for name, tensor in raw.items():
        if name.endswith(("_scale", "_zero_point")):
            continue
        if tensor.dtype == torch.int8:
            if f"{name}_scale" not in raw:
                raise ValueError(f"{name}: int8 without {name}_scale")
            if (zero_point := raw.get(f"{name}_zero_point")) is not None:
                tensor = tensor.float() - zero_point.float().reshape(-1, 1)
            tensor = tensor * raw[f"{name}_scale"].float().reshape(-1, 1)
        weights[name] = tensor.float()
    return weights


def quantize_per_token(x: Tensor) -> Tensor:
    """Round x [..., K] to the 255 levels that symmetric INT8 gives each token."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def load(folder: Path, int8_inputs: bool = False) -> Step3p5:
    """The model of a checkpoint folder; its names must match the model's exactly.

    With ``int8_inputs`` the modules that the folder holds in INT8 also round their
    inputs per token: what a W8A8 kernel computes, but for float rounding.
    """
    config = json.loads((folder / "config.json").read_text())
    model = Step3p5(SimpleNamespace(**config))
    model.load_state_dict(read_weights(folder))
    if int8_inputs:
        for name, tensor in split_experts(load_file(folder / FILE)).items():
            if tensor.dtype == torch.int8:
                module = model.get_submodule(name.removesuffix(".weight"))
                module.register_forward_pre_hook(
                    lambda _, inputs: quantize_per_token(inputs[0])
                )
    return model.eval().requires_grad_(False)


def by_length(batch: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """The sequences of each length: their indices in the batch, and ids [n, length]."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, token_ids in enumerate(batch):
        groups[len(token_ids)].append(index)
    for indices in groups.values():
        yield indices, torch.tensor([list(batch[index]) for index in indices])


def logprobs(model: Step3p5, batch: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of each sequence's next token, [len(batch), vocab_size]."""
    last: dict[int, Tensor] = {}
    for indices, token_ids in by_length(batch):
        last.update(zip(indices, model(token_ids)[:, -1], strict=True))
    return torch.stack([last[index] for index in range(len(batch))]).log_softmax(-1)


def greedy(
    model: Step3p5, batch: Sequence[Sequence[int]], stop: int, max_tokens: int
) -> list[list[int]]:
    """What greedy decoding adds to each sequence, up to the token ``stop``."""
    added: dict[int, list[int]] = {}
    for indices, ids in by_length(batch):
        length = ids.shape[1]
        for _ in range(max_tokens):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
        for index, row in zip(indices, ids[:, length:].tolist(), strict=True):
            added[index] = row[: row.index(stop)] if stop in row else row
    return [added[index] for index in range(len(batch))]


def agreement(expected: Tensor, found: Tensor, top: int = 20) -> tuple[float, float]:
    """How far two logprobs [B, V] agree: same first token, shared part of the top."""
    first = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    in_top = [
        torch.zeros_like(logprobs).scatter(1, logprobs.topk(top).indices, 1.0)
        for logprobs in (expected, found)
    ]
    return first.item(), (in_top[0] * in_top[1]).sum(-1).mean().item() / top
