"""OpenVINO's side of the engine comparison, run in an environment of its own: the traced fp32 graph in bf16 and int8.

    python openvino_worker.py GRAPH VOCABULARY

int8 is NNCF's post-training quantization for transformers, calibrated on random ids; what it leaves alone runs in
bf16. Shapes are dynamic, as a router needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from worker import serve


def start() -> tuple[dict[str, Callable[[Any], None]], dict[str, Any]]:
    import nncf
    import numpy as np
    import openvino

    graph, vocabulary = sys.argv[1], int(sys.argv[2])
    core = openvino.Core()
    model = core.read_model(graph)

    def inputs(ids: Any) -> dict[str, Any]:
        row = np.asarray(ids, dtype=np.int64)[None]
        return {"input_ids": row, "attention_mask": np.ones_like(row)}

    rng = np.random.default_rng(1)
    queries = [rng.integers(3, vocabulary, size=64) for _ in range(24)]
    quantized = nncf.quantize(
        core.read_model(graph),
        nncf.Dataset(queries, inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(queries),
    )
    arms: dict[str, Callable[[Any], None]] = {}
    for name, network in (("bf16", model), ("int8", quantized)):
        for threads in (1, 2):
            config = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "bf16",
            }
            request = core.compile_model(network, "CPU", config).create_infer_request()

            def run(ids: Any, request: Any = request) -> None:
                request.infer(inputs(ids))

            arms[f"{name}/{threads}"] = run
    return arms, {"versions": {"openvino": openvino.__version__, "nncf": nncf.__version__}}


if __name__ == "__main__":
    serve(start)
