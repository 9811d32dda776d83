"""What the fake upstreams of load.py say: OpenAI chat completions, responses and streams, with the least in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def completion(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"{name} answers"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body.get("model"),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


def response(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    text = {"type": "output_text", "text": f"{name} answers", "annotations": []}
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "completed",
        "model": body.get("model"),
        "output": [message],
        "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def events(name: str, body: Mapping[str, Any]) -> Iterator[str]:
    base = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": body.get("model"),
    }
    for delta, finish in (
        ({"role": "assistant", "content": name}, None),
        ({"content": " answers"}, None),
        ({}, "stop"),
    ):
        yield json.dumps({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
    yield "[DONE]"
