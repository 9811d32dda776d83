"""Tests of CUDA variants in a bundle: exported where no card is, and where one is, which a session stands in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from arllm.export import parity
from arllm.export.bundle import export_run
from arllm.export.cuda_kernels import unsupported
from arllm.runtime import session
from arllm.runtime.bundle import open_bundle
from arllm.runtime.conformance import rerun
from arllm.runtime.devices import CudaDevice
from arllm.runtime.errors import ExportError, ParityError, VariantError
from arllm.runtime.router import Router
from arllm.runtime.tables import variants as table_of
from arllm.train.rundir import read_run

H100 = CudaDevice("NVIDIA H100", (9, 0))


def quiet(message: str) -> None:
    """Progress that nobody reads."""


class Card:
    """Stands in for ONNX Runtime's session on a card: the graph runs on the CPU."""

    real: Any = session.onnxruntime.InferenceSession

    def __init__(self, source: Any, options: Any, providers: list[Any], **more: Any) -> None:
        self._asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
        kept = options if self._asked == session.CPU else None  # a card's say that the CPU must not be used
        self._real = self.real(source, kept, providers=[session.CPU])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [self._asked]


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    monkeypatch.setattr(session.onnxruntime, "InferenceSession", Card)
    monkeypatch.setattr(session, "cuda_devices", lambda: (H100,))
    monkeypatch.setattr("arllm.export.cuda.cuda_devices", lambda: (H100,))


@pytest.fixture(scope="module")
def unseen(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both CUDA variants, exported where no card is. Read-only."""
    out = tmp_path_factory.mktemp("bundles") / "unseen"
    export_run(read_run(tiny_run), out, variants=("cuda-fp32", "cpu-fp32", "cuda-bf16"), progress=quiet)
    return out


def test_no_card_verified_it_and_the_bundle_says_so(unseen: Path) -> None:
    bundle = open_bundle(unseen)
    variants = bundle.manifest.variants
    assert list(variants) == ["cpu-fp32", "cuda-bf16", "cuda-fp32"]  # auto takes what was seen to run
    assert [variants[name].verified_on for name in variants] == [None, (), ()]
    assert variants["cuda-bf16"].provider == session.CUDA
    assert variants["cuda-bf16"].precision == "bf16"
    assert variants["cuda-bf16"].router is None
    assert "- cuda-bf16: verified on no card" in (unseen / "README.md").read_text(encoding="utf-8")
    assert table_of(bundle.manifest).count("verified on no card") == 2
    for name in ("cuda-bf16", "cuda-fp32"):
        assert unsupported(onnx.load(str(unseen / name / "encoder.onnx"))) == []


def test_its_figures_are_of_the_emulated_graph(unseen: Path) -> None:
    reports = json.loads((unseen / "parity.json").read_text(encoding="utf-8"))["variants"]
    assert reports["cuda-bf16"]["verified_on"] == []
    assert reports["cuda-fp32"]["query_vector_max_difference"] < parity.FP32_TOLERANCE
    assert reports["cuda-bf16"]["query_vector_max_difference"] > parity.FP32_TOLERANCE
    assert reports["cuda-bf16"]["policies"]["nir"]["mean_regret"] < parity.BF16_REGRET
    assert "verified_on" not in reports["cpu-fp32"]
    assert "latency" not in reports["cuda-bf16"]
    expected = json.loads((unseen / "conformance.jsonl").read_text(encoding="utf-8").splitlines()[0])["expected"]
    assert list(expected) == ["cpu-fp32"]


def test_auto_routes_on_the_cpu_and_cuda_is_refused_here(unseen: Path) -> None:
    assert Router.load(unseen).route("x").variant == "cpu-fp32"
    with pytest.raises(VariantError, match="variant 'cuda-bf16' can't run here: needs CUDAExecutionProvider"):
        Router.load(unseen, variant="cuda-bf16")


def test_a_card_met_later_is_held_against_what_the_cpu_said(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert Router.load(unseen).variant == "cpu-fp32"  # still: nobody has seen the other
    result = rerun(Router.load(unseen, variant="cuda-fp32"))
    assert result.problems == ()
    assert result.texts > 10


def test_a_card_is_measured_recorded_and_preferred(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    out = tmp_path / "seen"
    report = export_run(read_run(tiny_run), out, variants=("cpu-fp32", "cuda-fp32"), progress=quiet)
    variants = open_bundle(out).manifest.variants
    assert list(variants) == ["cuda-fp32", "cpu-fp32"]
    assert variants["cuda-fp32"].verified_on == ("NVIDIA H100",)
    assert report["cuda-fp32"]["latency"]["ms"]
    assert "- cuda-fp32: verified on NVIDIA H100." in (out / "README.md").read_text(encoding="utf-8")
    assert Router.load(out).route("x").variant == "cuda-fp32"
    assert rerun(Router.load(out, variant="cuda-fp32")).problems == ()


def test_a_bundle_that_nothing_here_runs_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no card here runs cuda-fp32: name cpu-fp32 too"):
        export_run(read_run(tiny_run), tmp_path / "out", variants=("cuda-fp32",), progress=quiet)
    assert not list(tmp_path.iterdir())


def test_bfloat16_has_a_bound_of_its_own() -> None:
    figures = {"quality_max_difference": 1.0, "differing_choices": 9, "mean_regret": 0.0015, "accuracy_loss": None}
    report = {"policies": {"nir": figures}, "near_ties": {}}
    parity.check(report, "cpu-int8", "int8")
    with pytest.raises(
        ParityError, match=r"cuda-bf16: nir policies: mean utility regret is 0\.0015, the bound is 0\.001"
    ):
        parity.check(report, "cuda-bf16", "bf16")
