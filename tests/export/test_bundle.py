"""Tests of export/bundle.py, conformance.py and card.py: what a published bundle holds and says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from arllm.export import authored, conformance, gemma
from arllm.export.bundle import Content, bundle_folder, export_run
from arllm.export.card import model_card
from arllm.runtime.calibration import calibrated, overall, shrunk, standing
from arllm.runtime.conformance import rerun
from arllm.runtime.errors import ExportError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router
from arllm.runtime.tokens import TokenSpec
from arllm.train.nir import build_nir
from arllm.train.rundir import Run, read_run

FILES = {
    "README.md",
    "conformance.jsonl",
    "cpu-fp32/encoder.onnx",
    "cpu-fp32/nir.onnx",
    "cpu-fp32/router.onnx",
    "cpu-fp32/weights.bin",
    "cpu-int8/encoder.onnx",
    "cpu-int8/nir.onnx",
    "cpu-int8/router.onnx",
    "cpu-int8/weights.bin",
    "manifest.json",
    "parity.json",
    "pool.json",
    "tokenizer.json",
}


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return read_run(tiny_run)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((tiny_bundle / "manifest.json").read_text())
    return data


def by_pytorch(run: Run, ids: torch.Tensor) -> tuple[np.ndarray, float, np.ndarray]:
    """(query vector, familiarity, quality): NIR by PyTorch, calibrated and shrunk."""
    vectors, mask = run.pool.vectors(), torch.ones_like(ids)
    with torch.no_grad():
        vector = run.encoder(ids, mask).query_vector
        familiarity = run.encoder.familiarity(ids, mask).numpy()
        bare = run.nir.all_pairs(vector, torch.from_numpy(vectors)).sigmoid().numpy()
    table = run.calibration.table(run.pool.names)
    quality = calibrated(run.calibration, table, bare, vector.numpy(), vectors)
    prior = vectors.astype(np.float64) @ np.array(run.domain_shares)
    known = overall(standing(prior, run.mean_difficulty), vector.numpy()[:, vectors.shape[1]])
    return vector.numpy()[0], float(familiarity[0]), shrunk(quality, familiarity, known)[0]


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- files and manifest -------------------------------------------------------------------------------------


def test_these_files_and_their_hashes(tiny_bundle: Path, manifest: dict[str, Any]) -> None:
    assert files_of(tiny_bundle) == FILES
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    for path, entry in manifest["files"].items():
        data = (tiny_bundle / path).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_the_manifest(run: Run, tiny_bundle: Path, manifest: dict[str, Any]) -> None:
    assert (manifest["schema_version"], manifest["name"]) == (3, tiny_bundle.name)
    assert manifest["query"] == {
        "domains": list(run.encoder.spec.domains),
        "embedding_width": 8,
        "domain_shares": list(run.domain_shares),
        "mean_difficulty": run.mean_difficulty,
    }
    assert TokenSpec.from_json(manifest["tokens"]) == run.encoder.spec.tokens
    assert manifest["default_policy"] == "nir"
    assert len(run.hdp.centre) == len(run.encoder.spec.domains)
    nir = {"shape": "interaction", "calibration": run.calibration.to_json()}
    assert manifest["policies"] == {"nir": nir, "hdp": run.hdp.to_json(), "hdp-paper": {}}
    costs = run.pool.costs
    assert manifest["cost"] == {"unit": run.pool.unit, "minimum": costs.min(), "maximum": costs.max()}
    for package in ("arllm", "torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
        assert manifest["producer"][package]
    source = manifest["source"]
    assert source["synthetic"] is True
    assert source["backbone"]["name"] == "nano"
    assert sum(source["splits"].values()) == 500
    assert all(len(entry["sha256"]) == 64 for entry in source["outcomes"])


def test_int8_comes_before_fp32(manifest: dict[str, Any]) -> None:
    """The order is that of preference for "auto"."""
    described = [(v["name"], v["precision"], v["provider"], v["instruction_set"]) for v in manifest["variants"]]
    assert described == [
        ("cpu-int8", "int8", "CPUExecutionProvider", "any"),
        ("cpu-fp32", "fp32", "CPUExecutionProvider", "any"),
    ]
    for variant in manifest["variants"]:
        summary = variant["parity"]
        assert summary["policy"] == "nir"
        assert {"quality_max_difference", "mean_regret", "agreement", "distinct_choices"} <= set(summary)
        assert set(summary["pooled_centred_cosine"]) == {"mean", "min"}
        assert set(summary["latency"]["ms"]) == {"16"}


def test_the_manifest_says_how_each_graph_was_made(manifest: dict[str, Any], run: Run) -> None:
    int8, fp32 = manifest["variants"]
    assert int8["graph"] == fp32["graph"] == "authored"
    assert fp32["graph_reason"] == "Gemma3TextModel of 2 layers"
    count = min(256, len(run.heldout.queries) // 4)
    assert f"calibrated on {count} held-out queries, apart from parity's" in int8["graph_reason"]
    assert "graph" not in manifest["source"]


def test_the_manifest_describes_each_graph(tiny_bundle: Path, manifest: dict[str, Any], run: Run) -> None:
    width, domains = run.encoder.spec.query_width, len(run.encoder.spec.domains)
    for variant in manifest["variants"]:
        encoder, nir = variant["graphs"]["encoder"], variant["graphs"]["nir"]
        assert encoder["path"] == f"{variant['name']}/encoder.onnx"
        assert encoder["inputs"] == [
            {"name": name, "dtype": "int64", "dims": ["batch", "tokens"]} for name in ("input_ids", "attention_mask")
        ]
        assert encoder["outputs"] == [
            {"name": "query_vector", "dtype": "float32", "dims": ["batch", width]},
            {"name": "familiarity", "dtype": "float32", "dims": ["batch"]},
            {"name": "pooled", "dtype": "float32", "dims": ["batch", 256]},
        ]
        assert nir["inputs"] == [
            {"name": "query_vectors", "dtype": "float32", "dims": ["batch", width]},
            {"name": "model_vectors", "dtype": "float32", "dims": ["candidates", domains]},
        ]
        assert nir["outputs"] == [{"name": "quality", "dtype": "float32", "dims": ["batch", "candidates"]}]


def test_weights_stand_outside_the_graph_and_inside_the_variant(tiny_bundle: Path) -> None:
    for variant in ("cpu-int8", "cpu-fp32"):
        model = onnx.load(str(tiny_bundle / variant / "encoder.onnx"), load_external_data=False)
        places = {
            entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"
        }
        assert places == {"weights.bin"}
    assert (tiny_bundle / "cpu-int8" / "weights.bin").stat().st_size < (
        0.4 * (tiny_bundle / "cpu-fp32" / "weights.bin").stat().st_size
    )


def test_the_gateways_user_may_read_it(tiny_bundle: Path) -> None:
    assert stat.S_IMODE(tiny_bundle.stat().st_mode) == 0o755
    for path in tiny_bundle.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_nothing_of_the_exporting_host_is_inside(tiny_bundle: Path) -> None:
    """Staging folder, home and source paths stay out; the outcome files' own paths are part of the record."""
    staging = f".{tiny_bundle.name}.".encode()
    package = str(Path(conformance.__file__).parents[1]).encode()
    for path in tiny_bundle.rglob("*.onnx"):
        data = path.read_bytes()
        assert staging not in data
        assert package not in data
        assert b"site-packages" not in data


# --- conformance --------------------------------------------------------------------------------------------


def test_conformance_covers_each_text_and_variant(tiny_bundle: Path, run: Run) -> None:
    rows = [json.loads(line) for line in (tiny_bundle / "conformance.jsonl").read_text().splitlines()]
    assert tuple(row["text"] for row in rows) == conformance.TEXTS
    tokenizer = run.text_tokenizer()
    for row in rows:
        ids, cut = tokenizer.encode(row["text"])
        assert row["ids"] == ids.tolist()
        assert (row["bytes_dropped"], row["tokens_dropped"]) == (cut.bytes_dropped, cut.tokens_dropped)
        assert set(row["expected"]) == {"cpu-int8", "cpu-fp32"}
        for expected in row["expected"].values():
            assert len(expected["query_vector"]) == run.encoder.spec.query_width
            assert set(expected["quality"]) == set(run.pool.names)
            assert 0.0 <= expected["familiarity"] <= 1.0
            assert set(expected["choice"]) == {"0", "0.25", "0.5", "0.75", "1"}
            assert expected["choice"]["1"] == run.pool.names[0]  # cost alone: the cheapest
    assert any(row["bytes_dropped"] for row in rows)
    assert any(row["tokens_dropped"] and not row["bytes_dropped"] for row in rows)


def test_conformance_is_what_pytorch_says(tiny_bundle: Path, run: Run) -> None:
    familiarities = set()
    for line in (tiny_bundle / "conformance.jsonl").read_text().splitlines():
        row = json.loads(line)
        vector, familiarity, quality = by_pytorch(run, torch.tensor([row["ids"]]))
        expected = row["expected"]["cpu-fp32"]
        np.testing.assert_allclose(expected["query_vector"], vector, rtol=0, atol=1e-4)
        assert expected["familiarity"] == pytest.approx(familiarity, abs=1e-4)
        np.testing.assert_allclose([expected["quality"][n] for n in run.pool.names], quality, atol=1e-4)
        familiarities.add(expected["familiarity"])
    assert len(familiarities) > 1


def test_this_host_conforms(tiny_bundle: Path) -> None:
    for variant in ("cpu-int8", "cpu-fp32"):
        result = rerun(Router.load(tiny_bundle, variant=variant))
        assert result.problems == ()
        assert result.texts == len(conformance.TEXTS)


# --- other runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ncf_run(run: Run) -> Run:
    """The tiny run with an untrained NIR of the other shape, and a candidate without held-out outcomes."""
    torch.manual_seed(2)
    nir = build_nir("ncf", run.encoder.spec.query_width, len(run.encoder.spec.domains)).eval()
    correct = run.heldout.correct.copy()
    correct[:, 0] = np.nan  # the cheapest candidate: at beta 1 every choice
    return dataclasses.replace(run, nir=nir, heldout=dataclasses.replace(run.heldout, correct=correct))


@pytest.fixture(scope="module")
def ncf_bundle(ncf_run: Run, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its encoder is the tiny bundle's: the graph is taken from there, not written again."""

    def authored_before(_: Any, folder: Path) -> None:
        for name in ("encoder.onnx", "weights.bin"):
            shutil.copyfile(tiny_bundle / "cpu-fp32" / name, folder / name)

    out = tmp_path_factory.mktemp("ncf") / "deeper" / "bundle"
    arguments: dict[str, Any] = {"variants": ("cpu-fp32",), "verify_queries": 20, "progress": lambda message: None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authored, "export_authored", authored_before)
        export_run(ncf_run, out, name="two towers", **arguments)
    return out


def test_the_ncf_shape_exports_and_routes_as_pytorch_does(ncf_bundle: Path, ncf_run: Run) -> None:
    router = Router.load(ncf_bundle)
    assert router.bundle.manifest.policies["nir"]["shape"] == "ncf"
    assert router.bundle.manifest.name == "two towers"
    for text in ("What is 17 + 25?", "", "Sort: b a c " * 40):
        ids = torch.from_numpy(ncf_run.text_tokenizer().encode(text)[0])[None]
        want = by_pytorch(ncf_run, ids)[2]
        decision = router.route(text, beta=0.0)
        np.testing.assert_allclose(decision.qualities, want, rtol=0, atol=1e-4)
        assert decision.model == ncf_run.pool.names[int(want.argmax())]


def test_one_variant_alone_holds_that_alone(ncf_bundle: Path) -> None:
    assert files_of(ncf_bundle) == {path for path in FILES if not path.startswith("cpu-int8")}
    assert [p.name for p in ncf_bundle.parent.iterdir()] == ["bundle"]  # the parents were made, no staging is left


def test_a_backbone_that_can_not_be_authored_is_traced(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma, "supports", lambda backbone: "its layers are of another kind")
    export_run(run, tmp_path / "out", verify_queries=20, progress=lambda message: None)
    for variant in json.loads((tmp_path / "out" / "manifest.json").read_text())["variants"]:
        assert (variant["graph"], variant["graph_reason"]) == ("traced", "its layers are of another kind")
        assert (
            Router.load(tmp_path / "out", variant=variant["name"]).bundle.manifest.variants[variant["name"]].graph
            == "traced"
        )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- cpu-int8: traced, its layers are of another kind." in card


@pytest.mark.parametrize("target", ["avx512", "", "any"])
def test_unknown_targets_name_the_choices(target: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unknown target .*: choose among auto, avx512_vnni, avx2, arm64"):
        export_run(run, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


# --- staging ------------------------------------------------------------------------------------------------


def test_staging_is_beside_the_target_and_private_until_it_is_whole(tmp_path: Path) -> None:
    with bundle_folder(tmp_path / "out") as staging:
        assert staging.parent == tmp_path
        assert stat.S_IMODE(staging.stat().st_mode) == 0o700
        (staging / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="out"), bundle_folder(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "file").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_targets_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="exists already"), bundle_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


# --- model card ---------------------------------------------------------------------------------------------


def test_the_card_states_data_splits_metrics_limits_licenses(tiny_bundle: Path, run: Run) -> None:
    card = (tiny_bundle / "README.md").read_text()
    assert card.startswith(f"# {tiny_bundle.name}")
    assert "SYNTHETIC outcomes of simulated candidates. No quality claim rests on it." in card
    assert "license Apache-2.0" in card
    assert "## Data and splits" in card
    for entry in run.source["outcomes"]:
        assert entry["sha256"] in card
    assert f"trained on {run.source['training_queries']}, seed 0" in card
    assert f"## Metrics (val split, {run.metrics['queries']} queries)" in card
    assert f"**{run.metrics['auc_mean']:.3f}**" in card
    for name in run.pool.names:
        assert f"| {name} | " in card
    assert "| cpu-int8 | " in card
    assert "| cpu-fp32 | " in card
    assert "## Limits" in card


def content(**source: Any) -> Content:
    backbone = {"name": "gemma3-270m", "revision": "sha256:abc", "license": "Gemma Terms of Use", "note": "4 bits"}
    return Content(
        name="other",
        source={"backbone": backbone, **source},
        domains=("a",),
        embedding_width=0,
        domain_shares=None,
        mean_difficulty=None,
        tokens=TokenSpec(64, (1,), (2,), 0),
        policies={"nir": {}},
        pool=Pool((Candidate("m", 1.0, (0.5,)),), "USD"),
        metrics={
            "split": "val",
            "queries": 3,
            "auc": {"m": None},
            "auc_mean_per_subset": {"m": 0.5},
            "auc_mean": None,
            "auc_mean_per_subset_mean": 0.5,
            "brier": 0.25,
            "domain_accuracy": None,
        },
    )


def test_real_outcomes_are_not_called_synthetic() -> None:
    assert "SYNTHETIC" not in model_card(content(synthetic=False), {}, {})
    assert "SYNTHETIC" in model_card(content(synthetic=True), {}, {})


def test_gemma_weights_carry_gemmas_terms() -> None:
    card = model_card(content(note="for a test"), {}, {})
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in card
    assert "`gemma3-270m` (4 bits), revision sha256:abc, license Gemma Terms of Use" in card
    assert "- for a test" in card


def test_a_figure_that_was_not_measured_is_a_dash() -> None:
    assert "| m | – | 0.500 |" in model_card(content(), {}, {})
