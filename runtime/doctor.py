"""``arllm doctor``: what this host offers the runtime, and whether a bundle decides here as where it was exported."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import onnxruntime

from arllm.runtime.bundle import open_bundle
from arllm.runtime.conformance import rerun
from arllm.runtime.devices import cores
from arllm.runtime.router import Router
from arllm.runtime.session import instruction_sets, why_not


def examine(bundle: str | None = None) -> tuple[dict[str, Any], bool]:
    """A report of plain JSON types, and whether every variant that can run here conforms (and at least one can).

    Raises:
        BundleError: the bundle can't be read or trusted.
    """
    report: dict[str, Any] = {
        "arllm": metadata.version("arllm"),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "tokenizers": metadata.version("tokenizers"),
        "onnxruntime": onnxruntime.__version__,
        "providers": ", ".join(onnxruntime.get_available_providers()),
        "machine": platform.machine(),
        "instruction sets": ", ".join(sorted(instruction_sets())) or "none known",
        "cores": cores(),
        "threads": "1 for each inference, unless Router.load(threads=…) says otherwise",
    }
    if bundle is None:
        return report, True
    opened = open_bundle(bundle)
    report["bundle"] = f"{opened.manifest.name} at {opened.path}, every file verified"
    verdicts: dict[str, Any] = {}
    for variant in opened.manifest.variants.values():
        reason = why_not(variant)
        if reason is not None:
            verdicts[variant.name] = {"runs": False, "verdict": f"can't run here: {reason}"}
            continue
        result = rerun(Router.of(opened, variant))
        if result.problems:
            verdict = f"does NOT conform: {len(result.problems)} problems in {result.texts} texts"
        else:
            verdict = (
                f"conforms on {result.texts} texts; largest difference: query vector "
                f"{result.query_vector_difference:.1e}, quality {result.quality_difference:.1e}"
            )
            if result.router_graph_difference is not None:
                verdict += f"; router.onnx decides alike (quality within {result.router_graph_difference:.1e})"
        verdicts[variant.name] = {"runs": True, "verdict": verdict, "problems": list(result.problems)}
    report["variants"] = verdicts
    healthy = any(v["runs"] for v in verdicts.values()) and not any(v.get("problems") for v in verdicts.values())
    return report, healthy
