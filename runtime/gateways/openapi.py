"""The OpenAPI description of ``arllm serve``, and the check of a request against what it says."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from arllm.runtime.gateways import asks
from arllm.runtime.gateways.asks import parse_beta
from arllm.runtime.gateways.config import GatewayConfig


def problem(body: Mapping[str, Any], headers: Mapping[str, str], config: GatewayConfig) -> str | None:
    """What is wrong with a routing request, as the description below has it; None where nothing is."""
    if "model" in body and not isinstance(body["model"], str):
        return "model must be a string"
    if not any(key in body for key in ("messages", "input", "prompt")):
        return "give messages (OpenAI chat, Anthropic), input (OpenAI Responses) or prompt"
    for key in ("messages", "input"):
        value = body.get(key)
        if key == "input" and isinstance(value, str):
            continue
        if key in body and not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
            return f"{key} must be a list of objects, not empty" + (", or a string" if key == "input" else "")
    for item in body.get("messages", ()):
        if not isinstance(item.get("role"), str):
            return "every message needs a role, a string"
        if not isinstance(item.get("content"), (str, list, type(None))):
            return "a message's content must be a string, a list or null"
    prompt = body.get("prompt", "")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(p, str) for p in prompt)):
        return "prompt must be a string, or a list of strings"
    if config.beta_bounds is not None and asks.BETA in headers and parse_beta(headers[asks.BETA]) is None:
        return f"the header {asks.BETA} must be a number in [0, 1]"
    return None


def description(config: GatewayConfig, *, with_token: bool) -> dict[str, Any]:
    """The description that this server serves: headers and security only where the operator turned them on."""
    guarded: dict[str, Any] = {"security": [{"token": []}]} if with_token else {}
    refused: dict[str, Any] = {"401": _error("The bearer token is missing or wrong")} if with_token else {}
    busy = {"503": _error("Too many requests at once")}
    parameters = []
    if config.beta_bounds is not None:
        low, high = config.beta_bounds
        parameters.append(
            _header(
                asks.BETA,
                f"0 = quality alone, 1 = cost alone; moved into [{low:g}, {high:g}]",
                {"type": "number", "minimum": 0, "maximum": 1},
            )
        )
    if config.client_candidates:
        parameters.append(_header(asks.CANDIDATES, "Candidates to choose among, comma-separated", {"type": "string"}))
    if config.sticky_margin is not None:
        parameters.append(_header(config.session_header, "Names the conversation", {"type": "string"}))
    components: dict[str, Any] = {"schemas": {"Request": _REQUEST, "Verdict": _VERDICT, "Error": _ERROR}}
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "arllm",
            "version": version("arllm"),
            "description": "Which model answers which query. Gateways make the completions.",
        },
        "paths": {
            "/v1/route": {
                "post": {
                    "operationId": "route",
                    "summary": "Decide which model answers a request",
                    "parameters": parameters,
                    "requestBody": {"required": True, "content": _json({"$ref": "#/components/schemas/Request"})},
                    "responses": {
                        "200": {
                            "description": "The decision. The default model with its reason, where none was made",
                            "content": _json({"$ref": "#/components/schemas/Verdict"}),
                        },
                        "400": _error("Not JSON, or not a chat request"),
                        "408": _error("The body did not arrive in time"),
                        "413": _error("The body is too large"),
                        "431": _error("The headers are too large"),
                        **refused,
                        **busy,
                    },
                    **guarded,
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "summary": "The aliases that ask for a decision, and the candidates",
                    "responses": {"200": {"description": "A list", "content": _json(_MODELS)}, **refused},
                    **guarded,
                }
            },
            "/healthz": {
                "get": {
                    "operationId": "healthz",
                    "summary": "The process lives",
                    "responses": {"200": {"description": "It does", "content": _json({"type": "object"})}},
                }
            },
            "/readyz": {
                "get": {
                    "operationId": "readyz",
                    "summary": "What serves, and how it fares",
                    "responses": {"200": {"description": "A bundle is loaded", "content": _json({"type": "object"})}},
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Prometheus metrics",
                    "responses": {
                        "200": {
                            "description": "Text exposition",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        },
                        **refused,
                    },
                    **guarded,
                }
            },
        },
        "components": components,
    }


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": _json({"$ref": "#/components/schemas/Error"})}


def _header(name: str, text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": text, "schema": schema}


_LIST = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_REQUEST: dict[str, Any] = {
    "type": "object",
    "description": "A request of any chat shape. Other fields are allowed; tools, response_format and output limits "
    "rule candidates out that can't serve them. Without model, the alias is meant.",
    "properties": {
        "model": {"type": "string"},
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
            },
        },
        "input": {"anyOf": [{"type": "string"}, _LIST]},
        "prompt": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    },
    "anyOf": [{"required": ["messages"]}, {"required": ["input"]}, {"required": ["prompt"]}],
    "example": {"model": "auto", "messages": [{"role": "user", "content": "What is 17 * 23?"}]},
}
_VERDICT: dict[str, Any] = {
    "type": "object",
    "required": ["model", "reason", "changed", "candidate", "bundle", "routing_ms", "ignored", "decision"],
    "properties": {
        "model": {"type": "string", "description": "What the request should name upstream"},
        "reason": {"type": "string"},
        "changed": {"type": "boolean"},
        "candidate": {"type": ["string", "null"], "description": "The pool's name of the model"},
        "bundle": {"type": "string"},
        "routing_ms": {"type": "number", "minimum": 0},
        "ignored": {"type": "array", "items": {"type": "string"}, "description": "Headers that were not heard"},
        "decision": {"type": ["object", "null"], "description": "Quality, utility and cost of each candidate"},
    },
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
    },
}
_MODELS: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"type": "object", "required": ["id", "object"]}},
    },
}
