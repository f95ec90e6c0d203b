# SPDX-License-Identifier: Apache-2.0
"""Faults for `vllm serve --middleware tests.entrypoints.openai.server_faults.Faults`.

A request whose X-Request-Id names one of FAULTS meets it.
"""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

FAULTS = {
    "value-in-engine": ValueError,
    "value-in-serving": ValueError,
    "type-in-serving": TypeError,
    "overflow-in-serving": OverflowError,
    "json-in-serving": ValueError,
}


def break_down(request_id: str, place: str) -> None:
    for fault, kind in FAULTS.items():
        if fault in request_id and fault.endswith(place):
            raise kind(f"the server's fault: {fault}")


class Faults:
    """Passes all on; importing it is what breaks the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


generate = AsyncLLM.generate
to_response = OpenAIServingCompletion.request_output_to_completion_response


async def generate_or_break(
    self: AsyncLLM,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    async for output in generate(self, prompt, params, request_id, *args, **kwargs):
        break_down(request_id, "engine")
        yield output


def to_response_or_break(
    self: OpenAIServingCompletion,
    outputs: Any,
    request: Any,
    request_id: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    response = to_response(self, outputs, request, request_id, *args, **kwargs)
    if "json" in request_id:
        response.created = float("nan")  # which no JSON holds
    else:
        break_down(request_id, "serving")
    return response


AsyncLLM.generate = generate_or_break
OpenAIServingCompletion.request_output_to_completion_response = to_response_or_break
