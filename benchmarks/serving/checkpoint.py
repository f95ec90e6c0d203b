# SPDX-License-Identifier: Apache-2.0
"""A random Quark INT8 export with the widths of Step-3.5-Flash and few layers."""

import json
import math
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from benchmarks.serving.errors import BenchmarkError
from tests.models.step3p5_reference import Step3p5

ROOT = Path(__file__).resolve().parents[2]
# The scheme is what amd-quark wrote for the test exports.
FIXTURE = ROOT / "tests/fixtures/step3p5-tiny/int8-3key/config.json"
SHARD_BYTES = int(4.5 * 2**30)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MEAN_INT8 = 74  # root mean square of the integers from -127 to 127
SEED = 0


@dataclass(frozen=True)
class Widths:
    """Sizes of a Step-3.5; the defaults are Step-3.5-Flash's, but for its 45 layers.

    The first layer is dense, all others have experts (Step-3.5-Flash: three and 42).
    Every fourth layer, from the first on, has full attention, the others a window.
    """

    layers: int = 6
    hidden: int = 4096
    vocab: int = 128896
    dense_width: int = 11264
    experts: int = 288
    top_k: int = 8
    expert_width: int = 1280
    heads: int = 64
    sliding_heads: int = 96
    kv_heads: int = 8
    head_dim: int = 128
    sliding_window: int = 512
    context: int = 131072
    stacked: bool = True  # 3-key, or a tensor for each expert

    def is_full(self, layer: int) -> bool:
        return layer % 4 == 0


@dataclass(frozen=True)
class Spec:
    """A tensor that is to be written; its values have about this deviation."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    std: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def make_config(widths: Widths) -> dict[str, Any]:
    """config.json: attention and routed experts INT8, all else bfloat16."""
    config = json.loads(FIXTURE.read_text())
    for token in ("bos_token_id", "eos_token_id"):
        del config[token]
    layers = range(widths.layers)
    bf16 = ["lm_head"]
    for layer in layers:
        mlp = "mlp" if layer == 0 else "share_expert"
        names = ["self_attn.g_proj", *(f"{mlp}.{p}" for p in PROJECTIONS)]
        names += ["moe.gate"] if layer else []
        bf16 += [f"model.layers.{layer}.{name}" for name in names]
    config["quantization_config"]["exclude"] = sorted(bf16)
    full = [widths.is_full(layer) for layer in layers]
    attention = {"num_attention_groups": widths.kv_heads, "head_dim": widths.head_dim}
    return config | {
        "vocab_size": widths.vocab,
        "hidden_size": widths.hidden,
        "num_hidden_layers": widths.layers,
        "max_position_embeddings": widths.context,
        "max_seq_len": widths.context,
        "num_attention_heads": widths.heads,
        **attention,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": widths.sliding_heads,
            **attention,
        },
        "layer_types": [f"{'full' if x else 'sliding'}_attention" for x in full],
        "sliding_window": widths.sliding_window,
        "rope_theta": [5e6 if x else 1e4 for x in full],
        "partial_rotary_factors": [0.5 if x else 1.0 for x in full],
        "intermediate_size": widths.dense_width,
        "moe_layers_enum": ",".join(map(str, layers[1:])),
        "moe_num_experts": widths.experts,
        "moe_top_k": widths.top_k,
        "moe_intermediate_size": widths.expert_width,
        "share_expert_dim": widths.expert_width,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": [0.0] * widths.layers,
        "swiglu_limits_shared": [0.0] * widths.layers,
    }


@cache
def specs(widths: Widths) -> list[Spec]:
    """All tensors, those that the tests' reference has; the experts of a layer are
    stacked, as Step-3.5-Flash has them, unless they are not to be."""
    found = []
    config = make_config(widths)
    bf16 = config["quantization_config"]["exclude"]
    with torch.device("meta"):
        model = Step3p5(SimpleNamespace(**config))
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        layer, of_experts, rest = name.partition(".moe.experts.")
        if of_experts and widths.stacked:
            expert, _, rest = rest.partition(".")
            if expert != "0":
                continue
            name, shape = f"{layer}.moe.{rest}", (widths.experts, *shape)
        if name.endswith(".router_bias"):
            found.append(Spec(name, shape, torch.float32, 0.01))
        elif len(shape) == 1 or name == "model.embed_tokens.weight":
            found.append(Spec(name, shape, torch.bfloat16, 0.02))
        else:
            std = shape[-1] ** -0.5  # which keeps activations in range
            is_int8 = name.removesuffix(".weight") not in bf16
            dtype = torch.int8 if is_int8 else torch.bfloat16
            found.append(Spec(name, shape, dtype, std))
            if is_int8:
                found.append(Spec(f"{name}_scale", shape[:-1], torch.float32, std))
    return found


def fill(spec: Spec, generator: torch.Generator) -> Tensor:
    """The tensor, made where the generator is: int8 from -127 to 127 without zeros."""
    device = generator.device
    if spec.dtype == torch.int8:
        tensor = torch.empty(spec.shape, dtype=torch.int8, device=device)
        tensor.random_(-127, 127, generator=generator)
        return tensor.add_(tensor >= 0).cpu()
    if spec.name.endswith("_scale"):
        # From a half to one and a half of what gives the weight its deviation.
        tensor = torch.rand(spec.shape, generator=generator, device=device)
        return ((tensor + 0.5) * (spec.std / MEAN_INT8)).cpu()
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return tensor.normal_(0, spec.std, generator=generator).cpu()


Shards = dict[str, list[Spec]]


def plan(widths: Widths, shard_bytes: int) -> Shards:
    """The tensors of each file, in order; a larger tensor has one for itself."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs(widths):
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def weights_bytes(widths: Widths) -> int:
    return sum(spec.nbytes for spec in specs(widths))


def write_checkpoint(
    folder: Path, widths: Widths, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the export with a tokenizer, unless the folder holds the very same.

    One shard is in memory at a time. config.json comes last, so that what is unfinished
    is written anew.

    Raises:
        BenchmarkError: the disk has too little space; nothing is written then.
    """
    config = make_config(widths)
    config_file = folder / "config.json"
    if config_file.exists() and json.loads(config_file.read_text()) == config:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    total = weights_bytes(widths)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise BenchmarkError(
            f"{folder.parent}: the checkpoint needs {total / 2**30:.1f} GiB of disk, "
            f"found {free / 2**30:.1f} GiB: choose another place with --work, or "
            "fewer --layers"
        )
    folder.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(SEED)
    shards = plan(widths, shard_bytes)
    for file, shard in track(shards.items(), "Writing the checkpoint"):
        tensors = {spec.name: fill(spec, generator) for spec in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if device == "cuda":
        torch.cuda.empty_cache()  # the engines need the memory
    write_tokenizer(folder, widths.vocab)
    write_index(folder, widths, shards)


def write_headers(folder: Path, widths: Widths, num_shards: int) -> None:
    """The export with true headers, whose data is a hole in sparse files."""
    shards = plan(widths, -(-weights_bytes(widths) // num_shards))
    for file, shard in shards.items():
        header: dict[str, Any] = {}
        end = 0
        for spec in shard:
            offsets = [end, end := end + spec.nbytes]
            dtype = {1: "I8", 2: "BF16", 4: "F32"}[spec.dtype.itemsize]
            about = {"dtype": dtype, "shape": spec.shape, "data_offsets": offsets}
            header[spec.name] = about
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    write_index(folder, widths, shards)


def write_index(folder: Path, widths: Widths, shards: Shards) -> None:
    """The index, then config.json."""
    places = {spec.name: file for file, shard in shards.items() for spec in shard}
    size = {"total_size": weights_bytes(widths)}
    index = {"metadata": size, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.dumps(make_config(widths), indent=1) + "\n"
    (folder / "config.json").write_text(config)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A token is its id in hexadecimal: any text of N tokens is N tokens again."""
    # vLLM bounds a prompt's characters by its longest token, which here must be longer
    # than others are with the space behind them.
    unknown = "(unknown)"
    words = {unknown: 0} | {f"{token:x}": token for token in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
