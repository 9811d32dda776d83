"""Property tests of the authored graphs: a query's result depends on no neighbour, padding, thread or process.

On a processor with AVX-512 every sum is the same to the bit. Elsewhere ONNX Runtime's kernels may order the sums of a
padded query otherwise; float32's rounding then moves an activation over the edge between two integers, which
``parity.INVARIANCE`` bounds.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arllm.export import authored, authored_int8, parity
from arllm.runtime import decision as rule
from arllm.runtime.router import Router
from arllm.runtime.session import instruction_sets
from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import FULL, SLIDING, GemmaSpec
from arllm.train.encoder import EncoderSpec, QueryEncoder, pad_batch

BOUND = 0.0 if "avx512_vnni" in instruction_sets() else parity.INVARIANCE
BETAS = np.linspace(0.0, 1.0, 21)
VOCABULARY = 200
WIDE = GemmaSpec(  # heads as wide as Gemma's; the window binds early
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=256,
    window=9,
    layer_types=(SLIDING, FULL, SLIDING),
    query_pre_attn_scalar=256,
)
SHAPES = {
    "wide heads": WIDE,
    "grouped": dataclasses.replace(WIDE, num_heads=4, num_kv_heads=2, head_dim=16),
    "layerless": dataclasses.replace(WIDE, num_layers=0, layer_types=()),
}
# In float32 the last bit of every sum shows; in int8 most are rounded away.
GRAPHS = [("wide heads", "fp32"), *((shape, "int8") for shape in SHAPES)]
Sessions = dict[int, onnxruntime.InferenceSession]
LENGTHS = st.lists(st.integers(1, 90), min_size=2, max_size=5)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def write(spec: GemmaSpec, precision: str, folder: Path) -> Path:
    torch.manual_seed(1)
    encoder = QueryEncoder(EncoderSpec(spec, TokenSpec(256, (1,), (2,), 0), ("a", "b", "c"), 5, {}, 16)).eval()
    with torch.no_grad():
        for key, parameter in encoder.backbone.named_parameters():
            if "norm" in key:
                parameter.normal_(0.0, 0.3)
                if key.endswith("input_layernorm.weight"):
                    parameter[5] = 20.0  # an outlier, as pretrained backbones have
            elif key.endswith("proj.weight"):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    if precision == "fp32":
        return authored.export_authored(encoder, folder)
    rng = np.random.default_rng(0)
    queries = [rng.integers(3, VOCABULARY, size=length) for length in rng.integers(1, 60, size=80)]
    return authored_int8.export_authored_int8(encoder, folder, queries)


def open_graph(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=GRAPHS, ids=" ".join)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sessions]:
    """The graph's path, and sessions by their number of threads."""
    shape, precision = request.param
    path = write(SHAPES[shape], precision, tmp_path_factory.mktemp("graph"))
    return path, {threads: open_graph(path, threads) for threads in (1, 2)}


def vectors(session: onnxruntime.InferenceSession, ids: Any, mask: Any) -> NDArray[np.float32]:
    got: NDArray[np.float32] = session.run(["query_vector"], {"input_ids": ids, "attention_mask": mask})[0]
    return got


def alone(session: onnxruntime.InferenceSession, rows: Sequence[Any]) -> NDArray[np.float32]:
    ids = [np.array([row], dtype=np.int64) for row in rows]
    return np.concatenate([vectors(session, row, np.ones_like(row)) for row in ids])


@QUICK
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 2**32),
    padding=st.integers(0, 140),
    junk=st.integers(0, VOCABULARY - 1),
    threads=st.sampled_from((1, 2)),
)
def test_no_query_depends_on_its_batch(
    graph: tuple[Path, Sessions], lengths: list[int], seed: int, padding: int, junk: int, threads: int
) -> None:
    """Neighbours of other lengths, more padding than they ask for, another id beneath it, other threads."""
    _, sessions = graph
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCABULARY, size=length) for length in lengths]
    ids, mask = (tensor.numpy() for tensor in pad_batch(rows, junk))
    ids = np.pad(ids, ((0, 0), (0, padding)), constant_values=junk)
    together = vectors(sessions[threads], ids, np.pad(mask, ((0, 0), (0, padding))))
    assert np.abs(together - alone(sessions[1], rows)).max() <= BOUND


def test_another_process_says_the_same(graph: tuple[Path, Sessions]) -> None:
    path, sessions = graph
    rows = [[3 + (7 * i + k) % (VOCABULARY - 3) for i in range(length)] for k, length in enumerate((1, 9, 64, 90))]
    script = (
        "import sys, json, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "for row in json.loads(sys.argv[2]):\n"
        "    ids = numpy.array([row])\n"
        "    inputs = {'input_ids': ids, 'attention_mask': numpy.ones_like(ids)}\n"
        "    print(session.run(['query_vector'], inputs)[0].tobytes().hex())\n"
    )
    command = [sys.executable, "-c", script, str(path), str(rows)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    other = np.stack([np.frombuffer(bytes.fromhex(line), dtype=np.float32) for line in said])
    assert np.abs(other - alone(sessions[1], rows)).max() <= BOUND


TEXTS = st.lists(st.text(max_size=300), min_size=2, max_size=5)


@pytest.fixture(scope="module")
def routed(tiny_bundle: Path) -> tuple[Router, onnxruntime.InferenceSession]:
    return Router.load(tiny_bundle, variant="cpu-int8"), open_graph(tiny_bundle / "cpu-int8" / "encoder.onnx", 2)


@QUICK
@given(texts=TEXTS)
def test_no_route_depends_on_its_batch(routed: tuple[Router, onnxruntime.InferenceSession], texts: list[str]) -> None:
    """What a padded batch on two threads would choose is what the router chooses, for every beta."""
    router, session = routed
    ids, mask = (tensor.numpy() for tensor in pad_batch([router.tokenize(text)[0] for text in texts], 0))
    inputs = {"input_ids": ids, "attention_mask": mask}
    together, familiarity = session.run(["query_vector", "familiarity"], inputs)
    for i, text in enumerate(texts):
        quality = router.predict(together[i : i + 1], None, familiarity[i : i + 1])[0]
        for beta in BETAS:
            decision = router.route(text, float(beta))
            chosen = int(rule.choose(rule.utility(quality, router.normalized_costs, float(beta))))
            lost = float(decision.utilities.max() - decision.utilities[chosen])
            assert lost <= (rule.NUMERIC_TIE if BOUND == 0.0 else 2 * BOUND)
            if BOUND == 0.0:
                assert router.pool.names[chosen] == decision.model
