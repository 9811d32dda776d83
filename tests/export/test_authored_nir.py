"""Tests of export/authored_nir.py: both shapes say what PyTorch says, and the side of a pool is computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import dims, open_graph

from arllm.export.authored_nir import author_nir, export_nir
from arllm.runtime.constants import with_constant
from arllm.train.nir import InteractionNir, NcfNir, Nir, build_nir

NIR_WIDTHS = {"interaction": (4, 3), "ncf": (5, 4), "interaction with an embedding": (12, 3)}


@pytest.fixture(scope="module", params=list(NIR_WIDTHS))
def nir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Nir, Path]:
    """A NIR and its graph, exported while in training mode: exporting turns dropout off."""
    net = nir_of(request.param).train()
    return net, export_nir(net, tmp_path_factory.mktemp("nir"))


def nir_of(name: str) -> Nir:
    torch.manual_seed(4)
    net = build_nir(name.split()[0], *NIR_WIDTHS[name])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)  # logits of trained size
    return net


def test_nir_over_queries_and_candidates(nir: tuple[Nir, Path]) -> None:
    net, live = nir[0].eval(), open_graph(nir[1])
    rng = np.random.default_rng(0)
    for queries in (1, 3, 16):
        for candidates in (1, 3, 16):
            q = rng.random((queries, net.query_width), dtype=np.float32)
            m = rng.random((candidates, net.model_width), dtype=np.float32)
            (quality,) = live.run(["quality"], {"query_vectors": q, "model_vectors": m})
            with torch.no_grad():
                want = net.all_pairs(torch.from_numpy(q), torch.from_numpy(m)).sigmoid().numpy()
            assert quality.shape == (queries, candidates)
            np.testing.assert_allclose(quality, want, rtol=0, atol=1e-5)
    assert want.std(axis=0).min() > 1e-4
    assert want.std(axis=1).min() > 1e-4


def test_a_projection_of_zeros_has_no_nan_cosine(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net = nir_of("interaction")
    state = net.state_dict()
    state["q_proj.0.bias"].fill_(-9.0)  # ReLU leaves nothing
    net.load_state_dict(state)
    live = open_graph(export_nir(net.eval(), tmp_path))
    assert capfd.readouterr().out == ""  # stdout belongs to results
    q, m = np.ones((2, 4), np.float32), np.eye(3, dtype=np.float32)
    (quality,) = live.run(["quality"], {"query_vectors": q, "model_vectors": m})
    with torch.no_grad():
        want = net.all_pairs(torch.from_numpy(q), torch.from_numpy(m)).sigmoid().numpy()
    np.testing.assert_allclose(quality, want, rtol=0, atol=1e-5)


def test_names_and_dims_of_nir(nir: tuple[Nir, Path]) -> None:
    net, path = nir
    graph, real = onnx.load(str(path)).graph, onnx.TensorProto.FLOAT
    assert dims(graph.input) == {
        "query_vectors": (real, ["batch", net.query_width]),
        "model_vectors": (real, ["candidates", net.model_width]),
    }
    assert dims(graph.output) == {"quality": (real, ["batch", "candidates"])}
    assert [file.name for file in path.parent.iterdir()] == ["nir.onnx"]


@pytest.mark.parametrize("shape", [InteractionNir, NcfNir])
def test_published_networks_of_other_widths(shape: type[InteractionNir] | type[NcfNir], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = shape(7, 5, projection=6, hidden=(10, 9)).eval()
    q, m = torch.rand(3, 7), torch.rand(4, 5)
    (quality,) = open_graph(export_nir(net, tmp_path)).run(
        None, {"query_vectors": q.numpy(), "model_vectors": m.numpy()}
    )
    with torch.no_grad():
        np.testing.assert_allclose(quality, net.all_pairs(q, m).sigmoid().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(NIR_WIDTHS))
def test_the_side_of_a_pool_is_computed_once(name: str, tmp_path: Path) -> None:
    """With its model vectors constant, no product of theirs is left for the query."""
    net = nir_of(name).eval()
    vectors = np.random.default_rng(0).random((3, net.model_width), dtype=np.float32)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    bound = with_constant(export_nir(net, tmp_path).read_bytes(), "model_vectors", vectors)
    onnxruntime.InferenceSession(bound, options, providers=["CPUExecutionProvider"])
    left = onnx.load(str(tmp_path / "optimized.onnx")).graph
    fed = {"query_vectors"}
    for node in left.node:
        assert fed & set(node.input), f"{node.name} reads nothing of the query"
        fed |= set(node.output)
    products = [node for node in left.node if node.op_type in ("Gemm", "FusedGemm", "MatMul")]
    assert len(products) == 6


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="no graph is known for a Nir"):
        author_nir(Nir())
