# SPDX-License-Identifier: Apache-2.0
"""The plain-torch Step-3.5 and the small checkpoints that rest on it."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fixtures import addition
from tests.fixtures.step3p5_tiny import EOS_ID
from tests.fixtures.train_step3p5 import training_pairs
from tests.models import step3p5_reference as reference
from tests.models.step3p5_reference import Step3p5

FIXTURES = Path(__file__).parents[1] / "fixtures" / "step3p5-tiny"
BF16 = FIXTURES / "bf16"
INT8_EXPORTS = ("int8-3key", "int8-per-expert")
pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = addition.held_out(200)
PROMPTS = [addition.encode(addition.question(*pair)) for pair in QUESTIONS]
# Mean difference of the 20 likeliest tokens' log probabilities that INT8 stays below
# and a model without one of its parts does not.
INT8_DIFFERENCE = 0.03


@pytest.fixture(scope="module")
def bf16_logprobs(one_thread: None) -> Tensor:
    return reference.logprobs(reference.load(BF16), PROMPTS)


# The parts, on cases worked out by hand.


def test_rms_norm_is_zero_centred():
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    expected = torch.tensor([3.0, 8.0]) / math.sqrt(12.5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.0), expected)
    # With epsilon as large as the mean square the norm halves its square.
    expected = torch.tensor([3.0, 8.0]) / 5.0
    torch.testing.assert_close(reference.rms_norm(x, weight, 12.5), expected)


def test_rotate_turns_pairs_half_a_rotary_dim_apart():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).expand(3, 1, 6)
    found = reference.rotate(x, theta=100.0, rotary_dim=4)[2, 0]
    # A token turns channels (0, 2) by 1 and (1, 3) by 100 ** -0.5; this is token 2.
    fast, slow = 2.0, 0.2
    expected = [
        1 * math.cos(fast) - 3 * math.sin(fast),
        2 * math.cos(slow) - 4 * math.sin(slow),
        3 * math.cos(fast) + 1 * math.sin(fast),
        4 * math.cos(slow) + 2 * math.sin(slow),
        5.0,
        6.0,
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_attention_mask():
    full = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    sliding = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert reference.attention_mask(4, None).int().tolist() == full
    assert reference.attention_mask(4, 2).int().tolist() == sliding


def test_swiglu_clips_the_activated_gate_and_both_sides_of_up():
    gate, up = (
        torch.tensor([20.0, 20.0, 0.0, 7.0]),
        torch.tensor([30.0, -30.0, 9.0, 1.0]),
    )
    silu_7 = 7 / (1 + math.exp(-7))
    expected = torch.tensor([49.0, -49.0, 0.0, silu_7])
    torch.testing.assert_close(reference.swiglu(gate, up, 7.0), expected)
    expected = torch.tensor([600.0, -600.0, 0.0, silu_7])
    torch.testing.assert_close(reference.swiglu(gate, up, None), expected)


@pytest.mark.parametrize("renormalize", [True, False])
def test_router_bias_chooses_but_does_not_weigh(renormalize: bool):
    scores = torch.tensor([[0.9, 0.8, 0.3, 0.2]])
    bias = torch.tensor([0.0, -0.7, 0.3, 0.9])  # biased: 0.9, 0.1, 0.6, 1.1
    weights, ids = reference.route(scores.logit(), bias, 2, renormalize, scale=2.5)
    chosen = torch.tensor([[0.2, 0.9]]) / (1.1 if renormalize else 1.0)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, chosen * 2.5)


def test_quantize_per_token_scales_each_token_by_its_largest_channel():
    x = torch.tensor([[127.0, 0.6, -3.4], [1.27, 0.006, -0.034]])
    expected = torch.tensor([[127.0, 1.0, -3.0], [1.27, 0.01, -0.03]])
    torch.testing.assert_close(reference.quantize_per_token(x), expected)


# Reading checkpoints.


def write_weights(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder


def test_read_weights_dequantizes_both_layouts_alike(tmp_path: Path):
    integers = torch.randint(-128, 128, (3, 4, 5), dtype=torch.int8)
    scales = torch.rand(3, 4)
    stacked = {"moe.up_proj.weight": integers, "moe.up_proj.weight_scale": scales}
    expected = integers * scales[..., None]
    found = reference.read_weights(
        write_weights(tmp_path, {f"l.{name}": t for name, t in stacked.items()})
    )
    assert list(found) == [f"l.moe.experts.{e}.up_proj.weight" for e in range(3)]
    assert all(
        torch.equal(weight, row)
        for weight, row in zip(found.values(), expected, strict=True)
    )


@pytest.mark.parametrize("per_tensor", [False, True])
def test_read_weights_subtracts_zero_points(tmp_path: Path, per_tensor: bool):
    shape = () if per_tensor else (2,)
    weights = {
        "w.weight": torch.tensor([[1, -2], [127, -128]], dtype=torch.int8),
        "w.weight_scale": torch.full(shape, 0.5),
        "w.weight_zero_point": torch.full(shape, 3, dtype=torch.int8),
    }
    found = reference.read_weights(write_weights(tmp_path, weights))
    assert found["w.weight"].tolist() == [[-1.0, -2.5], [62.0, -65.5]]
    assert list(found) == ["w.weight"]


def test_read_weights_refuses_int8_without_a_scale(tmp_path: Path):
    weights = {"w.weight": torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(ValueError, match="w.weight: int8 without w.weight_scale"):
        reference.read_weights(write_weights(tmp_path, weights))


# The whole model.


def test_matches_transformers():
    """transformers has the same text model, written by others, in Step-3.7."""
    pytest.importorskip(
        "transformers.models.step3p7", reason="needs transformers with Step-3.7"
    )
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    config = transformers_config(json.loads((BF16 / "config.json").read_text()))
    config["attn_implementation"] = "eager"
    theirs = Step3p7TextModel(Step3p7TextConfig(**config)).eval()
    theirs.load_state_dict(transformers_weights(reference.read_weights(BF16)))
    ours = reference.load(BF16).model
    for token_ids in map(torch.tensor, PROMPTS[:8]):
        with torch.no_grad():
            expected = theirs(token_ids[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(ours(token_ids), expected, rtol=1e-4, atol=1e-4)


def transformers_config(config: dict) -> dict:
    """The same settings under their names; they read most of the hub's names too."""
    unread = ("architectures", "model_type", "torch_dtype", "max_seq_len")
    return {name: value for name, value in config.items() if name not in unread} | {
        "num_key_value_heads": config["num_attention_groups"],
        "n_routed_experts": config["moe_num_experts"],
        "num_experts_per_tok": config["moe_top_k"],
    }


def transformers_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names; experts stacked, gate and up projections one after the other."""
    renamed: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        if not name.startswith("model."):
            continue
        name = name.removeprefix("model.")
        name = name.replace(".share_expert.", ".mlp.shared_experts.")
        name = name.replace(".moe.router_bias", ".mlp.gate.e_score_correction_bias")
        name = name.replace(".moe.", ".mlp.")
        stacked = re.sub(r"\.experts\.\d+\.(\w+)\.weight$", r".experts.\1", name)
        if stacked == name:
            renamed[name] = weight
        else:
            experts.setdefault(stacked, []).append(weight)
    for name, slices in experts.items():
        if name.endswith(".gate_proj"):
            up = torch.stack(experts[name.replace(".gate_proj", ".up_proj")])
            fused = torch.cat((torch.stack(slices), up), dim=1)
            renamed[name.replace(".gate_proj", ".gate_up_proj")] = fused
        elif name.endswith(".down_proj"):
            renamed[name] = torch.stack(slices)
    return renamed


# The small checkpoints.


@pytest.mark.parametrize("folder", INT8_EXPORTS)
def test_exclude_names_what_the_export_left_in_bfloat16(folder: str):
    config = json.loads((FIXTURES / folder / "config.json").read_text())
    weights = load_file(FIXTURES / folder / "model.safetensors")
    linear = {
        name.removesuffix(".weight"): weight.dtype
        for name, weight in weights.items()
        if weight.dim() > 1 and "embed_tokens" not in name
    }
    excluded = config["quantization_config"]["exclude"]
    assert "model.layers.2.share_expert.gate_proj" in excluded
    assert sorted(excluded) == sorted(
        name for name, dtype in linear.items() if dtype == torch.bfloat16
    )
    for name, dtype in linear.items():
        if dtype == torch.int8:
            weight, scale = weights[f"{name}.weight"], weights[f"{name}.weight_scale"]
            assert scale.dtype == torch.float32
            assert scale.shape == weight.shape[:-1]


def test_layouts_hold_the_same_numbers():
    three_key, per_expert = (
        reference.read_weights(FIXTURES / folder) for folder in INT8_EXPORTS
    )
    with safe_open(FIXTURES / "int8-3key" / "model.safetensors", "pt") as file:
        assert "model.layers.2.moe.gate_proj.weight" in file.keys()  # noqa: SIM118
    with safe_open(FIXTURES / "int8-per-expert" / "model.safetensors", "pt") as file:
        assert "model.layers.2.moe.experts.15.gate_proj.weight" in file.keys()  # noqa: SIM118
    assert three_key.keys() == per_expert.keys()
    for name, weight in three_key.items():
        assert torch.equal(weight, per_expert[name]), name


def test_questions_were_held_out_of_training():
    trained_on = set(training_pairs())
    assert len(trained_on) == 1000**2 - 1000
    assert trained_on.isdisjoint(addition.held_out())
    assert len(set(addition.held_out())) == 1000


def test_exact_match_counts_whole_answers():
    pairs = [(1, 2), (10, 990), (0, 0), (999, 999)]
    assert addition.question(10, 990) == "10+990="
    assert addition.exact_match(pairs, ["3", "1000", "0", "1998"]) == 1.0
    assert addition.exact_match(pairs, ["3 ", "100", "", "1998"]) == 0.25


def test_greedy_stops_and_keeps_order():
    """A model that says what follows the last token in value, and stops after 5."""

    def model(ids: Tensor) -> Tensor:
        return torch.eye(8)[(ids + 1) % 8]

    batch = [[1], [0, 3], [2], [7]]
    found = reference.greedy(model, batch, stop=5, max_tokens=3)  # type: ignore[arg-type]
    assert found == [[2, 3, 4], [4], [3, 4], [0, 1, 2]]


def exact_match(model: Step3p5) -> float:
    answers = reference.greedy(model, PROMPTS, EOS_ID, max_tokens=5)
    return addition.exact_match(QUESTIONS, [addition.decode(ids) for ids in answers])


def difference(expected: Tensor, found: Tensor) -> float:
    """Mean |d logprob| of the 20 likeliest tokens."""
    likeliest = expected.topk(20).indices
    return (found - expected).abs().gather(1, likeliest).mean().item()


def test_the_model_adds(bf16_logprobs: Tensor):
    assert exact_match(reference.load(BF16)) >= 0.97
    first = [ord(addition.answer(*pair)[0]) for pair in QUESTIONS]
    assert bf16_logprobs.argmax(-1).tolist() == first
    best, second = bf16_logprobs.topk(2).values.T
    assert (best - second).min() > 1.0


@pytest.mark.parametrize("int8_inputs", [False, True])
def test_int8_agrees_with_bf16(bf16_logprobs: Tensor, int8_inputs: bool):
    model = reference.load(FIXTURES / "int8-3key", int8_inputs)
    found = reference.logprobs(model, PROMPTS)
    assert not torch.equal(found, bf16_logprobs)
    first, top_20 = reference.agreement(bf16_logprobs, found)
    assert first == 1.0
    assert top_20 >= 0.98
    assert difference(bf16_logprobs, found) < INT8_DIFFERENCE
    assert abs(exact_match(model) - exact_match(reference.load(BF16))) <= 0.01


def test_int8_inputs_are_rounded_for_int8_modules_alone():
    model = reference.load(FIXTURES / "int8-per-expert", int8_inputs=True)
    x = torch.randn(3, 128)
    rounded = reference.quantize_per_token(x)
    attention = model.get_submodule("model.layers.2.self_attn")
    for name, inputs in (("q_proj", rounded), ("g_proj", x)):  # g_proj is excluded
        linear = attention.get_submodule(name)
        expected = inputs @ linear.get_parameter("weight").T
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


def zeroed(pattern: str) -> Callable[[], Step3p5]:
    def load() -> Step3p5:
        model = reference.load(BF16)
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                parameter.zero_()
        return model

    return load


def configured(**changes: object) -> Callable[[], Step3p5]:
    def load() -> Step3p5:
        config = json.loads((BF16 / "config.json").read_text()) | changes
        model = Step3p5(SimpleNamespace(**config))
        model.load_state_dict(reference.read_weights(BF16))
        return model.eval().requires_grad_(False)

    return load


BROKEN = {
    "attention": zeroed(r"o_proj"),
    "head gate": zeroed(r"g_proj"),
    "dense": zeroed(r"\.mlp\."),
    "routed experts": zeroed(r"\.experts\."),
    "router bias": zeroed(r"router_bias"),
    "shared expert": zeroed(r"share_expert\.(gate|up)_proj"),
    "query norm": zeroed(r"q_norm"),
    "window": configured(sliding_window=1024),
    "rotary": configured(partial_rotary_factors=[1.0] * 4),
    "theta": configured(rope_theta=[10000.0] * 4),
    "routed limit": configured(swiglu_limits=[0.0] * 4),
    "shared limit": configured(swiglu_limits_shared=[0.0] * 4),
    "router scale": configured(moe_router_scaling_factor=1.0),
    "renormalize": configured(norm_expert_weight=False),
}


@pytest.mark.parametrize("part", BROKEN)
def test_no_part_can_be_lost_unnoticed(part: str, bf16_logprobs: Tensor):
    found = reference.logprobs(BROKEN[part](), PROMPTS)
    assert difference(bf16_logprobs, found) > INT8_DIFFERENCE
