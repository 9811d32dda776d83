"""The runtime of arllm: load an exported bundle, route queries. numpy, tokenizers and ONNX Runtime only.

The names are resolved at first use, so that training can share the decision rule and the tokenization
without an ONNX Runtime beside it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arllm.runtime.answer import Decision
    from arllm.runtime.errors import ArllmError
    from arllm.runtime.pool import Candidate, Pool
    from arllm.runtime.router import Router

if __name__ != "arllm.runtime":
    raise ImportError('this package is "arllm.runtime"; "import runtime" from the root would make a second copy')

__all__ = ["ArllmError", "Candidate", "Decision", "Pool", "Router"]

_HOMES = {
    "ArllmError": "errors",
    "Candidate": "pool",
    "Decision": "answer",
    "Pool": "pool",
    "Router": "router",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
