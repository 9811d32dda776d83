"""A chat request → what the human asked, and what the request needs of a model. Pure, and total: any JSON object
has an answer.

Reads OpenAI chat, OpenAI Responses, Anthropic messages and the old completions by their fields. Tool chatter and
system prompts never decide the route. Knows nothing about routers or candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

QUERY_FROM = ("last-user", "conversation", "first-user")

# Estimates: a token of English covers about 4 characters; of other text, about 3 bytes of UTF-8.
IMAGE_TOKENS = 1000
FILE_TOKENS = 1500

_TEXT = {"text", "input_text", "output_text"}
_IMAGES = {"image_url", "input_image", "image"}
_FILES = {"file", "input_file", "document", "input_audio", "audio"}
_JSON_FORMATS = {"json_object", "json_schema"}
_HUMAN, _MODEL = "user", "assistant"


@dataclass(frozen=True)
class Needs:
    """What a candidate must bring to answer at all.

    ``tokens`` estimates the request's input plus the output that it asks for.
    """

    tokens: int = 0
    vision: bool = False
    tools: bool = False
    json_mode: bool = False


NO_NEEDS = Needs()


@dataclass(frozen=True)
class Asked:
    """A request as routing sees it. ``query`` is None where no human wrote a text."""

    model: str | None
    query: str | None
    needs: Needs
    opening: str  # the first user turn: it names the conversation where nothing else does


def read_request(body: Mapping[str, Any], query_from: str = "last-user", *, needs: bool = True) -> Asked:
    """What a request asks for.

    Args:
        query_from: ``last-user``: the last user turn that has text; ``first-user``: the first one;
            ``conversation``: all user and assistant texts.
        needs: False = nobody will look at them, and they are left out: they cost a walk over the whole request.
    """
    turns = [(role, text) for role, text in _turns(body) if text.strip()]
    human = [text for role, text in turns if role == _HUMAN]
    query: str | None = None
    if human:
        if query_from == "conversation":
            query = "\n\n".join(text for _, text in turns)
        else:
            query = human[0] if query_from == "first-user" else human[-1]
    return Asked(model_of(body), query, _needs(body) if needs else NO_NEEDS, human[0] if human else "")


def model_of(body: Mapping[str, Any]) -> str | None:
    """The model that a request names; None where it names none."""
    model = body.get("model")
    return model if isinstance(model, str) else None


def digest(text: str) -> str:
    """The first 16 hex digits of the text's sha256: the ``query_id`` that outcomes without ids get."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _turns(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, text) of every user and assistant turn, in order."""
    messages = body.get("messages")
    if isinstance(messages, list):
        yield from _messages(messages)
        return
    given = body.get("input")  # Responses
    if isinstance(given, str):
        yield _HUMAN, given
        return
    if isinstance(given, list):
        yield from _messages(given)
        return
    prompt = body.get("prompt")  # completions
    if isinstance(prompt, str):
        yield _HUMAN, prompt
    elif isinstance(prompt, list):
        yield from ((_HUMAN, text) for text in prompt if isinstance(text, str))


def _messages(items: list[Any]) -> Iterator[tuple[str, str]]:
    for item in items:
        if isinstance(item, dict) and item.get("type", "message") == "message":
            role = item.get("role")
            if role in (_HUMAN, _MODEL):
                yield role, _text(item.get("content"))


def _text(content: Any) -> str:
    """The text parts of a message's content, a line each; tool results, images and files are none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and _kind(part) in _TEXT and isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "\n".join(texts)


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    return kind if isinstance(kind, str) else ""


def _needs(body: Mapping[str, Any]) -> Needs:
    parts = ("messages", "input", "prompt", "system", "instructions", "tools", "functions")
    tokens, images = _weigh([body.get(key) for key in parts])
    outputs = (body.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    wanted = [n for n in outputs if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return Needs(
        tokens=tokens + max(wanted, default=0),
        vision=images > 0,
        tools=any(isinstance(body.get(key), list) and body[key] for key in ("tools", "functions")),
        json_mode=_asks_json(body),
    )


def _asks_json(body: Mapping[str, Any]) -> bool:
    text = body.get("text")  # Responses
    formats = [body.get("response_format"), body.get("output_format")]
    formats.append(text.get("format") if isinstance(text, Mapping) else None)
    return any(isinstance(wanted, Mapping) and _kind(wanted) in _JSON_FORMATS for wanted in formats)


def _weigh(value: Any) -> tuple[int, int]:
    """(estimated tokens, images) of a JSON value. Iterative: the depth is the client's."""
    tokens, images, files = 0.0, 0, 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            tokens += len(item) / 4 if item.isascii() else len(item.encode("utf-8", "surrogatepass")) / 3
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            kind = _kind(item)
            if kind in _IMAGES:  # never the base64 of it
                images += 1
            elif kind in _FILES:
                files += 1
            else:
                tokens += 2 + len(item)
                pending.extend(item.values())
    return int(tokens + 0.999) + images * IMAGE_TOKENS + files * FILE_TOKENS, images
