# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What comes of schemes, and of how scales and zero points are stored."""

from collections.abc import Iterator

from ..findings import finding
from ..known import Int8, Known
from ..releases import FORK, FORK_GPU, Scope, fact, on
from ..rules import is_static, part_of
from ..weights import COMPANIONS, INPUT_ZERO_POINT, SCALE, ZERO_POINT
from .issue import Issue


def scheme_issues(int8: list[Int8], scope: Scope, but: set[str]) -> Iterator[Issue]:
    static_channels, tensor_scales, asymmetric = [], [], []
    for each in int8:
        weight = part_of(each.config, "weight")
        inputs = part_of(each.config, "input_tensors")
        static = is_static(each.config)
        per_channel = weight.get("qscheme") == "per_channel"
        if each.is_experts and static and per_channel:
            static_channels.append(each.name)
        if each.is_experts and not static and not per_channel:
            tensor_scales.append(each.name)
        is_asymmetric = static and inputs.get("symmetric") is False
        is_stored = INPUT_ZERO_POINT in each.stored.companions
        if each.is_experts and is_asymmetric and is_stored:
            asymmetric.append(f"{each.name}.{INPUT_ZERO_POINT}")
    experts = [each.name for each in int8 if each.is_experts]
    floats = scope.without("expert-int8-activations", but)
    # Of many releases it is no news.
    if experts and scope.is_one and floats:
        yield _float_activations(floats[0], experts)
    old = scope.without("expert-tensor-scales", but)
    if tensor_scales and old:
        yield Issue(
            finding(
                "expert-tensor-scales",
                "garbage",
                "experts with one scale a tensor and activations per token",
                f"vLLM {scope.listed(old)} gives every expert the first expert's "
                "scale, on GPUs, without a word: garbage.",
                f"{fact('expert-tensor-scales').remedy}this fork: patch 0009 gives "
                "each expert its own",
                tensor_scales,
            ),
            on(old, "garbage"),
        )
    old = scope.without("expert-static-refusal", but)
    if static_channels and (old or scope.has_fork):
        kernel = (
            f"The Triton kernel of vLLM {scope.listed(old)} takes scales of other "
            "channels: garbage. "
        )
        yield Issue(
            finding(
                "expert-static-channels",
                "garbage",
                "experts with one scale a channel and static activations",
                (kernel if old else "")
                + "This fork refuses it on GPUs (patch 0028) but Hopper (patch 0012), "
                "and computes it there and on CPUs (patch 0007).",
                "export with dynamic activations or per-tensor weights, or run this "
                "fork on a Hopper GPU or a CPU",
                static_channels,
            ),
            on(old, "garbage") | on([FORK_GPU], "refused"),
        )
    if asymmetric:
        yield Issue(
            finding(
                "expert-zero-points",
                "garbage",
                "experts with static, asymmetric activations",
                "INT8 kernels ignore the zero points of activations of experts. Unless "
                "all are 0, which --deep tells, answers are wrong; this fork (patch "
                "0010) refuses such a checkpoint.",
                "export the checkpoint again with symmetric activations",
                asymmetric,
            ),
            on(scope.stock(), "garbage") | on(FORK, "refused"),
        )


def _float_activations(release: str, experts: list[str]) -> Issue:
    return Issue(
        finding(
            "expert-float-activations",
            "note",
            f"vLLM {release} does not quantize the activations of experts",
            "It multiplies INT8 weights with them in the model's dtype: no answer is "
            "wrong for that, and INT8 would be faster.",
            "nothing to do; another release or this fork, to be faster",
            experts,
        ),
        {},
    )


def storage_issues(known: Known, but: set[str]) -> Iterator[Issue]:
    linear: list[str] = []
    experts: list[str] = []
    vectors, zero_points = [], []
    for each in known.int8:
        per_channel = part_of(each.config, "weight").get("qscheme") == "per_channel"
        rank = len(each.stored.weight.shape) - 1  # of a vector of scales
        for suffix in COMPANIONS[:2]:
            tensor = each.stored.companions.get(suffix)
            if tensor is None or not per_channel:
                continue
            if len(tensor.shape) == rank + 1 and tensor.shape[-1] == 1:
                (experts if each.is_experts else linear).append(tensor.name)
            elif each.is_experts and suffix == SCALE:
                vectors.append(tensor.name)
        if ZERO_POINT in each.stored.companions:
            zero_points.append(each.stored.companions[ZERO_POINT].name)
    scope = known.scope
    old = scope.without("linear-columns", but)
    if linear and old:
        yield Issue(
            finding(
                "scale-columns",
                "refused",
                "scales of linear layers stored as columns [N, 1]",
                f"vLLM {scope.listed(old)} expects [N] and ends with an assertion that "
                "names nothing.",
                f"{fact('linear-columns').remedy}this fork: patch 0001; or store them "
                "as [N] (--fix does)",
                linear,
            ),
            on(old, "refused"),
        )
    old = scope.without("stored-expert-columns", but)
    if experts and old:
        yield Issue(
            finding(
                "expert-scale-columns",
                "refused",
                "scales of experts stored as columns [N, 1]",
                f"vLLM {scope.listed(old)} ends with a RuntimeError while it loads "
                "them.",
                "this fork: patch 0010; or store them as [N] (--fix does)",
                experts,
            ),
            on(old, "refused"),
        )
    old = scope.without("expert-columns", but)
    if vectors and old:
        yield Issue(
            finding(
                "expert-scale-vectors",
                "note",
                "scales of experts are vectors [N], as Quark writes them",
                f"vLLM {scope.listed(old)} hands them to its kernels as [E, N], later "
                "ones and this fork (patch 0002) as [E, N, 1]. The Triton kernel reads "
                "the same numbers from both.",
                "nothing to do",
                vectors,
            ),
            {},
        )
    if zero_points:
        yield Issue(
            finding(
                "zero-points-stored",
                "note",
                "zero points are stored beside symmetric weights",
                "INT8 kernels ignore them. They change nothing if all are 0, which "
                "--deep tells; this fork (patch 0010) looks before it loads.",
                "nothing to do if --deep finds them 0",
                zero_points,
            ),
            {},
        )
    cache = _key_value_cache(known)
    if cache:
        yield Issue(
            finding(
                "key-value-cache",
                "note",
                "scales of a quantized key/value cache",
                "They are used where the cache is kept in that format "
                "(--kv-cache-dtype fp8), and change nothing elsewhere.",
                "nothing to do",
                cache,
            ),
            {},
        )


def _key_value_cache(known: Known) -> list[str]:
    return [name for name in known.export.tensors if name.endswith(".output_scale")]
