# SPDX-License-Identifier: Apache-2.0
"""Bad requests get a status of 4xx and keep their connection; a fault of the server
gets 500, and its traceback is in the log."""

import ast
import asyncio
import json
import logging
import operator
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from pydantic import BaseModel
from starlette.responses import JSONResponse

# From 0.32.0 on there is no patch 0020, as vLLM does so itself.
for moved in ("request_errors", "openai.engine.serving"):
    pytest.importorskip(
        f"vllm.entrypoints.{moved}", reason="written for the modules of 0.20 and 0.21"
    )

# ruff: noqa: E402
from vllm.entrypoints import request_errors
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.engine.serving import OpenAIServing
from vllm.entrypoints.request_errors import is_of_request, is_refusal
from vllm.entrypoints.utils import create_error_response, get_max_tokens
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
from vllm.platforms import current_platform
from vllm.renderers.inputs.preprocess import prompt_to_seq
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.entrypoints.openai.server_faults import FAULTS
from tests.server import Server, serve
from tests.stress.requests import (
    CHAT,
    COMPLETIONS,
    MODEL,
    Reply,
    empty,
    malformed,
    oversized,
)
from tests.stress.stress_serving import (
    EXPORT,
    SERVER_ENV,
    parse_args,
    server_options,
)

MAX_MODEL_LEN = 48
BODY = {"model": MODEL, "prompt": "1+1=", "max_tokens": 2, "temperature": 0}


def raised(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class Answer(BaseModel):
    text: str


def raise_validation_error() -> None:
    raise VLLMValidationError("no", parameter="top_k")


def raise_not_found() -> None:
    raise LoRAAdapterNotFoundError("name", "/path")


def unknown_adapter() -> None:
    models = SimpleNamespace(lora_requests={}, is_base_model=lambda _: False)
    serving = SimpleNamespace(models=models, _is_model_supported=lambda _: False)
    OpenAIServing._maybe_get_adapters(serving, CompletionRequest(prompt="1", model="x"))


def too_many_choices() -> None:
    CompletionRequest(prompt="1", n=10**6).to_sampling_params(5, {})


REFUSED = [
    too_many_choices,
    unknown_adapter,
    raise_validation_error,
    lambda: SamplingParams(min_tokens=-1),
    lambda: get_max_tokens(8, None, 9, {}),
]
# Vague errors of a library below the code that reads a request.
UNREADABLE = [
    lambda: SamplingParams.from_optional(logit_bias={"a": 1}),
    lambda: prompt_to_seq(5),
]
FAULTY = [
    lambda: int("x"),
    lambda: operator.add(None, 1),
    lambda: bytes(10**20),
    lambda: Answer.model_validate({}),
    lambda: JSONResponse({"logprob": float("nan")}),
]


@pytest.mark.parametrize("call", REFUSED)
def test_what_refuses_a_request_is_blamed_on_it(call):
    error = raised(call)
    assert is_of_request(error) and is_refusal(error)
    assert create_error_response(error).error.code == 400


@pytest.mark.parametrize("call", UNREADABLE)
def test_what_breaks_while_a_request_is_read_is_blamed_on_it(call):
    error = raised(call)
    assert is_of_request(error) and not is_refusal(error)
    assert create_error_response(error).error.code == 400


@pytest.mark.parametrize("call", FAULTY)
def test_what_breaks_elsewhere_is_the_servers_fault(call):
    error = raised(call)
    assert not is_of_request(error)
    assert create_error_response(error).error.code == 500


def test_an_error_made_for_an_answer_is_that_answer():
    assert create_error_response(ValueError("no")).error.code == 400
    assert create_error_response(NotImplementedError("no")).error.code == 501
    assert create_error_response(raised(raise_not_found)).error.code == 404


# Functions of 0.20.0 to 0.21.0 in the server's code that raise the same kinds of errors
# where the server is to blame, or where no request is read.
NOT_OF_REQUESTS = {
    "mcp.tool:get_result_parsable_context",
    "mcp.tool_server:get_tool_description",
    "openai.api_server:build_app",
    "openai.chat_completion.serving:_create_chat_logprobs",
    "openai.chat_completion.serving:chat_completion_full_generator",
    "openai.chat_completion.serving:chat_completion_stream_generator",
    "openai.engine.serving:_get_decoded_token",
    "openai.engine.serving:_parse_tool_calls_from_content",
    "openai.engine.serving:build_chat_params",
    "openai.engine.serving:build_tok_params",
    "openai.models.serving:init_static_loras",
    "openai.parser.responses_parser:make_response_output_items_from_parsable_context",
    "openai.responses.context:__init__",
    "openai.responses.context:_map_tool_name_to_tool_type",
    "openai.responses.context:append_output",
    "openai.responses.context:append_tool_output",
    "openai.responses.context:call_tool",
    "openai.responses.context:cleanup_session",
    "openai.responses.context:render_for_completion",
    "openai.responses.harmony:_parse_browser_tool_call",
    "openai.responses.harmony:_parse_message_no_recipient",
    "openai.responses.streaming_events:emit_browser_tool_events",
    "pooling.base.serving:_build_response",
    "pooling.base.serving:_collect_batch",
    "pooling.base.serving:_prepare_generators",
    "pooling.base.serving:get_io_processor",
    "pooling.base.serving:init_io_processor",
    "pooling.embed.io_processor:_post_process_chunked",
    "pooling.embed.io_processor:post_process_online",
    "pooling.scoring.io_processor:__init__",
    "pooling.scoring.serving:_build_response",
    "utils:log_non_default_args",
    "utils:wrapper",
}
# They raise below a function that reads requests.
BELOW_READERS = {
    "openai.parser.harmony_utils:get_developer_message",
    "openai.parser.harmony_utils:get_system_message",
    "openai.responses.harmony:_parse_chat_format_message",
    "openai.responses.harmony:response_input_to_harmony",
    "pooling.base.io_processor:_params_to_seq",
    "pooling.scoring.io_processor:default_tokenizer_encode",
    "pooling.scoring.io_processor:ensure_str",
    "pooling.scoring.utils:_ensure_str",
    "pooling.scoring.utils:_parse_score_content",
    "pooling.scoring.utils:compress_token_type_ids",
}
OF_NO_SERVER = ("cli", "llm", "grpc_server", "openai.cli_args")


def raising_functions(source: str) -> Iterator[str]:
    """Functions that name one of the kinds in a raise statement."""
    kinds = {kind.__name__ for kind in request_errors.KINDS}

    def walk(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Raise):
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(named, ast.Name) and named.id in kinds:
                yield function
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(source), "")


def test_every_function_of_the_server_that_raises_is_known():
    """One that a new release adds is to be looked into."""
    spec = find_spec("vllm.entrypoints")
    assert spec and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    patterns = request_errors.READ_REQUESTS, request_errors.TAKE_REQUESTS
    found, blamed = set(), set()
    for path in folder.rglob("*.py"):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        if module.split(".")[0] in OF_NO_SERVER or module in OF_NO_SERVER:
            continue
        for function in raising_functions(path.read_text()):
            place = f"vllm.entrypoints.{module}:{function}"
            found.add(place)
            if any(pattern.match(place) for pattern in patterns):
                blamed.add(place)
    known = {f"vllm.entrypoints.{name}" for name in NOT_OF_REQUESTS | BELOW_READERS}
    assert found - blamed <= known
    assert not blamed & known
    assert len(blamed) > 50


class Serving:
    """Stands for the handler of completions."""

    def __init__(self) -> None:
        self.call: Callable[[], Any] = lambda: None

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        await asyncio.sleep(0)
        self.call()


class Log(logging.Handler):
    """The text of what is logged, with tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter("%(name)s %(message)s").format(record))

    def take(self) -> str:
        text = "\n".join(self.lines)
        self.lines.clear()
        return text


@pytest.fixture(scope="module")
def app_server() -> Iterator[SimpleNamespace]:
    """vLLM's app on a port, without an engine."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(args, ("generate",))
    app.state.openai_serving_completion = serving = Serving()
    app.state.openai_serving_chat = None
    app.state.log_stats = False
    config = uvicorn.Config(app, port=0, log_config=None)
    server = uvicorn.Server(config)
    log = Log()
    loggers = [logging.getLogger(name) for name in ("vllm", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(log)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(host=f"127.0.0.1:{port}", serving=serving, log=log)
    server.should_exit = True
    thread.join(30)
    for logger in loggers:
        logger.removeHandler(log)


def ask(
    host: str,
    path: str,
    body: bytes,
    content_type: str = "application/json",
    request_id: str = "test",
) -> tuple[Reply, bool]:
    """The reply, and whether the connection took another request."""
    headers = {"Content-Type": content_type, "X-Request-Id": request_id}
    connection = HTTPConnection(host, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        reply = Reply(response.status, response.read())
        connection.auto_open = 0  # else it would open another by itself
        try:
            connection.request("GET", "/version")
            return reply, connection.getresponse().status == 200
        except (OSError, HTTPException):
            return reply, False
    finally:
        connection.close()


def call_app(app_server: SimpleNamespace, call: Callable[[], Any]) -> tuple:
    app_server.serving.call = call
    app_server.log.take()
    reply, held = ask(app_server.host, COMPLETIONS, json.dumps(BODY).encode())
    time.sleep(0.1)  # the server logs after it answered
    return reply.status, held, app_server.log.take()


@pytest.mark.parametrize("call", REFUSED)
def test_a_refusal_is_400_and_the_connection_holds(app_server, call):
    status, held, log = call_app(app_server, call)
    assert (status, held) == (400, True)
    assert "Traceback" not in log


@pytest.mark.parametrize("call", UNREADABLE)
def test_an_unreadable_request_is_400_and_leaves_a_trace(app_server, call):
    status, held, log = call_app(app_server, call)
    assert (status, held) == (400, True)
    assert log.count("Traceback") == 1 and "could not be read" in log


@pytest.mark.parametrize("call", FAULTY)
def test_a_fault_is_500_and_leaves_a_trace(app_server, call):
    status, held, log = call_app(app_server, call)
    assert status == 500
    assert "Traceback" in log and "in create_completion" in log
    assert type(raised(call)).__name__ in log


def test_what_is_not_found_is_404_and_the_connection_holds(app_server):
    assert call_app(app_server, raise_not_found)[:2] == (404, True)


def test_an_interface_that_the_model_lacks_is_501_and_the_connection_holds(app_server):
    app_server.log.take()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "1"}]}
    reply, held = ask(app_server.host, CHAT, json.dumps(body).encode())
    assert (reply.status, held) == (501, True)
    assert "Traceback" not in app_server.log.take()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not current_platform.is_cpu():
        pytest.skip("needs a vLLM built for CPUs")
    options = server_options(parse_args(["--max-model-len", str(MAX_MODEL_LEN)]))
    options += ["--middleware", "tests.entrypoints.openai.server_faults.Faults"]
    log = tmp_path_factory.mktemp("faults") / "log"
    with serve(EXPORT, log, options, SERVER_ENV) as server:
        server.wait_until_ready()
        yield server


def ask_engine(engine: Server, *args: Any, **kwargs: Any) -> tuple[Reply, bool, str]:
    """The reply, whether the connection holds, and what the log says of it."""
    before = engine.log.stat().st_size
    reply, held = ask(engine.url.removeprefix("http://"), *args, **kwargs)
    time.sleep(0.2)
    return reply, held, engine.log.read_bytes()[before:].decode(errors="replace")


def test_the_engine_refuses_every_bad_request_and_holds_the_connection(engine):
    failed = []
    for request in [*oversized(MAX_MODEL_LEN), *malformed(), *empty()]:
        reply, held, log = ask_engine(
            engine, request.path, request.body, request.content_type
        )
        problem = request.check(reply)
        # Upstream logs one itself where a chat template does not apply.
        if problem or not held or log.count("Traceback") > ("hf.py" in log):
            failed.append((request.kind, request.name, problem, held, log))
    assert failed == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_is_500_and_leaves_a_trace(engine, fault):
    body = json.dumps(BODY).encode()
    reply, _, log = ask_engine(engine, COMPLETIONS, body, request_id=fault)
    assert reply.status == 500
    assert "Traceback" in log and FAULTS[fault].__name__ in log
    reply, held, log = ask_engine(engine, COMPLETIONS, body)
    assert (reply.status, held) == (200, True)
    assert "Traceback" not in log


def test_a_fault_in_a_stream_is_500_and_leaves_a_trace(engine):
    body = json.dumps(BODY | {"stream": True}).encode()
    reply, _, log = ask_engine(engine, COMPLETIONS, body, request_id="value-in-engine")
    parts = [line for line in reply.body.splitlines() if b"error" in line]
    assert json.loads(parts[0].removeprefix(b"data: "))["error"]["code"] == 500
    assert "Traceback" in log
