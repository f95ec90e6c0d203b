# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made to hurt whoever opens them, one set a seed."""

import json
import random
from typing import Any

from tests.fuzz.files import CONFIG, EXPORTS, INDEX, Files, pack, parse, unpack
from tests.fuzz.mutations import MUTATIONS, Mutation, _choose, _shard

NAMES = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 100_000,
    "\x1b[2J\x1b]0;title\x07",
    "\r\n\t\x00\x7f\x9b",
    "\u202egnp.exe",
    "\udc80\ud800",
    "[bold red]markup[/]",
    "model.layers.99999999999999999999.mlp",
    "model.layers.2.moe.experts.-1.up_proj",
    "__metadata__",
    "%s%n{0.__class__}",
]
NUMBERS: list[Any] = [
    *(0, -1, 1 << 31, 1 << 63, 10**30, 10**4000, 1e308, -1e-308),
    *(float("nan"), float("inf"), True, None),
]
PATTERNS = [
    "re:(a+)+$",
    "re:(model|model.)*(layers|layers.)*x",
    "re:(.*)*(.*)*(.*)*y",
    "re:(" * 90,
    "re:[",
    "re:(?P<x>a)(?P=x){9999999}",
    "*" * 50 + "z",
    "[" * 500,
    "?" * 2000,
]


def _texts(rng: random.Random) -> Any:
    return rng.choice([rng.choice(NAMES), rng.choice(PATTERNS), "x" * 2000])


def _anything(rng: random.Random) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return _texts(rng)
    if kind == 2:
        return [_texts(rng) for _ in range(rng.choice([0, 1, 3000]))]
    if kind == 3:
        return [rng.choice(NUMBERS)] * rng.choice([1, 20_000])
    if kind == 4:
        return {str(index): None for index in range(rng.choice([0, 1, 20_000]))}
    nested: Any = rng.choice([{}, 1, "x"])
    for _ in range(rng.choice([1, 5, 200])):
        nested = [nested] if kind == 5 else {"weight": nested}
    return nested


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def hostile_config(rng: random.Random, files: Files) -> str:
    """Any value of config.json, for another of any kind."""
    config = parse(files[CONFIG])
    holder = config if rng.random() < 0.3 else config["quantization_config"]
    holder, key, path = _choose(rng, holder)
    holder[key] = _anything(rng)
    files[CONFIG] = _dump(config)
    return f"{path} = {holder[key]!r:.60}"


def hostile_exclude(rng: random.Random, files: Files) -> str:
    config = parse(files[CONFIG])
    quark = config["quantization_config"]
    if rng.random() < 0.7:
        entries = [_texts(rng) for _ in range(rng.choice([1, 1, 5, 300]))]
        quark["exclude"] = quark["exclude"] + entries
    else:
        entries = [_texts(rng)]
        layer = quark["global_quant_config"]
        quark["layer_quant_config"] = {entries[0]: rng.choice([layer, {}, None, []])}
    files[CONFIG] = _dump(config)
    return f"{len(entries)} entries, {entries[0]!r:.60}"


def hostile_names(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    header, payload = unpack(files[shard])
    name = rng.choice(sorted(header))
    new = rng.choice([rng.choice(NAMES), f"{name}{rng.choice(NAMES)}"])
    header[new] = header.pop(name)
    if INDEX in files and rng.random() < 0.5:
        index = parse(files[INDEX])
        index["weight_map"][new] = index["weight_map"].pop(name, shard)
        files[INDEX] = _dump(index)
    files[shard] = pack(header, payload)
    return f"{name} is {new!r:.60}"


def hostile_header(rng: random.Random, files: Files) -> str:
    """Sizes and offsets beyond everything; a header that is none."""
    shard = _shard(rng, files)
    header, payload = unpack(files[shard])
    if rng.random() < 0.7:
        holder, key, path = _choose(rng, header)
        holder[key] = _anything(rng)
        files[shard] = pack(header, payload)
        return f"{shard}, {path} = {holder[key]!r:.60}"
    depth = rng.choice([100, 100_000])
    bombs = [
        b"[" * depth,
        b'{"a":' * depth,
        b'{"__metadata__":' + b'"' + b"x" * 1_000_000 + b'"}',
        b"{" + b",".join(b'"a":1' for _ in range(depth)) + b"}",
        b'{"a":[' + b"0," * depth + b"0]}",
        b'{"a":' + b"9" * depth + b"}",
        b"\xff\xfe" * depth,
        b"",
    ]
    files[shard] = pack(rng.choice(bombs), payload)
    return f"{shard}, a bomb of {depth}"


def hostile_length(rng: random.Random, files: Files) -> str:
    shard = _shard(rng, files)
    length = rng.choice([1 << 63, (1 << 64) - 1, 100_000_000, 100_000_001, 0])
    files[shard] = length.to_bytes(8, "little") + files[shard][8:]
    return f"{shard} with a header of {length}"


def hostile_index(rng: random.Random, files: Files) -> str:
    weight_map = _anything(rng)
    files[INDEX] = _dump({"weight_map": weight_map})
    return f"weight_map {weight_map!r:.60}"


def several(rng: random.Random, files: Files) -> str:
    done = []
    for _ in range(rng.choice([2, 3, 5])):
        try:
            done.append(rng.choice(ALL)(rng, files))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # there is nothing left to damage in that way
    return "; ".join(done)


HOSTILE: list[Mutation] = [
    *(hostile_config, hostile_config, hostile_config, hostile_exclude),
    *(hostile_names, hostile_header, hostile_length, hostile_index),
]
ALL: list[Mutation] = [*HOSTILE, *HOSTILE, *MUTATIONS]


def mutate(seed: int) -> tuple[Files, str]:
    """The files, and what was done to them."""
    rng = random.Random(f"hostile {seed}")
    files = dict(rng.choice(EXPORTS).files)
    mutation = rng.choice([*ALL, *[several] * 20])
    return files, f"{mutation.__name__}: {mutation(rng, files)}"
