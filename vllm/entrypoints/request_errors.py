# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which errors a request is to blame for, and how the server answers those.

Most of what refuses a request raises plain ValueErrors, and so do faults of the server.
Where they were raised tells them apart: an error of a request comes out of code that
reads requests.
"""

import dis
import re
from collections.abc import Awaitable, Callable
from traceback import walk_tb
from types import FrameType

from fastapi import FastAPI, Request
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.responses import Response
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)

KINDS = (
    NotImplementedError,
    OverflowError,
    TemplateError,
    TypeError,
    ValueError,
    VLLMNotFoundError,
)
# As module:function. What these raise, or what they call, is of the request.
READ_REQUESTS = re.compile(
    r"vllm\.(inputs|multimodal|pooling_params|renderers|sampling_params)[.:]"
    r"|vllm\.v1\.engine\.input_processor:"
    r"|vllm\.tokenizers\.mistral:(maybe_serialize|truncate|validate)_"
    r"|vllm\.entrypoints\.(.+\.protocol|chat_utils):"
    r"|vllm\.entrypoints\..+:_?(build_prompts|check|construct|get_max_tokens"
    r"|make_request|maybe_get_adapters|pre_?process|validate|verify)"
)
# What these raise themselves is; what they call may be anything.
TAKE_REQUESTS = re.compile(
    r"vllm\.entrypoints\..*(api_router|run_batch):"
    r"|vllm\.entrypoints\.openai\.engine\.serving:beam_search"
    r"|vllm\.v1\.engine\.async_llm:(add_request|init_weight_transfer_engine"
    r"|update_weights)"
)
RAISE = dis.opmap["RAISE_VARARGS"]

Handler = Callable[[Request, Exception], Awaitable[Response]]


def place(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}:{frame.f_code.co_name}"


def is_of_request(error: Exception) -> bool:
    """Whether the request is to blame, not the server."""
    if isinstance(error, (VLLMValidationError, VLLMNotFoundError)):
        return True
    if not isinstance(error, KINDS):
        return False
    places = [place(frame) for frame, _ in walk_tb(error.__traceback__)]
    if not places:
        return True  # made for an answer and never raised
    return bool(
        TAKE_REQUESTS.match(places[-1]) or any(map(READ_REQUESTS.match, places))
    )


def is_refusal(error: Exception) -> bool:
    """Of an error of a request: whether a statement of vLLM's raised it for that."""
    if isinstance(error, (VLLMValidationError, VLLMNotFoundError, ValidationError)):
        return True
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return True
    code = traceback.tb_frame.f_code.co_code
    return (
        place(traceback.tb_frame).startswith("vllm.")
        and code[traceback.tb_lasti] == RAISE
    )


def answer_bad_requests(app: FastAPI, handler: Handler) -> None:
    """Let `handler` answer them and the connection hold.

    What a handler of Exception answers, the web framework raises again: the server
    logs its traceback and closes the connection. That is left to the server's faults.
    """

    async def answer(request: Request, error: Exception) -> Response:
        if not is_of_request(error):
            raise error
        if not is_refusal(error):
            # Nobody meant to refuse it: bad as the request may be, say what broke.
            logger.warning("A request could not be read.", exc_info=error)
        return await handler(request, error)

    for kind in KINDS:
        app.exception_handler(kind)(answer)
