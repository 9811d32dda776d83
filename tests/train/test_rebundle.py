"""Tests of train/rebundle.py: the new bundle is whole, decides as the old one, and failures leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime import session
from arllm.runtime.bundle import Bundle, open_bundle
from arllm.runtime.conformance import rerun
from arllm.runtime.errors import (
    BundleIntegrityError,
    BundleSchemaError,
    ExportError,
    PoolError,
    VariantError,
)
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router
from arllm.train.rebundle import HEADING, add_candidate

NOTE = "Its vector was made up."


@pytest.fixture(scope="module")
def old(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def newcomer(old: Bundle) -> Candidate:
    """As good as possible everywhere, at the cost of a candidate in the middle."""
    middle = old.pool.candidates[len(old.pool) // 2]
    return Candidate("new/one", middle.cost, tuple([0.99] * len(old.manifest.domains)))


@pytest.fixture(scope="module")
def made(old: Bundle, newcomer: Candidate, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("new") / "with-one"
    return add_candidate(old, newcomer, out, NOTE, addition={"queries": 30})


def test_the_new_bundle_is_whole_and_conforms(old: Bundle, made: Bundle, newcomer: Candidate) -> None:
    opened = open_bundle(made.path)  # every sha256
    assert opened.digest == made.digest != old.digest
    assert set(opened.pool.names) == {*old.pool.names, "new/one"}
    assert newcomer in opened.pool.candidates
    for variant in opened.manifest.variants:
        result = rerun(Router.load(made.path, variant=variant))
        assert result.problems == ()
        assert result.texts == len((old.path / "conformance.jsonl").read_text(encoding="utf-8").split("\n")) - 1
    expected = json.loads((made.path / "conformance.jsonl").read_text(encoding="utf-8").split("\n")[0])["expected"]
    assert all("new/one" in of["quality"] for of in expected.values())


def test_graphs_tokenizer_and_parity_are_the_old_ones(old: Bundle, made: Bundle) -> None:
    changed = {p for p, entry in made.manifest.files.items() if old.manifest.files.get(p) != entry}
    assert changed == {"pool.json", "conformance.jsonl", "README.md"}
    assert set(made.manifest.files) == set(old.manifest.files)
    kept = ("schema_version", "producer", "query", "tokens", "policies", "default_policy", "variants")
    assert {key: made.manifest.raw[key] for key in kept} == {key: old.manifest.raw[key] for key in kept}


def test_known_candidates_keep_what_policies_say_of_them_and_the_newcomer_is_chosen_where_it_is_best(
    old: Bundle, made: Bundle, newcomer: Candidate
) -> None:
    before, after = Router.load(old.path), Router.load(made.path)
    vectors = np.stack([before.encode(text).vector for text in ("Hello!", "What is 17 + 25?")])
    kept = [after.pool.names.index(name) for name in before.pool.names]
    for policy in before.policies:  # bare: calibration and shrinkage set a level by the whole pool
        was = before.quality_of(policy).predict(vectors, before.pool.vectors())
        now = after.quality_of(policy).predict(vectors, after.pool.vectors())
        assert now[:, kept] == pytest.approx(was, abs=1e-6)
    assert after.normalized_costs[kept] == pytest.approx(before.normalized_costs)
    assert after.route("What is 17 + 25?", beta=0.0, policy="hdp").model == newcomer.name


def test_the_manifest_and_the_card_say_what_was_added(old: Bundle, made: Bundle, newcomer: Candidate) -> None:
    (entry,) = made.manifest.source["additions"]
    assert entry["name"] == "new/one"
    assert entry["queries"] == 30
    assert entry["to"] == {"name": old.manifest.name, "digest": old.digest}
    assert made.manifest.name == "with-one"
    card = (made.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith((old.path / "README.md").read_text(encoding="utf-8").rstrip())
    assert f"- `new/one`, cost {newcomer.cost:g} {made.pool.unit}, added to `tiny`" in card
    assert NOTE in card


def test_a_second_newcomer_widens_the_cost_bounds_and_stands_below_the_first(
    old: Bundle, made: Bundle, tmp_path: Path
) -> None:
    dearest = old.manifest.cost_maximum
    vector = tuple([0.5] * len(old.manifest.domains))
    second = add_candidate(made, Candidate("new/two", 2 * dearest, vector), tmp_path / "two", "Also made up.")
    assert (second.manifest.cost_minimum, second.manifest.cost_maximum) == (old.manifest.cost_minimum, 2 * dearest)
    assert [entry["name"] for entry in second.manifest.source["additions"]] == ["new/one", "new/two"]
    card = (second.path / "README.md").read_text(encoding="utf-8")
    assert card.count(HEADING) == 1
    assert card.index("`new/one`") < card.index("`new/two`")
    assert rerun(Router.load(second.path)).problems == ()


def test_offsets_become_the_candidates_row_of_the_calibration(
    old: Bundle, newcomer: Candidate, made: Bundle, tmp_path: Path
) -> None:
    width = 1 + len(old.manifest.domains)
    row = [2.0, *[0.0] * (width - 1)]
    shifted = add_candidate(old, newcomer, tmp_path / "shifted", NOTE, row)
    calibration = shifted.manifest.policies["nir"]["calibration"]
    assert calibration["offsets"]["new/one"] == row
    assert set(calibration["offsets"]) - {"new/one"} == set(old.manifest.policies["nir"]["calibration"]["offsets"])
    vector = np.full((1, old.manifest.query_width), 0.1, dtype=np.float32)
    plain, raised = (Router.load(b.path).predict(vector, "nir")[0] for b in (made, shifted))
    at = made.pool.names.index("new/one")
    default = old.manifest.policies["nir"]["calibration"]["default"]
    logits = [np.log(q[at] / (1 - q[at])) for q in (plain, raised)]
    assert logits[1] - logits[0] == pytest.approx(2.0 - default[0] - 0.1 * sum(default[1:]), abs=1e-3)
    with pytest.raises(ExportError, match=f"has 1 calibration offsets, the bundle's have {width}"):
        add_candidate(old, newcomer, tmp_path / "narrow", NOTE, [1.0])
    assert not (tmp_path / "narrow").exists()


def refused(bundle: Bundle, candidate: Candidate, folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        add_candidate(bundle, candidate, folder / "out", NOTE)
    assert list(folder.iterdir()) == []


def test_what_is_refused_leaves_nothing_behind(
    old: Bundle, newcomer: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = old.pool.names[0]
    refused(old, Candidate(known, 1.0, newcomer.vector), tmp_path, PoolError, f"the pool holds '{known}' already")
    refused(old, Candidate("x", 1.0), tmp_path, PoolError, "candidate 'x' has no model vector")
    refused(old, Candidate("x", 1.0, (0.5,)), tmp_path, PoolError, "different widths")
    monkeypatch.setattr(session, "why_not", lambda v: "needs a GPU" if v.name == "cpu-fp32" else None)
    refused(
        old, newcomer, tmp_path, VariantError, "variant 'cpu-fp32' can't run here: needs a GPU; .* on a host that"
    )


def test_an_existing_out_is_refused(old: Bundle, newcomer: Candidate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(ExportError, match="out: exists already; a bundle is never changed in place"):
        add_candidate(old, newcomer, tmp_path / "out", NOTE)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_file_changed_after_opening_is_not_copied(old: Bundle, newcomer: Candidate, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(old.path, copy)
    opened = open_bundle(copy)
    graph = next(iter(opened.manifest.variants.values())).nir
    assert graph is not None
    with (copy / graph.path).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleIntegrityError, match=r"nir\.onnx: its sha256 differs"):
        add_candidate(opened, newcomer, tmp_path / "out", NOTE)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is malformed or has no text"),
        (b'{"text": "a"}\nnot json\n', "line 2 is malformed"),
        (b'{"text": 7}\n', "line 1"),
        (b"", "line 1 is malformed"),
    ],
)
def test_a_malformed_conformance_file_is_named(
    old: Bundle, newcomer: Candidate, tmp_path: Path, content: bytes, match: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(old.path, copy)
    rewrite(copy, "conformance.jsonl", content)
    with pytest.raises(BundleSchemaError, match=rf"conformance\.jsonl: {match}"):
        add_candidate(open_bundle(copy), newcomer, tmp_path / "out", NOTE)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def rewrite(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and make the manifest fit."""
    (bundle / name).write_bytes(content)
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_bundle_without_an_encoder_is_recorded_over_its_vectors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from arllm.export.published import export_checkpoint
    from arllm.train.nir import build_nir

    torch.manual_seed(0)
    torch.save(build_nir("interaction", 4, 3).state_dict(), tmp_path / "nir.pth")
    pool = Pool((Candidate("a", 1.0, (0.2, 0.4, 0.6)), Candidate("b", 2.0, (0.5, 0.5, 0.9))), "USD")
    export_checkpoint(tmp_path / "nir.pth", ("x", "y", "z"), pool, tmp_path / "old", progress=lambda message: None)
    made = add_candidate(open_bundle(tmp_path / "old"), Candidate("c", 0.5, (0.1, 0.9, 0.3)), tmp_path / "new", NOTE)
    result = rerun(Router.load(made.path))
    assert result.problems == ()
    assert result.texts > 1
    first = json.loads((made.path / "conformance.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert set(next(iter(first["expected"].values()))["quality"]) == {"a", "b", "c"}
    with pytest.raises(ExportError, match="offsets, but no policy of the bundle is calibrated"):
        add_candidate(made, Candidate("d", 0.5, (0.1, 0.9, 0.3)), tmp_path / "newer", NOTE, [0.0] * 4)
