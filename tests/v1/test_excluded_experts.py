# SPDX-License-Identifier: Apache-2.0
"""Through the engine on a CPU: experts that an export excludes answer as right as INT8
ones, and as those of a model that is not quantized."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.platforms import current_platform

from tests.engine import Answers, ask_each
from tests.v1.utils import BF16, EXPORT, FIXTURES, PROMPTS, TOP, assert_alike, rounding

pytestmark = [
    pytest.mark.slow,  # three engines a test
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
    ),
]
NUM_TOKENS = 6


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ask_all(folders: list[Path]) -> list[Answers]:
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    engines = [{"model": str(folder)} | options for folder in folders]
    answers = []
    for one in ask_each(engines, PROMPTS, NUM_TOKENS):
        assert not isinstance(one, str), one
        answers.append(one)
    return answers


def test_step3p5(tmp_path: Path) -> None:
    """Sigmoid scores with a bias, and in the last layer the clipped SwiGLU."""
    config = json.loads((FIXTURES / "int8-per-expert/config.json").read_text())
    weights = load_file(FIXTURES / "int8-per-expert/model.safetensors")
    bf16 = load_file(BF16 / "model.safetensors")
    exclude = config["quantization_config"]["exclude"]
    for name in [n for n in weights if ".experts." in n and n.endswith("weight")]:
        layer, expert = name.split(".experts.")
        number, projection, _ = expert.split(".")
        stacked = bf16[f"{layer}.{projection}.weight"]
        weights[name] = stacked[int(number)].contiguous()
        del weights[f"{name}_scale"]
        exclude.append(name.removesuffix(".weight"))
    excluded = write(tmp_path / "excluded", weights, config)

    found, int8, unquantized = ask_all([excluded, EXPORT, BF16])
    assert_alike(found, int8)
    assert_alike(unquantized, int8)
    # How far bfloat16 alone rounds depends on the CPU's units, so that the unquantized
    # model and one whose experts alone are not INT8 have no order between them.
    assert max(rounding(unquantized), rounding(found)) < rounding(int8)
    assert not torch.equal(found.logprobs, unquantized.logprobs)


ERNIE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}


def random_ernie() -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Weights, bfloat16 but for the router's bias; the config; the logprobs after the
    prompts by transformers in float32.

    The bias sends most tokens to other experts than without it.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("ernie4_5_moe", **ERNIE)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    weights = {}
    for name, values in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            values.copy_(torch.randn_like(values))
            weights[name] = values.clone()
        else:
            if name.endswith("gate.weight"):
                values.mul_(4)
            values.copy_(values.bfloat16())
            weights[name] = values.bfloat16()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
    stored = {"architectures": ["Ernie4_5_MoeForCausalLM"], "dtype": "bfloat16"}
    logprobs = torch.stack(logits).log_softmax(-1)
    return by_expert(weights), config.to_dict() | stored, logprobs


def by_expert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tensor a projection, as checkpoints of the model have them."""
    found = {}
    for name, values in weights.items():
        prefix, _, projection = name.rpartition(".experts.")
        if projection == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), values.chunk(2, 1), strict=True))
        elif projection == "down_proj":
            parts = {projection: values}
        else:
            found[name.replace(".gate.moe_statics.", ".moe_statics.")] = values
            continue
        for part, stacked in parts.items():
            for number, one in enumerate(stacked):
                found[f"{prefix}.experts.{number}.{part}.weight"] = one.contiguous()
    return found


def quantize(
    weights: dict[str, Tensor], config: dict[str, Any], quark: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """INT8 linear layers, one scale a channel, but for what `quark` excludes."""
    quantized = dict(weights)
    for name, values in weights.items():
        module = name.removesuffix(".weight")
        if "proj" not in module or module in quark["exclude"]:
            continue
        scale = values.float().abs().amax(1) / 127
        quantized[name] = (values / scale[:, None]).round().to(torch.int8)
        quantized[f"{name}_scale"] = scale
    return quantized, copy.deepcopy(config) | {"quantization_config": quark}


def overlap(answers: Answers, expected: Tensor) -> float:
    """Of the likeliest first tokens, the share that is among the expected ones."""
    found = answers.logprobs[:, 0].topk(TOP).indices
    wanted = expected.topk(TOP).indices
    return (found[:, :, None] == wanted[:, None]).any(-1).double().mean().item()


def test_ernie(tmp_path: Path, quark_dict) -> None:
    """Softmax scores with a bias, which stock ignores on a CPU."""
    weights, config, expected = random_ernie()
    experts = [n.removesuffix(".weight") for n in weights if ".experts." in n]
    routers = ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in (1, 2))]
    assert len(experts) == 2 * 8 * 3
    excluded, int8 = (
        quantize(weights, config, quark_dict(exclude=(*routers, *names)))
        for names in (experts, ())
    )
    folders = [
        write(tmp_path / "plain", weights, config),
        write(tmp_path / "excluded", *excluded),
        write(tmp_path / "int8", *int8),
    ]
    plain, found, of_int8 = (overlap(a, expected) for a in ask_all(folders))
    print(f"unquantized {plain:.3f}, experts excluded {found:.3f}, INT8 {of_int8:.3f}")
    assert plain > 0.96
    assert of_int8 > 0.85
    assert found > of_int8 - 0.03
