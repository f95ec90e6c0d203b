# SPDX-License-Identifier: Apache-2.0
"""The stress run of `make stress`: short, against the engine; and against servers that
have one fault each, which it is to see."""

import asyncio
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from vllm.platforms import current_platform

from benchmarks.serving.report import save
from tests.fixtures import addition
from tests.server import ServerError, serve
from tests.stress import stress_serving
from tests.stress.requests import (
    CHAT,
    COMPLETIONS,
    Mix,
    Reply,
    clear_sums,
    expect_refusal,
)
from tests.stress.stress_serving import (
    EXPORT,
    MIB,
    Memory,
    Run,
    Sample,
    Tally,
    failures,
    figures,
    measure,
    parse_args,
    stress,
)

pytestmark = pytest.mark.slow

SECONDS, IN_FLIGHT, MAX_MODEL_LEN = 1.0, 8, 48
PAIRS = addition.held_out(50)
# All that the requests to be refused are to be told.
REASONS = (
    f"maximum context length is {MAX_MODEL_LEN}; JSON object required; out of "
    "vocabulary; greater than or equal; less than or equal; max_tokens must be at "
    "least 1; n must be at most; n must be at least 1; n must be 1; valid number; "
    "valid integer; temperature; top_p; logprobs; stop cannot contain an empty string; "
    "out-of-vocab; stream; not exist; application/json; prompt cannot be empty"
)


class Fake:
    """Adds as the model does, refuses as vLLM does, but for one fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.requests = 0

    def faulty(self, fault: str) -> bool:
        """Whether to be so now: one time in ten."""
        self.requests += self.fault == fault
        return self.fault == fault and self.requests % 10 == 0

    async def metrics(self, request: web.Request) -> web.Response:
        used = 0.25 if self.fault == "leaks blocks" else 0.0
        waiting = 1 if self.fault == "forgets a request" else 0
        rows = [
            f'vllm:kv_cache_usage_perc{{engine="0"}} {used}',
            'vllm:num_requests_running{engine="0"} 0.0',
            f'vllm:num_requests_waiting{{engine="0"}} {waiting}',
        ]
        if self.fault == "has no metrics":
            rows = []
        return web.Response(text="\n".join(rows) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        kind = request.headers["X-Request-Id"].split("-")[0]
        body = await request.read()
        if kind in ("oversized", "malformed", "empty"):
            return await self.refuse(request, kind, body)
        asked = json.loads(body)
        if self.faulty("hangs"):
            await asyncio.sleep(60)
        if self.faulty("fails"):
            return web.json_response({"error": {"message": "no"}}, status=500)
        texts, tokens = self.generate(kind, asked)
        if self.faulty("adds wrong"):
            texts[-1] = texts[-1][:-1] + "x"
        if self.faulty("loses a choice"):
            texts = texts[:-1]
        if self.faulty("counts wrong"):
            tokens += 1
        whole = not asked.get("ignore_eos") and asked["max_tokens"] == 8
        reason = "stop" if whole else "length"
        usage = {"completion_tokens": tokens}
        chat = request.path == CHAT
        if asked.get("stream"):
            return await self.stream(request, texts, reason, usage, chat)
        choices = []
        for index, text in enumerate(texts):
            said = {"message": {"content": text}} if chat else {"text": text}
            choices.append({"index": index, "finish_reason": reason, **said})
        return web.json_response({"choices": choices, "usage": usage})

    def generate(self, kind: str, asked: dict[str, Any]) -> tuple[list[str], int]:
        """Texts of all choices, tokens in all."""
        if "messages" in asked:
            prompts = [asked["messages"][0]["content"]]
        elif isinstance(asked["prompt"], str) or isinstance(asked["prompt"][0], int):
            prompts = [asked["prompt"]]
        else:
            prompts = asked["prompt"]
        texts, tokens = [], 0
        for prompt in prompts:
            question = prompt if isinstance(prompt, str) else addition.decode(prompt)
            if asked.get("ignore_eos"):
                # After noise anything may come.
                known = kind == "long" and question.count("+") == 1
                first, _, second = question.rstrip("=").partition("+")
                known = known and first.isdigit() and second.isdigit()
                text = addition.answer(int(first), int(second)) if known else ""
                text = (text + "7" * asked["max_tokens"])[: asked["max_tokens"]]
                count = len(text)
            else:
                first, second = question.rstrip("=").split("+")
                text = addition.answer(int(first), int(second))
                count = min(len(text) + 1, asked["max_tokens"])
                text = text[:count]
                for stop in asked.get("stop", []):
                    if stop in text:
                        text = text.partition(stop)[0]
                        count = len(text) + 1
            texts += [text] * asked.get("n", 1)
            tokens += count * asked.get("n", 1)
        return texts, tokens

    async def stream(
        self,
        request: web.Request,
        texts: list[str],
        reason: str,
        usage: dict[str, int],
        chat: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        parts: list[Any] = []
        for index, text in enumerate(texts):
            for letter in text:
                said = {"delta": {"content": letter}} if chat else {"text": letter}
                parts.append({"choices": [{"index": index, **said}]})
            end = {"index": index, "text": "", "finish_reason": reason}
            parts.append({"choices": [end]})
        if self.faulty("fails in the stream"):
            parts = [*parts[:1], {"error": {"message": "no", "code": 500}}]
        parts.append({"choices": [], "usage": usage})
        for part in parts:
            try:
                await response.write(b"data: " + json.dumps(part).encode() + b"\n\n")
            except ConnectionError:
                return response
            await asyncio.sleep(0)
        if not self.faulty("never says that it is done"):
            await response.write(b"data: [DONE]\n\n")
        return response

    async def refuse(
        self, request: web.Request, kind: str, body: bytes
    ) -> web.Response:
        if self.faulty(f"drops {kind}"):
            assert request.transport
            request.transport.close()
        if self.faulty(f"accepts {kind}"):
            return web.json_response({"choices": [], "usage": {}})
        if self.faulty(f"breaks at {kind}"):
            return web.Response(status=500, text="Internal Server Error")
        if self.faulty(f"does not say why: {kind}"):
            return web.json_response({"error": {"message": "no"}}, status=400)
        status = 404 if b'"model": "no"' in body else 400
        return web.json_response({"error": {"message": REASONS}}, status=status)


def samples(growth: float = 0, gpu_growth: float | None = None) -> list[Sample]:
    """Of memory that grows evenly, by so much from the start to the end."""
    return [
        Sample(
            seconds=SECONDS * share,
            requests=int(1000 * share),
            rss=int(1000 * MIB * (1 + growth * share)),
            gpu=None if gpu_growth is None else int(MIB * (1 + gpu_growth * share)),
            kv_cache=0.5,
            preemptions=0,
        )
        for share in (index / 40 for index in range(41))
    ]


def run_against(
    fake: Fake, end_if_dead: Callable[[], None] = lambda: None
) -> list[str]:
    """What a short run finds fault with; its memory is steady."""

    async def main() -> Run:
        app = web.Application()
        app.router.add_post(COMPLETIONS, fake.complete)
        app.router.add_post(CHAT, fake.complete)
        app.router.add_get("/metrics", fake.metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            url = "http://{}:{}".format(*runner.addresses[0][:2])
            mix = Mix(random.Random(), PAIRS, MAX_MODEL_LEN)
            run = Run(url, mix, Memory(lambda: 1), IN_FLIGHT, SECONDS)
            run.answer_seconds, run.idle_seconds = 2, 0.5
            await stress(run, lambda: None, end_if_dead)
            assert run.samples
            run.samples = samples()
            return run
        finally:
            await runner.cleanup()

    return failures(figures(asyncio.run(main())), max_growth=0.05)


def test_no_fault_is_found_where_there_is_none():
    assert run_against(Fake()) == []


@pytest.mark.parametrize(
    "fault, found",
    [
        ("adds wrong", r"right: \d+ of \d+ not as expected; first: .*expected .*found"),
        ("loses a choice", "right: .*'texts'"),
        ("counts wrong", "right: .*'tokens'"),
        ("fails", "right: .*found 500"),
        ("fails in the stream", "right: .*error in an answer"),
        ("never says that it is done", r"right: .*does not end with \[DONE\]"),
        ("hangs", "right: .*none in 2 s"),
        *[
            case
            for kind in ("oversized", "malformed", "empty")
            for case in (
                (f"drops {kind}", f"{kind}: .*a connection that holds"),
                (f"accepts {kind}", f"{kind}: .*found 200"),
                (f"breaks at {kind}", f"{kind}: .*found 500"),
                (f"does not say why: {kind}", f"{kind}: .*found 400"),
            )
        ],
        ("leaks blocks", "the engine still had .*kv_cache_usage_perc': 0.25"),
        ("forgets a request", "the engine still had .*num_requests_waiting': 1"),
        ("has no metrics", "the engine still had .*num_requests_running': -1"),
    ],
)
def test_each_fault_is_found(fault, found):
    failed = "\n".join(run_against(Fake(fault)))
    assert re.search(found, failed), failed


@pytest.mark.parametrize(
    "growth, gpu_growth, found",
    [
        (0.02, 0.02, []),
        (-0.5, -0.5, []),
        (0.2, 0.02, ["rss grew by"]),
        (0.02, 0.2, ["gpu grew by"]),
    ],
)
def test_growth_is_found(growth, gpu_growth, found):
    mix = Mix(random.Random(), PAIRS, MAX_MODEL_LEN)
    memory = Memory(lambda: 1, lambda: 1, "devices")
    run = Run("http://nowhere", mix, memory, IN_FLIGHT, SECONDS)
    run.left = {}
    for kind in run.tallies:
        run.tallies[kind] = Tally(sent=1, as_expected=1)
    run.samples = samples(growth, gpu_growth)
    failed = failures(figures(run), max_growth=0.05)
    assert len(failed) == len(found)
    for line, start in zip(failed, found, strict=True):
        assert line.startswith(start)
    run.samples = run.samples[:10]
    assert all("too few samples" in line for line in failures(figures(run), 0.05))


def test_a_server_that_dies_ends_the_run():
    def dead() -> None:
        raise ServerError("died")

    with pytest.raises(ServerError, match="died"):
        run_against(Fake(), end_if_dead=dead)


def test_a_server_that_cannot_be_reached_is_a_clear_error():
    async def main() -> None:
        mix = Mix(random.Random(), PAIRS, MAX_MODEL_LEN)
        run = Run("http://127.0.0.1:1", mix, Memory(lambda: 1), IN_FLIGHT, SECONDS)
        await stress(run, lambda: None, lambda: None)

    with pytest.raises(ServerError, match="no metrics of the server"):
        asyncio.run(main())


@pytest.mark.parametrize("body", [b"", b"[]", b"no", b'{"error": "maximum"}', b"{}"])
def test_a_refusal_is_json_with_a_message(body):
    assert expect_refusal(400, "maximum")(Reply(400, body)) is not None


def test_only_sums_that_are_clear_are_asked(one_thread, monkeypatch):
    assert len(clear_sums(EXPORT, PAIRS)) > 0.9 * len(PAIRS)
    assert clear_sums(EXPORT, []) == []
    monkeypatch.setattr(addition, "answer", lambda first, second: str(first))
    assert clear_sums(EXPORT, [(first, 1) for first, _ in PAIRS]) == []


def test_results_are_written_in_one_step(tmp_path):
    results = tmp_path / "new" / "results.json"
    save(results, {"finished": False})
    save(results, {"finished": True})
    assert json.loads(results.read_text()) == {"finished": True}
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such model\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    log = tmp_path / "log"
    with (
        pytest.raises(ServerError, match=f"status 3(.|\n)*{log}(.|\n)*no such model"),
        serve(EXPORT, log, []) as server,
    ):
        server.wait_until_ready()


def test_the_server_is_not_left_behind(tmp_path, monkeypatch):
    """Nor what it started, and what that left."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n(sleep 100 &)\nsleep 100\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with (
        pytest.raises(KeyboardInterrupt),
        serve(EXPORT, tmp_path / "log", []) as server,
    ):
        server.wait_until(lambda: len(server.processes()) == 3, "started", 10)
        raise KeyboardInterrupt
    assert server.processes() == []


@pytest.mark.needs_group("serve")  # which holds connections of refused requests
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs a vLLM built for CPUs")
def test_the_engine_under_stress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bound on growth is of a longer run: this one ends while memory warms up."""
    monkeypatch.setattr(stress_serving, "WORK", tmp_path)
    monkeypatch.setattr(stress_serving, "NUM_SUMS", 500)
    results = tmp_path / "results.json"
    # In half a minute a busy machine may take no sample of memory in time.
    options = ["--minutes", "1", "--in-flight", "32", "--max-model-len", "128"]
    options += ["--max-growth", "0.5", "--results", str(results)]
    result = measure(parse_args(options))
    assert result["failures"] == []
    assert result["end"]["status"] == 0
    assert result["kinds"]["right"]["sent"] > 50
    assert json.loads(results.read_text()) == result
