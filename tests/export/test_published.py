"""Tests of export/published.py and `arllm export --nir-checkpoint`: published NIR weights route given vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from arllm.cli import main
from arllm.export.published import export_checkpoint
from arllm.runtime.conformance import rerun
from arllm.runtime.errors import ArllmError, ExportError, QueryError
from arllm.runtime.pool import Pool
from arllm.runtime.router import Router
from arllm.train.nir import Nir, build_nir, load_published
from arllm.train.pools import read_pool

DOMAINS = {"interaction": ("bbh", "math", "gpqa"), "ncf": ("bbh", "math", "gpqa", "musr")}
SHAPES = tuple(DOMAINS)


def checkpoint(folder: Path, shape: str) -> Path:
    torch.manual_seed(6)
    width = len(DOMAINS[shape])
    net = build_nir(shape, width + 1, width)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    torch.save(net.state_dict(), folder / f"{shape}.pth")
    return folder / f"{shape}.pth"


def models_info(folder: Path, domains: tuple[str, ...], form: str = "dict") -> Path:
    rng = np.random.default_rng(0)
    infos: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(("tiny-1b", "mid-8b", "big-70b")):
        values = (rng.random(len(domains)) * (0.4 + 0.2 * i) + 0.1 * i).round(4).tolist()
        vector = {f"{d}_acc": v for d, v in zip(domains, values, strict=True)}
        infos[name] = {**(vector if form != "vectors" else {"feature_vector": values}), "co2_cost": 1.0 + 4 * i}
    data: Any = infos if form == "dict" else [{"model": name, **info} for name, info in infos.items()]
    path = folder / "models_info.json"
    path.write_text(json.dumps(data))
    return path


def export(folder: Path, shape: str, domains: tuple[str, ...] | None = None, pool: Pool | None = None) -> Path:
    pool = pool or read_pool(models_info(folder, DOMAINS[shape]))
    path = checkpoint(folder, shape)
    export_checkpoint(path, domains or DOMAINS[shape], pool, folder / "out", progress=lambda message: None)
    return folder / "out"


def query_vectors(width: int, count: int = 30) -> np.ndarray:
    rng = np.random.default_rng(8)
    return np.concatenate([rng.dirichlet(np.ones(width), count), rng.random((count, 1))], axis=1).astype(np.float32)


def qualities_by_pytorch(net: Nir, vectors: np.ndarray, pool: Pool) -> np.ndarray:
    with torch.no_grad():
        logits = net.all_pairs(torch.from_numpy(vectors), torch.from_numpy(pool.vectors()))
    quality: np.ndarray = logits.sigmoid().numpy()
    return quality


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape → a folder with its checkpoint and the bundle `out`."""
    made = {shape: tmp_path_factory.mktemp(shape) for shape in SHAPES}
    for shape, folder in made.items():
        export(folder, shape)
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_checkpoint_routes_given_vectors_as_pytorch_does(shape: str, folders: dict[str, Path]) -> None:
    router = Router.load(folders[shape] / "out")
    assert router.variant == "cpu-fp32"
    assert set(router.policies) == {"nir", "hdp-paper"}
    vectors = query_vectors(len(DOMAINS[shape]))
    want = qualities_by_pytorch(load_published(folders[shape] / f"{shape}.pth"), vectors, router.pool)
    costs = (router.pool.costs - 1.0) / 8.0
    chosen = set()
    for beta in (0.0, 0.1, 0.3, 1.0):
        for vector, quality in zip(vectors, want, strict=True):
            decision = router.route_vector(vector, beta=beta)
            np.testing.assert_allclose(decision.qualities, quality, rtol=0, atol=1e-5)
            utility = (1 - beta) * quality - beta * costs
            assert utility.max() - utility[router.pool.names.index(decision.model)] <= 2e-5
            assert decision.query_vector.difficulty == pytest.approx(vector[-1])
            assert tuple(decision.query_vector.domains) == DOMAINS[shape]
            chosen.add(decision.model)
    assert len(chosen) > 1
    assert want.std(axis=0).max() > 1e-3


def test_the_bundle_says_that_it_holds_no_encoder(folders: dict[str, Path]) -> None:
    out = folders["interaction"] / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "conformance.jsonl",
        "cpu-fp32/nir.onnx",
        "manifest.json",
        "parity.json",
        "pool.json",
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokens"] is None
    unknown = {"domain_shares": None, "mean_difficulty": None}
    assert manifest["query"] == {"domains": ["bbh", "math", "gpqa"], "embedding_width": 0, **unknown}
    assert list(manifest["variants"][0]["graphs"]) == ["nir"]
    assert len(manifest["source"]["checkpoint"]["sha256"]) == 64
    card = (out / "README.md").read_text()
    assert "No query encoder" in card
    assert manifest["source"]["checkpoint"]["sha256"] in card
    router = Router.load(out)
    with pytest.raises(QueryError, match=r"no encoder .*call route_vector"):
        router.route("What is 17 + 25?")
    with pytest.raises(QueryError, match=r"shape \(3,\), the bundle expects \(4,\)"):
        router.route_vector([0.2, 0.3, 0.5])
    assert router.prior is None
    known, strange = (router.route_vector([0.2, 0.3, 0.5, 0.4], familiarity=f) for f in (1.0, 0.0))
    np.testing.assert_array_equal(strange.qualities, known.qualities)  # nothing to shrink toward
    router.warmup()
    result = rerun(router)
    assert result.problems == ()
    assert result.texts >= 10


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(folder: Path, shape: str, **arguments: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export(folder, shape, **arguments)
    left = {path.name for path in folder.iterdir()}
    assert left <= {f"{shape}.pth", "models_info.json"}  # neither out nor a staging folder
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_domains_must_fit_the_query_width(shape: str, tmp_path: Path) -> None:
    width = len(DOMAINS[shape])
    message = refusal(tmp_path, shape, domains=DOMAINS[shape][:-1])
    assert f"expects query vectors of {width + 1} entries" in message
    assert f"{width - 1} domains and the difficulty make {width}" in message
    assert f"name {width} domains" in message


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pools_vectors_must_fit_the_model_width(shape: str, tmp_path: Path) -> None:
    width = len(DOMAINS[shape])
    pool = read_pool(models_info(tmp_path, DOMAINS[shape][:2]))
    message = refusal(tmp_path, shape, pool=pool)
    assert f"expects model vectors of {width} entries, the pool's have 2" in message


def test_a_checkpoint_whose_two_widths_disagree(tmp_path: Path) -> None:
    torch.save(build_nir("ncf", 4, 5).state_dict(), tmp_path / "odd.pth")
    pool = read_pool(models_info(tmp_path, DOMAINS["interaction"]))
    with pytest.raises(ExportError, match="expects model vectors of 5 entries, the pool's have 3"):
        export_checkpoint(tmp_path / "odd.pth", DOMAINS["interaction"], pool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domains", [("a", "b", "a"), ("a", "", "b")])
def test_domains_are_distinct_names(domains: tuple[str, ...], tmp_path: Path) -> None:
    assert "distinct domains" in refusal(tmp_path, "interaction", domains=domains)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "ncf")
    state = torch.load(path, weights_only=True)
    state["output_layer.bias"].fill_(float("nan"))
    torch.save(state, path)
    pool = read_pool(models_info(tmp_path, DOMAINS["ncf"]))
    with pytest.raises(ArllmError):
        export_checkpoint(path, DOMAINS["ncf"], pool, tmp_path / "out", progress=lambda message: None)
    assert {p.name for p in tmp_path.iterdir()} == {"ncf.pth", "models_info.json"}


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export(tmp_path, "ncf")
    assert (tmp_path / "out" / "file").read_text() == "mine"


# --- the command line ---------------------------------------------------------------------------------------


def invoke(folder: Path, shape: str, *more: str, domains: str | None = None, form: str = "dict") -> Result:
    pool = models_info(folder, DOMAINS[shape], form)
    named = domains if domains is not None else ",".join(DOMAINS[shape])
    command = ["export", "--nir-checkpoint", str(checkpoint(folder, shape)), "--domains", named]
    return CliRunner().invoke(main, [*command, "--pool", str(pool), "--out", str(folder / "out"), *more])


@pytest.mark.parametrize(("shape", "form"), [("interaction", "dict"), ("ncf", "list"), ("interaction", "vectors")])
def test_every_form_of_models_info_feeds_it(shape: str, form: str, tmp_path: Path) -> None:
    result = invoke(tmp_path, shape, "--json", form=form)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["cpu-fp32"]["policies"]["nir"]["quality_max_difference"] < 1e-5
    router = Router.load(tmp_path / "out")
    vectors = query_vectors(len(DOMAINS[shape]), 3)
    pool = read_pool(tmp_path / "models_info.json")
    assert router.pool.names == pool.names == ("tiny-1b", "mid-8b", "big-70b")
    want = qualities_by_pytorch(load_published(tmp_path / f"{shape}.pth"), vectors, pool)
    np.testing.assert_allclose(router.predict(vectors), want, rtol=0, atol=1e-5)


def test_the_table_goes_to_stdout_and_progress_to_stderr(tmp_path: Path) -> None:
    result = invoke(tmp_path, "ncf")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split()[0] == "variant"
    assert result.stdout.splitlines()[1].split()[0] == "cpu-fp32"
    assert "verifying cpu-fp32" in result.stderr


def test_a_name_and_a_note_are_kept(tmp_path: Path) -> None:
    assert invoke(tmp_path, "ncf", "--name", "theirs", "--note", "published weights").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["name"], manifest["source"]["note"]) == ("theirs", "published weights")
    assert "- published weights" in (tmp_path / "out" / "README.md").read_text()
    (variant,) = manifest["variants"]
    assert (variant["graph"], variant["graph_reason"]) == ("authored", "NIR alone, without an encoder")


def test_a_width_mismatch_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = invoke(tmp_path, "interaction", domains="bbh,math")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "expects query vectors of 4 entries; 2 domains and the difficulty make 3" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_null_cost_is_refused_by_name(tmp_path: Path) -> None:
    pool = models_info(tmp_path, DOMAINS["ncf"])
    data = json.loads(pool.read_text())
    data["mid-8b"]["co2_cost"] = None
    pool.write_text(json.dumps(data))
    command = ["export", "--nir-checkpoint", str(checkpoint(tmp_path, "ncf")), "--domains", "bbh,math,gpqa,musr"]
    result = CliRunner().invoke(main, [*command, "--pool", str(pool), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "'mid-8b': co2_cost" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "out"],
        ["{pth}", "--nir-checkpoint", "{pth}", "--out", "out"],
        ["--nir-checkpoint", "{pth}", "--out", "out"],
        ["--nir-checkpoint", "{pth}", "--domains", "a,b,c,d", "--out", "out"],
        ["{pth}", "--domains", "a", "--out", "out"],
        ["--nir-checkpoint", "absent.pth", "--domains", "a", "--pool", "{pth}", "--out", "out"],
        ["--nir-checkpoint", "{pth}", "--domains", "a", "--pool", "{pth}", "--out", "out", "--variant", "cpu-fp32"],
        ["--nir-checkpoint", "{pth}", "--domains", "a", "--pool", "{pth}", "--out", "out", "--evaluation", "{pth}"],
        ["--nir-checkpoint", "{pth}", "--domains", "a", "--pool", "{pth}", "--out", "out", "--target", "avx2"],
        ["--nir-checkpoint", "{pth}", "--domains", "a", "--pool", "{pth}", "--out", "out", "--verify-queries", "9"],
    ],
)
def test_contradictory_arguments_are_usage_errors(arguments: list[str], tmp_path: Path) -> None:
    path = str(checkpoint(tmp_path, "ncf"))
    result = CliRunner().invoke(main, ["export", *(a.format(pth=path) for a in arguments)])
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
