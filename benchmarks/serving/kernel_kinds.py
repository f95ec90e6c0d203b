# SPDX-License-Identifier: Apache-2.0
"""Where a step's GPU time goes, by kind of kernel, read from a torch trace."""

import re
from collections import defaultdict
from typing import Any

TOP = 15
# The part of a step that vLLM names so holds the logits and the sampler: their product
# is a library's, like any other.
HEAD_SCOPES = ("gpu_model_runner: postprocess", "gpu_model_runner: sample")
HEAD = "lm_head and sampling"
OTHER = "other"
NORMS = "norms and elementwise"
# The first that matches a kernel's name.
KINDS = [
    # What torch.compile makes; the names list operators around it too.
    (NORMS, r"^triton_(poi|red|per)_|^qk_norm_rope_|^gate_and_quantize_"),
    (
        "INT8 MoE",
        r"^(w13|w2)_(few_|narrow_)?kernel|^(prepare|count|scan|align)_kernel"
        r"|^quantize_pairs_kernel|^sum_topk_kernel|fused_moe_kernel|moe_align_block"
        r"|count_and_sort_expert|moe_sum|act_and_mul|swiglustep|_per_token_quant_int8",
    ),
    (
        "MoE routing",
        r"(?i)topk_?gating|topk_?sigmoid|topk_?softmax|grouped_topk|moe_?topk|moe_?sigmoid",
    ),
    (
        "attention",
        r"(?i)flash|reshape_and_cache|unified_attention|rotary|merge_attn|fmha"
        r"|prepare_varlen",
    ),
    (
        "other linear layers",
        r"(?i)gemm|int8_linear|^router_|^split_weight_|nvjet|cutlass|cublas|splitk|wgmma|gemv|scaled_int8_quant|xmma",
    ),
    ("sampling", r"(?i)sampl|softmax|exponential|argmax|multinomial|top_?[kp]_"),
    (
        NORMS,
        r"(?i)norm|elementwise|reduce|vectorized|fill|copy|cat|index|mem(cpy|set)",
    ),
]
ORDER = [
    "INT8 MoE",
    "MoE routing",
    "attention",
    "other linear layers",
    NORMS,
    HEAD,
    OTHER,
]


def kind(name: str, in_head: bool) -> str:
    """The kind of a kernel, by its name and by where in a step it ran."""
    found = next((kind for kind, names in KINDS if re.search(names, name)), OTHER)
    return HEAD if in_head or found == "sampling" else found


def summarize(trace: dict[str, Any], steps: int) -> dict[str, Any]:
    """Microseconds a step and calls, by kind and for the kernels that take most.

    A kernel that begins before another has ended counts from there on: the GPU is busy
    once. Those of programmatic dependent launch wait for the one before as they begin.

    Args:
        trace: as `torch.profiler` exports it: events with `cat`, `name`, `tid`, and
            `ts` and `dur` in microseconds; a kernel and the call that launched it have
            the same `correlation`.
        steps: how many steps it holds.

    Returns:
        `{"gpu_us", "kinds": {kind: {"us", "share"}}, "kernels": [{"name", "kind", "us",
        "calls"}]}`; gpu_us is the sum, in which the GPU runs a kernel, copies or fills.

    Raises:
        ValueError: the trace holds no kernel.
    """
    events = [event for event in trace["traceEvents"] if "dur" in event]
    head = [
        (event["tid"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in HEAD_SCOPES
    ]
    from_head = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(t == event["tid"] and a <= event["ts"] < b for t, a, b in head)
    }
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    on_gpu = [
        e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    until = 0.0
    for event in sorted(on_gpu, key=lambda event: event["ts"]):
        in_head = event["args"].get("correlation") in from_head
        end = event["ts"] + event["dur"]
        spent = max(0.0, end - max(event["ts"], until))
        times[event["name"], kind(event["name"], in_head)].append(spent)
        until = max(until, end)
    if not times:
        raise ValueError("the profiler saw no kernel")
    total = sum(map(sum, times.values()))
    kinds = dict.fromkeys(ORDER, 0.0)
    for (_, found), spent in times.items():
        kinds[found] += sum(spent)
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "gpu_us": round(total / steps, 1),
        "kinds": {
            name: {"us": round(us / steps, 1), "share": round(us / total, 4)}
            for name, us in kinds.items()
        },
        "kernels": [
            {
                "name": name[:120],
                "kind": found,
                "us": round(sum(spent) / steps, 1),
                "calls": round(len(spent) / steps, 2),
            }
            for (name, found), spent in most
        ],
    }
