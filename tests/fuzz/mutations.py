# SPDX-License-Identifier: Apache-2.0
"""One mutation of an export's files a seed."""

import json
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.files import (
    CONFIG,
    EXPORTS,
    INDEX,
    Export,
    Files,
    make_index,
    pack,
    parse,
    read,
    unpack,
    write,
)

Mutation = Callable[[random.Random, Files], str]


def mutate(seed: int) -> tuple[Export, Files, str]:
    """The undamaged export, the damaged files, and what was done to them."""
    rng = random.Random(seed)
    export = rng.choice(EXPORTS)
    files = dict(export.files)
    mutation = rng.choice(MUTATIONS)
    done = mutation(rng, files)
    return export, files, f"{mutation.__name__}: {done}"


def _shard(rng: random.Random, files: Files) -> str:
    return rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])


# --- bytes ----------------------------------------------------------------------------


def flip_bits(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 2, 8]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)
    return f"{name} at {places}"


def flip_header_bits(rng: random.Random, files: Files) -> str:
    name = _shard(rng, files)
    data = bytearray(files[name])
    length = 8 + int.from_bytes(data[:8], "little")
    places = [rng.randrange(length) for _ in range(rng.choice([1, 1, 2]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)
    return f"{name} at {places}"


def overwrite(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    data = files[name]
    start = rng.randrange(len(data))
    count = min(rng.choice([1, 4, 64, 512]), len(data) - start)
    block = rng.choice([bytes(count), b"\xff" * count, rng.randbytes(count)])
    files[name] = data[:start] + block + data[start + count :]
    return f"{name}, {count} bytes at {start}"


def truncate(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    length = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(files[name]))])
    files[name] = files[name][:length]
    return f"{name} to {length}"


def append(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    extra = rng.choice([b"\n", b"\0", rng.randbytes(rng.randrange(1, 4096))])
    files[name] += extra
    return f"{len(extra)} bytes to {name}"


def cut_out(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    start = rng.randrange(len(files[name]))
    count = rng.choice([1, 2, 16, 256])
    files[name] = files[name][:start] + files[name][start + count :]
    return f"{name}, {count} bytes at {start}"


# --- files ----------------------------------------------------------------------------


def remove_file(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    del files[name]
    return name


def rename_file(rng: random.Random, files: Files) -> str:
    name = _shard(rng, files)
    new = rng.choice(["weights.safetensors", f"{name}.tmp", f"x-{name}"])
    files[new] = files.pop(name)
    return f"{name} to {new}"


def swap_files(rng: random.Random, files: Files) -> str:
    one, two = _shard(rng, files), rng.choice(sorted(files))
    files[one], files[two] = files[two], files[one]
    return f"{one} and {two}"


def copy_file(rng: random.Random, files: Files) -> str:
    name = _shard(rng, files)
    new = rng.choice(["model-00004-of-00004.safetensors", "copy.safetensors"])
    files[new] = files[name]
    return f"{name} to {new}"


def other_files(rng: random.Random, files: Files) -> str:
    """A shard of another export that was made alike."""
    name = _shard(rng, files)
    other = rng.choice(EXPORTS).files
    files[name] = other[rng.choice([n for n in other if n.endswith(".safetensors")])]
    return name


# --- headers --------------------------------------------------------------------------


def edit_header(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    header, payload = unpack(files[shard])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = rng.choice(
        [
            "dtype",
            "shape",
            "offsets",
            "swap",
            "drop",
            "rename",
            "form",
            "twice",
            "metadata",
        ]
    )
    done = f"{shard}, {name}, {what}"
    if what == "dtype":
        entry["dtype"] = rng.choice(
            ["I8", "U8", "BF16", "F16", "F32", "I32", "X", None]
        )
        return _repack(files, shard, header, payload, f"{done} {entry['dtype']}")
    if what == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                [],
                [-size for size in shape],
                [2**62, 4, *shape],
                [size + 1 for size in shape],
                [size // 2 for size in shape],
                [_product(shape)],
            ]
        )
        return _repack(files, shard, header, payload, f"{done} {entry['shape']}")
    if what == "offsets":
        begin, end = entry["data_offsets"]
        by = rng.choice([-8, -1, 1, 8, 64])
        entry["data_offsets"] = rng.choice(
            [
                [begin + by, end + by],
                [begin, end + by],
                [end, begin],
                [begin, begin],
                [0, end - begin],
            ]
        )
        return _repack(files, shard, header, payload, f"{done} {entry['data_offsets']}")
    if what == "swap":
        # Two of the same size: as valid as before.
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        alike = [
            key
            for key, other in header.items()
            if key not in (name, "__metadata__")
            and other["data_offsets"][1] - other["data_offsets"][0] == size
        ]
        if alike:
            other = rng.choice(alike)
            offsets = entry["data_offsets"]
            entry["data_offsets"] = header[other]["data_offsets"]
            header[other]["data_offsets"] = offsets
            done += f" with {other}"
        return _repack(files, shard, header, payload, done)
    if what == "drop":
        del header[name]
    elif what == "rename":
        new = new_name(rng, name)
        header[new] = header.pop(name)
        done += f" to {new}"
    elif what == "form":
        header[name] = rng.choice([None, [], {}, 1, "x", {"dtype": "I8"}])
    elif what == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        files[shard] = pack(text.encode(), payload)
        return done
    else:
        header["__metadata__"] = rng.choice([None, {}, {"format": "np"}, "x", {"a": 1}])
    return _repack(files, shard, header, payload, done)


def _product(shape: list[int]) -> int:
    return int(torch.tensor(shape).prod()) if shape else 1


def _repack(files: Files, shard: str, header: dict, payload: bytes, done: str) -> str:
    files[shard] = pack(header, payload)
    return done


def new_name(rng: random.Random, name: str) -> str:
    changes = [
        (".0.", ".1."),
        (".1.", ".2."),
        ("layers", "layer"),
        ("weight", "weights"),
        ("_scale", "_scales"),
        ("_scale", ""),
        ("gate_proj", "up_proj"),
        ("down_proj", "up_proj"),
        ("q_proj", "k_proj"),
        ("q_norm", "k_norm"),
        ("model.", ""),
        ("share_expert", "shared_expert"),
        ("weight", "weight_zero_point"),
        ("", "x"),
    ]
    fitting = [change for change in changes if change[0] in name]
    return name.replace(*rng.choice(fitting))


# --- the index ------------------------------------------------------------------------


def edit_index(rng: random.Random, files: Files) -> str:
    if INDEX not in files:
        [shard] = [name for name in files if name.endswith(".safetensors")]
        files[INDEX] = make_index({shard: read(files[shard])})
    index = parse(files[INDEX])
    places = index["weight_map"]
    name = rng.choice(sorted(places))
    what = rng.choice(
        ["drop", "move", "nowhere", "outside", "extra", "form", "empty", "no map"]
    )
    if what == "drop":
        del places[name]
    elif what == "move":
        places[name] = _shard(rng, files)
    elif what == "nowhere":
        places[name] = "model-00009-of-00003.safetensors"
    elif what == "outside":
        places[name] = rng.choice(["../x.safetensors", "/dev/null", ""])
    elif what == "extra":
        places[new_name(rng, name)] = places[name]
    elif what == "form":
        places[name] = rng.choice([None, 1, [], {}])
    elif what == "empty":
        index["weight_map"] = {}
    else:
        del index["weight_map"]
    files[INDEX] = json.dumps(index).encode()
    return f"{name}, {what}"


# --- tensors --------------------------------------------------------------------------


def edit_tensor(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    tensors = read(files[shard])
    kinds = [
        [name for name in tensors if name.endswith("_scale")],
        [name for name, tensor in tensors.items() if tensor.dtype == torch.int8],
        [name for name in tensors if not name.endswith("_scale")],
        list(tensors),
    ]
    name = rng.choice(rng.choice([kind for kind in kinds if kind]))
    change = rng.choice(TENSOR_CHANGES)
    tensors[name] = change(rng, tensors[name])
    files[shard] = write(tensors)
    return f"{shard}, {name}, {change.__name__}"


def remove_tensor(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    tensors = read(files[shard])
    name = rng.choice(sorted(tensors))
    del tensors[name]
    files[shard] = write(tensors)
    if INDEX in files and rng.random() < 0.5:
        index = parse(files[INDEX])
        del index["weight_map"][name]
        files[INDEX] = json.dumps(index).encode()
    return f"{name} of {shard}"


def add_tensor(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    tensors = read(files[shard])
    name = rng.choice(sorted(tensors))
    new = name.replace(".experts.0.", ".experts.3.")
    if new == name:
        new = new_name(rng, name)
    tensors[new] = rng.choice([tensors[name], tensors[name] * 0, tensors[name][:0]])
    files[shard] = write(tensors)
    if INDEX in files:
        index = parse(files[INDEX])
        index["weight_map"][new] = shard
        files[INDEX] = json.dumps(index).encode()
    return f"{new} like {name} to {shard}"


def add_zero_point(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    tensors = read(files[shard])
    name = rng.choice([name for name in tensors if name.endswith("_scale")])
    zero_point = torch.zeros(tensors[name].shape, dtype=torch.int8)
    value = rng.choice([0, 0, 1, -128])
    if zero_point.numel():
        zero_point.view(-1)[rng.randrange(zero_point.numel())] = value
    new = name.replace("_scale", "_zero_point")
    tensors[new] = zero_point
    files[shard] = write(tensors)
    if INDEX in files:
        index = parse(files[INDEX])
        index["weight_map"][new] = shard
        files[INDEX] = json.dumps(index).encode()
    return f"{new} with {value}"


def _set_one(rng: random.Random, tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def no_number(rng: random.Random, tensor: Tensor) -> Tensor:
    value = rng.choice([float("nan"), float("inf"), -float("inf")])
    return _set_one(rng, tensor, value) if tensor.is_floating_point() else tensor


def zero_one(rng: random.Random, tensor: Tensor) -> Tensor:
    return _set_one(rng, tensor, 0)


def negative(rng: random.Random, tensor: Tensor) -> Tensor:
    return _set_one(rng, tensor, -1)


def other_number(rng: random.Random, tensor: Tensor) -> Tensor:
    return _set_one(rng, tensor, rng.randrange(1, 100))


def zeros(rng: random.Random, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def reverse_rows(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.flip(0)


def transpose(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1)


def column(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor[..., None]


def first_only(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor[:1]


def without_last(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor[:-1]


def one_more(rng: random.Random, tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[-1:]])


def scalar(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.flatten()[0]


def empty(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor[:0]


def narrower(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor[..., : tensor.shape[-1] // 2]


def cast(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to(
        rng.choice(
            [torch.float16, torch.bfloat16, torch.float32, torch.float64]
            + [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]
        )
    )


TENSOR_CHANGES = [
    no_number,
    zero_one,
    negative,
    other_number,
    zeros,
    reverse_rows,
    transpose,
    column,
    first_only,
    without_last,
    one_more,
    scalar,
    empty,
    narrower,
    cast,
]


# --- the config -----------------------------------------------------------------------


def edit_config(rng: random.Random, files: Files) -> str:
    """Any value, to one of its kind or of another; or a key dropped."""
    config = parse(files[CONFIG])
    holder, key, path = _choose(rng, config)
    old = holder[key]
    choices: list[Any] = [None, "x", [], {}, -1, 0, 1.5]
    if isinstance(old, bool):
        choices = [not old] * 10 + choices
    elif isinstance(old, int):
        choices = [old + 1, old - 1, old * 2, old // 2] * 3 + choices
    elif isinstance(old, str):
        words = ["per_tensor", "per_channel", "int8", "int4", "uint8", "fp8_e4m3"]
        choices = [*words, old[:-1], f"*{old}", f"re:.*{old}"] + choices
    if rng.random() < 0.2:
        del holder[key]
        done = f"{path} dropped"
    else:
        holder[key] = rng.choice(choices)
        done = f"{path} = {holder[key]!r}"
    files[CONFIG] = json.dumps(config).encode()
    return done


def _choose(rng: random.Random, config: Any) -> tuple[Any, Any, str]:
    """A place in the config: what holds it, its key there, and its path."""
    path = ""
    while True:
        keys = list(config) if isinstance(config, dict) else list(range(len(config)))
        key = rng.choice(keys)
        path += f"/{key}"
        if not config[key] or not isinstance(config[key], dict | list):
            return config, key, path
        if rng.random() < 0.1:
            return config, key, path
        config = config[key]


def edit_quantization(rng: random.Random, files: Files) -> str:
    config = parse(files[CONFIG])
    quark = config["quantization_config"]
    what = rng.choice(["place", "place", "exclude", "none", "layer", "type"])
    done = what
    if what == "place":
        holder, key, path = _choose(rng, quark["global_quant_config"])
        holder[key] = rng.choice(
            [True, False, None, "int8", "int4", "per_tensor", "per_channel", 0, 1]
        )
        done = f"{path} = {holder[key]!r}"
    elif what == "exclude":
        entries = quark["exclude"]
        if rng.random() < 0.5:
            done = f"exclude without {entries.pop(rng.randrange(len(entries)))}"
        else:
            name = rng.choice(sorted(_module_names(files)))
            entries.append(rng.choice([name, f"*{name[-12:]}", f"re:.*{name[-9:]}"]))
            done = f"exclude with {entries[-1]}"
    elif what == "none":
        del config["quantization_config"]
    else:
        kind = "layer_quant_config" if what == "layer" else "layer_type_quant_config"
        weight = quark["global_quant_config"]["weight"] | {"qscheme": "per_tensor"}
        name = rng.choice(sorted(_module_names(files)))
        quark[kind] = {
            name if what == "layer" else "Linear": {
                **quark["global_quant_config"],
                "weight": rng.choice([weight, None]),
            }
        }
        done = f"{kind} {list(quark[kind])}"
    files[CONFIG] = json.dumps(config).encode()
    return done


def _module_names(files: Files) -> set[str]:
    return {
        tensor.rpartition(".")[0]
        for name, data in files.items()
        if name.endswith(".safetensors")
        for tensor in read(data)
    }


MUTATIONS: list[Mutation] = [
    flip_bits,
    flip_header_bits,
    flip_header_bits,
    overwrite,
    truncate,
    append,
    cut_out,
    remove_file,
    rename_file,
    swap_files,
    copy_file,
    other_files,
    edit_header,
    edit_header,
    edit_header,
    edit_index,
    edit_tensor,
    edit_tensor,
    edit_tensor,
    edit_tensor,
    remove_tensor,
    add_tensor,
    add_zero_point,
    edit_config,
    edit_config,
    edit_quantization,
    edit_quantization,
]
