# SPDX-License-Identifier: Apache-2.0
"""What the stress run asks, and how each answer is judged.

Sums, whose answers are known to the byte; long generations that fill the KV cache;
clients that leave; and requests that are to be refused.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.fixtures import addition
from tests.fixtures.step3p5_tiny import CONFIG, EOS_ID
from tests.models.step3p5_reference import by_length, load

MODEL = "step3p5-tiny"  # the name that is served
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_TOKENS = 8
NEAR_GREEDY = 0.05  # several choices need a temperature above zero
# In nats: seven times as likely as the next token, at every step of the answer.
CLEAR = 2.0
CHUNK = 512

# How often each is drawn.
WEIGHTS = {
    "right": 50,
    "long": 8,
    "cancelled": 16,
    "oversized": 8,
    "malformed": 12,
    "empty": 6,
}

Pair = tuple[int, int]


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


@dataclass(frozen=True)
class Problem:
    expected: str
    found: str


Check = Callable[[Reply], Problem | None]


@dataclass(frozen=True)
class Request:
    """A request; `check` says what is wrong with the reply.

    The client leaves after so many seconds, or lines of the stream, where given.
    """

    kind: str
    name: str
    path: str
    body: bytes
    check: Check
    leave_seconds: float | None = None
    leave_lines: int | None = None
    content_type: str = "application/json"


def clear_sums(export: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose answer the reference of the INT8 export gives, clearly at each token.

    The reference is plain torch with the export's weights and inputs rounded to INT8.
    """
    model = load(export, int8_inputs=True)
    asked = [
        addition.encode(addition.question(*pair) + addition.answer(*pair)) + [EOS_ID]
        for pair in pairs
    ]
    clear = []
    for indices, token_ids in by_length(asked):
        scores = torch.cat([model(part[:, :-1]) for part in token_ids.split(CHUNK)])
        scores = scores.log_softmax(-1)
        wanted = token_ids[:, 1:, None]
        margin = scores.gather(-1, wanted)[..., 0]
        margin = margin - scores.scatter(-1, wanted, -torch.inf).amax(-1)
        for index, row in zip(indices, margin, strict=True):
            answer = len(addition.answer(*pairs[index])) + 1  # and the end
            if row[-answer:].min() > CLEAR:
                clear.append(pairs[index])
    return clear


def draw_sums(draw: random.Random, count: int) -> list[Pair]:
    """`count` of the whole space, and all that no model was trained on."""
    numbers = range(addition.SMALLEST_TOO_LARGE)
    drawn = [(draw.choice(numbers), draw.choice(numbers)) for _ in range(count)]
    return list(dict.fromkeys([*drawn, *addition.held_out()]))


def read_choices(body: bytes, stream: bool) -> tuple[dict[int, str], set[str], Any]:
    """Texts by choice, reasons to finish, usage; ValueError if it is no answer."""
    if not stream:
        parts = [json.loads(body)]
    else:
        lines = [line for line in body.decode().splitlines() if line]
        if not lines or lines[-1] != "data: [DONE]":
            raise ValueError("the stream does not end with [DONE]")
        parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts: dict[int, str] = {}
    reasons = set()
    usage = None
    for part in parts:
        if "error" in part:
            raise ValueError(f"error in an answer: {part['error']}")
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            said = choice.get("message") or choice.get("delta") or choice
            text = said.get("text") or said.get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            if choice.get("finish_reason"):
                reasons.add(choice["finish_reason"])
    return texts, reasons, usage


def expect_answer(
    texts: Sequence[str], reason: str, tokens: int, stream: bool, prefix: bool = False
) -> Check:
    """Status 200, these texts (or texts that begin so) and so many tokens in all."""
    expected = {"texts": dict(enumerate(texts)), "finish": reason, "tokens": tokens}

    def check(reply: Reply) -> Problem | None:
        if reply.status != 200:
            return Problem(f"200 {expected}", f"{reply.status} {short(reply.body)}")
        try:
            found_texts, reasons, usage = read_choices(reply.body, stream)
            found_tokens = usage["completion_tokens"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Problem(str(expected), f"{error!r} in {short(reply.body)}")
        if prefix:
            found_texts = {
                index: text[: len(texts[index])] if index < len(texts) else text
                for index, text in found_texts.items()
            }
        found = {
            "texts": dict(sorted(found_texts.items())),
            "finish": "|".join(sorted(reasons)),
            "tokens": found_tokens,
        }
        return None if found == expected else Problem(str(expected), str(found))

    return check


def expect_refusal(status: int, says: str) -> Check:
    """This status, and a JSON body with an error in which the pattern is found."""

    def check(reply: Reply) -> Problem | None:
        wanted = Problem(f"{status} {says!r}", f"{reply.status} {short(reply.body)}")
        if reply.status != status:
            return wanted
        try:
            body = json.loads(reply.body)
            message = body["detail"] if "detail" in body else body["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return wanted
        return None if re.search(says, message, re.IGNORECASE) else wanted

    return check


def expect_nothing(reply: Reply) -> Problem | None:
    """Of a client that left: no error before."""
    if reply.status == 200:
        return None
    return Problem("200, or left before", f"{reply.status} {short(reply.body)}")


def short(body: bytes) -> str:
    return body.decode(errors="replace")[:500]


def to_json(body: Any) -> bytes:
    return json.dumps(body).encode()


class Mix:
    """Draws requests to a server of this context length, with sums of `pairs`."""

    def __init__(
        self, draw: random.Random, pairs: Sequence[Pair], max_model_len: int
    ) -> None:
        self.draw, self.pairs, self.max_model_len = draw, pairs, max_model_len
        self.refused: dict[str, list[Request]] = {
            "oversized": oversized(max_model_len),
            "malformed": malformed(),
            "empty": empty(),
        }

    def next(self) -> Request:
        [kind] = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if kind in self.refused:
            return self.draw.choice(self.refused[kind])
        return {
            "right": self.right,
            "long": self.long,
            "cancelled": self.cancelled,
        }[kind]()

    def right(self) -> Request:
        """Sums: one prompt or several, one choice or several, cut short or not."""
        draw = self.draw
        chat = draw.random() < 0.15
        pairs = draw.sample(self.pairs, 1 if chat else draw.choice((1, 1, 1, 2, 3)))
        questions = [addition.question(*pair) for pair in pairs]
        answers = [addition.answer(*pair) for pair in pairs]
        body: dict[str, Any] = {"max_tokens": MAX_TOKENS}
        cut = draw.choice(("whole", "whole", "whole", "max_tokens", "stop"))
        reason, tokens = "stop", [len(answer) + 1 for answer in answers]
        if cut == "max_tokens":
            # Not the whole of any answer, so that all end for one reason.
            count = draw.randint(1, min(map(len, answers)))
            answers = [answer[:count] for answer in answers]
            body["max_tokens"], reason, tokens = count, "length", [count] * len(pairs)
        elif cut == "stop":
            body["stop"] = [draw.choice("".join(answers))]
            places = [answer.find(body["stop"][0]) for answer in answers]
            tokens = [
                len(answer) + 1 if place < 0 else place + 1
                for answer, place in zip(answers, places, strict=True)
            ]
            answers = [answer.split(body["stop"][0])[0] for answer in answers]
        choices = 1
        if draw.random() < 0.2:
            choices = draw.randint(2, 4)
            body |= {
                "n": choices,
                "temperature": NEAR_GREEDY,
                "seed": draw.getrandbits(32),
            }
        form = "chat" if chat else draw.choice(("text", "token ids"))
        stream = draw.random() < 0.5
        name = f"{form}, {cut}, {len(pairs)} x {choices}" + ", stream" * stream
        return self.ask(
            "right",
            name,
            questions,
            form,
            body,
            stream,
            expect_answer(
                [answer for answer in answers for _ in range(choices)],
                reason,
                sum(tokens) * choices,
                stream,
            ),
        )

    def ask(
        self,
        kind: str,
        name: str,
        questions: Sequence[str],
        form: str,
        body: dict[str, Any],
        stream: bool,
        check: Check,
    ) -> Request:
        """`form` is chat, text or token ids; greedy unless the body says otherwise."""
        body = {"model": MODEL, "temperature": 0} | body
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if form == "chat":
            [question] = questions
            body["messages"] = [{"role": "user", "content": question}]
        else:
            prompts: list[Any] = list(questions)
            if form == "token ids":
                prompts = [addition.encode(question) for question in questions]
            body["prompt"] = prompts[0] if len(prompts) == 1 else prompts
        path = CHAT if form == "chat" else COMPLETIONS
        return Request(kind, name, path, to_json(body), check)

    def long(self) -> Request:
        """Fills the context, after a sum whose answer comes first or after noise."""
        draw = self.draw
        stream = draw.random() < 0.5
        if draw.random() < 0.5:
            pair = draw.choice(self.pairs)
            question, text = addition.question(*pair), addition.answer(*pair)
            name = "sum"
        else:
            length = draw.randint(1, self.max_model_len * 3 // 4)
            question, text = "".join(draw.choices("0123456789+=", k=length)), ""
            name = "noise"
        room = self.max_model_len - len(question)
        tokens = draw.randint(min(len(text) + 1, room), room)
        return self.ask(
            "long",
            name + ", stream" * stream,
            [question],
            draw.choice(("text", "token ids")),
            {"max_tokens": tokens, "ignore_eos": True},
            stream,
            expect_answer([text], "length", tokens, stream, prefix=True),
        )

    def cancelled(self) -> Request:
        """A long one whose client leaves: at once, in the stream, while it waits."""
        draw = self.draw
        pair = draw.choice(self.pairs)
        stream = draw.random() < 0.7
        leave_seconds, leave_lines = None, None
        when = draw.choice(("before the first token", "later"))
        if when != "later":
            leave_seconds = draw.uniform(0, 0.05)
        elif stream:
            leave_lines = draw.randint(1, 40)
        else:
            leave_seconds = draw.uniform(0.05, 2)
        question = addition.question(*pair)
        body = {
            "model": MODEL,
            "prompt": question,
            "max_tokens": self.max_model_len - len(question),
            "ignore_eos": True,
            "stream": stream,
        }
        return Request(
            "cancelled",
            when + ", stream" * stream,
            COMPLETIONS,
            to_json(body),
            expect_nothing,
            leave_seconds,
            leave_lines,
        )


def refusals(
    kind: str, table: Sequence[tuple[str, Any, str]], status: int = 400
) -> list[Request]:
    """Of rows of name, what is changed of a right request or the body, the error."""
    right = {"model": MODEL, "prompt": "12+345=", "temperature": 0, "max_tokens": 4}
    return [
        Request(
            kind,
            name,
            COMPLETIONS,
            body if isinstance(body, bytes) else to_json(right | body),
            expect_refusal(status, says),
        )
        for name, body, says in table
    ]


def oversized(max_model_len: int) -> list[Request]:
    length = r"maximum context length is \d+"
    too_long = "1" * (max_model_len + 1)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": too_long}]}
    return [
        *refusals(
            "oversized",
            [
                ("prompt", {"prompt": too_long}, length),
                ("prompt, stream", {"prompt": too_long, "stream": True}, length),
                ("token ids", {"prompt": addition.encode(too_long)}, length),
                ("no room", {"prompt": addition.encode(too_long)[1:]}, length),
                ("one of two", {"prompt": ["1+1=", too_long]}, length),
                ("max_tokens", {"max_tokens": max_model_len + 1}, "max_tokens"),
                ("prompt and max_tokens", {"max_tokens": max_model_len}, length),
                ("n", {"n": 1_000_000}, "n must be at most"),
                ("logprobs", {"logprobs": 1_000_000}, "logprobs"),
            ],
        ),
        Request("oversized", "chat", CHAT, to_json(chat), expect_refusal(400, length)),
    ]


def malformed() -> list[Request]:
    vocabulary = CONFIG["vocab_size"]
    rows = [
        ("not JSON", b"{12+345=", "JSON"),
        ("not text", b"\xff\xfe\x00{", "pars|JSON"),
        ("a list", b"[1]", "object"),
        ("null", b"null", "object"),
        ("a string", b'"12+345="', "object"),
        ("prompt: a number", {"prompt": 5}, "valid"),
        ("prompt: an object", {"prompt": {"a": 1}}, "valid"),
        ("prompt: mixed", {"prompt": ["1+1=", 5]}, "valid"),
        ("token id too large", {"prompt": [49, vocabulary]}, "out of vocabulary"),
        ("token id huge", {"prompt": [10**30]}, "out of vocabulary"),
        ("token id negative", {"prompt": [-1]}, "greater than or equal"),
        ("max_tokens: text", {"max_tokens": "many"}, "valid integer"),
        ("max_tokens negative", {"max_tokens": -1}, "max_tokens must be at least 1"),
        ("max_tokens 0", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("n 0", {"n": 0}, "n must be at least 1"),
        ("n negative", {"n": -1}, "n must be at least 1"),
        ("n 2, greedy", {"n": 2}, "n must be 1"),
        ("temperature: text", {"temperature": "hot"}, "valid number"),
        ("temperature negative", {"temperature": -1}, "temperature"),
        ("temperature NaN", {"temperature": float("nan")}, "temperature"),
        ("top_p 7", {"top_p": 7}, "top_p"),
        ("seed too large", {"seed": 2**70}, "less than or equal"),
        ("stop: a number", {"stop": 5}, "valid"),
        ("stop: nothing", {"stop": ""}, "stop cannot contain an empty string"),
        ("logit_bias", {"logit_bias": {"5000": 1}}, "out-of-vocab"),
        ("stream_options", {"stream_options": {"include_usage": True}}, "stream"),
    ]
    messages = {"model": MODEL, "messages": "12+345="}
    right = refusals("malformed", [("", {}, "")])[0].body
    return [
        *refusals("malformed", rows),
        *refusals("malformed", [("no such model", {"model": "no"}, "not exist")], 404),
        Request(
            "malformed",
            "chat: no list of messages",
            CHAT,
            to_json(messages),
            expect_refusal(400, "valid"),
        ),
        Request(
            "malformed",
            "content type",
            COMPLETIONS,
            right,
            expect_refusal(400, "application/json"),
            content_type="text/plain",
        ),
    ]


def empty() -> list[Request]:
    rows = [
        ("body", b"", "required"),
        ("object", b"{}", "prompt"),
        ("list", b"[]", "object"),
        ("prompt", {"prompt": ""}, "prompt"),
        ("prompts", {"prompt": []}, "prompt"),
        ("one of two prompts", {"prompt": ["1+1=", ""]}, "prompt cannot be empty"),
        ("token ids", {"prompt": [[]]}, "prompt cannot be empty"),
        ("no prompt", {"prompt": None}, "prompt"),
    ]
    chat = to_json({"model": MODEL, "messages": []})
    return [
        *refusals("empty", rows),
        Request("empty", "chat", CHAT, chat, expect_refusal(400, "empty")),
    ]
