"""Tests of runtime/bundle.py: hostile and broken bundles are refused with the file's name; loading writes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime import bundle as bundle_module
from arllm.runtime import tables
from arllm.runtime.bundle import find_bundle, open_bundle, parse_manifest
from arllm.runtime.errors import (
    ArllmError,
    BundleError,
    BundleIntegrityError,
    BundleIOMismatchError,
    BundleNotFoundError,
    BundleSchemaError,
)
from arllm.runtime.router import Router

Change = Callable[[dict[str, Any]], object]

FILES = [
    "README.md",
    "conformance.jsonl",
    "cpu-fp32/encoder.onnx",
    "cpu-fp32/nir.onnx",
    "cpu-fp32/router.onnx",
    "cpu-fp32/weights.bin",
    "cpu-int8/encoder.onnx",
    "parity.json",
    "pool.json",
    "tokenizer.json",
]


def refused(path: Path, error: type[BundleError], *parts: str, **options: Any) -> None:
    """Loading raises exactly this error, and its message holds every part."""
    with pytest.raises(BundleError) as caught:
        Router.load(path, **options)
    assert type(caught.value) is error, caught.value
    for part in parts:
        assert part in str(caught.value)


def snapshot(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (root, *sorted(root.rglob("*")))
    }


def test_the_list_of_files_above_is_complete(tiny_bundle: Path) -> None:
    listed = json.loads((tiny_bundle / "manifest.json").read_bytes())["files"]
    assert set(FILES) <= set(listed)
    kinds = {Path(path).name for path in listed}
    assert kinds == {Path(path).name for path in FILES}


def test_an_untouched_copy_loads(bundle_copy: Any) -> None:
    opened = open_bundle(bundle_copy.path)
    assert opened.path == bundle_copy.path
    assert opened.digest == hashlib.sha256((bundle_copy.path / "manifest.json").read_bytes()).hexdigest()
    assert list(opened.manifest.variants) == ["cpu-int8", "cpu-fp32"]
    Router.load(str(bundle_copy.path))


def test_loading_and_routing_write_nothing(bundle_copy: Any) -> None:
    before = snapshot(bundle_copy.path)
    for variant in ("auto", "cpu-fp32"):
        for verify in (True, False):
            Router.load(bundle_copy.path, variant=variant, verify=verify).route("What is 17 + 25?")
    assert snapshot(bundle_copy.path) == before


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(bundle_copy: Any, name: str) -> None:
    path = bundle_copy.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(bundle_copy.path, BundleIntegrityError, str(path), "sha256")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(bundle_copy: Any, name: str, verify: bool) -> None:
    (bundle_copy.path / name).unlink()
    refused(bundle_copy.path, BundleIntegrityError, str(bundle_copy.path / name), "missing", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "name", ["extra.txt", "cpu-fp32/extra.onnx", "more/nested/x.bin", ".hidden", "cpu-fp32/manifest.json"]
)
def test_an_extra_file_is_found(bundle_copy: Any, name: str, verify: bool) -> None:
    path = bundle_copy.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    refused(bundle_copy.path, BundleIntegrityError, str(path), "not listed", verify=verify)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: data + b"\0"]
)
@pytest.mark.parametrize("name", ["cpu-fp32/weights.bin", "cpu-fp32/nir.onnx", "pool.json"])
def test_another_size_is_found_without_hashing(bundle_copy: Any, name: str, change: Callable[[bytes], bytes]) -> None:
    path = bundle_copy.path / name
    path.write_bytes(change(path.read_bytes()))
    refused(bundle_copy.path, BundleIntegrityError, str(path), "bytes, manifest.json says", verify=False)


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "cpu-fp32", "surplus", "cpu-fp32/surplus"])
def test_links_are_refused(bundle_copy: Any, tmp_path: Path, name: str) -> None:
    path, elsewhere = bundle_copy.path / name, tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)  # the same content, behind a link
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere)
    for verify in (True, False):
        refused(bundle_copy.path, BundleIntegrityError, str(path), "links", verify=verify)


def test_a_link_to_nothing_and_a_pipe_are_refused(bundle_copy: Any) -> None:
    (bundle_copy.path / "dangling").symlink_to("nowhere")
    refused(bundle_copy.path, BundleIntegrityError, "dangling", "links")
    (bundle_copy.path / "dangling").unlink()
    os.mkfifo(bundle_copy.path / "pipe")
    refused(bundle_copy.path, BundleIntegrityError, "pipe", "devices")


PATHS = [
    "../outside.bin",
    "cpu-fp32/../../outside.bin",
    "cpu-fp32/..",
    "..",
    "/etc/passwd",
    "cpu-fp32\\encoder.onnx",
    "..\\outside.bin",
    "C:/outside.bin",
    "./pool.json",
    "cpu-fp32//nir.onnx",
    "cpu-fp32/",
    "",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_leave_the_bundle_are_refused(bundle_copy: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "outside.bin").write_bytes(b"x")
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    bundle_copy.edit(lambda data: data["files"].update({path: entry}))
    refused(bundle_copy.path, BundleIntegrityError, "manifest.json", repr(path), "inside the bundle")


def set_graph(**fields: Any) -> Change:
    """Change the nir graph of cpu-int8, the first variant."""
    return lambda data: data["variants"][0]["graphs"]["nir"].update(fields)


BROKEN: list[tuple[Change, str]] = [
    (lambda data: data.update(schema_version=4), "schema version 4 is newer than 3: pip install"),
    (lambda data: data.update(schema_version=0), "schema_version"),
    (lambda data: data.update(schema_version=True), "schema_version: unexpected bool"),
    (lambda data: data.update(schema_version="1"), "schema_version: unexpected str"),
    (lambda data: data.pop("schema_version"), "schema_version: missing"),
    (lambda data: data.update(name=None), "name: unexpected NoneType"),
    (lambda data: data.update(producer=[]), "producer: unexpected list"),
    (lambda data: data.pop("source"), "source: missing"),
    (lambda data: data.update(query=[]), "query: unexpected list"),
    (lambda data: data["query"].update(domains=[]), "query.domains"),
    (lambda data: data["query"].update(domains=["a", "a"]), "query.domains"),
    (lambda data: data["query"].update(domains=["a", 5]), "query.domains"),
    (lambda data: data["query"].update(embedding_width=-1), "query.embedding_width"),
    (lambda data: data["query"].update(embedding_width=8.0), "query.embedding_width: unexpected float"),
    (lambda data: data["query"].update(domain_shares="half"), "query.domain_shares: unexpected str"),
    (lambda data: data["query"].update(domain_shares=[0.5, 0.5]), "query.domain_shares: expected 9 numbers"),
    (lambda data: data["query"]["domain_shares"].__setitem__(0, 1.5), "query.domain_shares: expected 9 numbers in"),
    (lambda data: data["query"]["domain_shares"].__setitem__(1, True), "query.domain_shares: expected 9 numbers"),
    (lambda data: data["query"]["domain_shares"].__setitem__(2, float("nan")), "query.domain_shares: expected 9"),
    (lambda data: data["query"].update(mean_difficulty="hard"), "query.mean_difficulty: unexpected str"),
    (lambda data: data["query"].update(mean_difficulty=1.5), "query.mean_difficulty: must lie in [0, 1]"),
    (lambda data: data["query"].update(mean_difficulty=float("nan")), "query.mean_difficulty: must lie in"),
    (lambda data: data["policies"]["nir"].update(calibration=[]), "policies.nir: calibration: expected ability"),
    (lambda data: data.update(tokens=[]), "tokens: unexpected list"),
    (lambda data: data.update(tokens=None), "tokens"),
    (lambda data: data["tokens"].pop("pad_id"), "tokens: unusable entry"),
    (lambda data: data["tokens"].update(max_tokens=1), "tokens: unusable entry"),
    (lambda data: data["policies"].update(best={}), "policies: unknown policy 'best'"),
    (lambda data: data["policies"].update(hdp=[]), "policies.hdp"),
    (lambda data: data["policies"]["hdp"].pop("slope"), "policies.hdp"),
    (lambda data: data["policies"]["hdp"].update(slope=float("nan")), "policies.hdp"),
    (lambda data: data.update(default_policy="best"), "default_policy"),
    (lambda data: data.update(policies={}), "default_policy"),
    (lambda data: data["cost"].update(minimum="0"), "cost.minimum: unexpected str"),
    (lambda data: data["cost"].pop("maximum"), "cost.maximum: missing"),
    (lambda data: data["cost"].update(maximum=float("nan")), "cost: expected finite bounds"),
    (lambda data: data["cost"].update(maximum=10**400), "cost: expected finite bounds"),
    (lambda data: data["cost"].update(minimum=5.0, maximum=1.0), "cost: expected finite bounds"),
    (lambda data: data.update(variants=[]), "variants: the bundle has none"),
    (lambda data: data.update(variants={}), "variants: unexpected dict"),
    (lambda data: data.update(variants=["cpu"]), "variants[0]: expected an object"),
    (lambda data: data["variants"].append(data["variants"][0]), "variants[2].name: 'cpu-int8' stands there twice"),
    (lambda data: data["variants"][1].pop("provider"), "variants[1].provider: missing"),
    (lambda data: data["variants"][1].update(graphs=5), "variants[1].graphs: unexpected int"),
    (lambda data: data["variants"][1]["graphs"].update(decoder={}), "variants[1].graphs.decoder: unknown graph"),
    (lambda data: data["variants"][1]["graphs"].pop("encoder"), "tokens: variant cpu-fp32"),
    (lambda data: data["variants"][1].update(graph=3), "variants[1].graph: unexpected int"),
    (lambda data: data["variants"][1]["graphs"].pop("nir"), "variant cpu-fp32 has no nir graph"),
    (set_graph(path=5), "variants[0].graphs.nir.path: unexpected int"),
    (set_graph(path="cpu-int8/other.onnx"), "files: cpu-int8/other.onnx is used, but not listed"),
    (set_graph(path="../outside.onnx"), "files: ../outside.onnx is used, but not listed"),
    (set_graph(inputs={}), "variants[0].graphs.nir.inputs: unexpected dict"),
    (set_graph(inputs=[5]), "variants[0].graphs.nir.inputs[0]"),
    (set_graph(outputs=[{"name": "quality", "dtype": "float16", "dims": []}]), "outputs[0].dtype: 'float16'"),
    (set_graph(outputs=[{"name": "quality", "dtype": "float32", "dims": [1.5]}]), "outputs[0].dims"),
    (set_graph(outputs=[{"name": "quality", "dtype": "float32", "dims": [True]}]), "outputs[0].dims"),
    (set_graph(outputs=[{"dtype": "float32", "dims": []}]), "outputs[0].name: missing"),
    (lambda data: data.update(files=[]), "files: unexpected list"),
    (lambda data: data["files"].update({"pool.json": "x"}), "files.pool.json: unexpected str"),
    (lambda data: data["files"]["pool.json"].update(bytes="1"), "files.pool.json.bytes: unexpected str"),
    (lambda data: data["files"]["pool.json"].update(sha256=None), "files.pool.json.sha256: unexpected NoneType"),
    (lambda data: data["files"].pop("pool.json"), "files: pool.json is used, but not listed"),
    (lambda data: data["files"].pop("tokenizer.json"), "files: tokenizer.json is used, but not listed"),
    (lambda data: data["files"].pop("cpu-fp32/nir.onnx"), "files: cpu-fp32/nir.onnx is used, but not listed"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_malformed_manifest_names_file_and_field(bundle_copy: Any, change: Change, message: str) -> None:
    bundle_copy.edit(change)
    refused(bundle_copy.path, BundleSchemaError, str(bundle_copy.path / "manifest.json"), message)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1' + b"0" * 9000 + b"}"],
)
def test_a_manifest_that_is_no_object_is_refused(bundle_copy: Any, content: bytes) -> None:
    (bundle_copy.path / "manifest.json").write_bytes(content)
    refused(bundle_copy.path, BundleSchemaError, str(bundle_copy.path / "manifest.json"))


def test_parse_manifest_reads_what_was_written(tiny_bundle: Path) -> None:
    raw = (tiny_bundle / "manifest.json").read_bytes()
    manifest, data = parse_manifest(raw, "here"), json.loads(raw)
    assert manifest.query_width == len(data["query"]["domains"]) + 1 + data["query"]["embedding_width"]
    assert manifest.files == {path: (e["sha256"], e["bytes"]) for path, e in data["files"].items()}
    assert manifest.raw == data
    encoder = manifest.variants["cpu-fp32"].encoder
    assert encoder is not None
    assert [tensor.name for tensor in encoder.inputs] == ["input_ids", "attention_mask"]
    assert [variant.graph for variant in manifest.variants.values()] == ["authored", "authored"]


def test_a_bundle_from_before_authored_graphs_was_traced(bundle_copy: Any) -> None:
    def older(data: dict[str, Any]) -> None:
        for variant in data["variants"]:
            del variant["graph"], variant["graph_reason"], variant["parity"]["latency"]

    bundle_copy.edit(older)
    manifest = open_bundle(bundle_copy.path).manifest
    assert [variant.graph for variant in manifest.variants.values()] == ["traced", "traced"]
    shown = tables.variants(manifest)
    assert shown.splitlines()[1].split()[:5] == ["cpu-int8", "CPU", "int8", "traced", "any"]
    assert "ms" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected"),
        (
            '{"candidates": [{"name": "a", "cost": 1, "vector": [0.5, 0.5]}]}',
            "model vectors have 2 entries, the manifest names",
        ),
        ('{"candidates": [{"name": "a", "cost": 1}]}', "'a' has no model vector"),
        ('{"candidates": [{"name": "a", "cost": -1, "vector": [0.5]}]}', "candidate 1"),
    ],
)
def test_an_unusable_pool_names_pool_json_once(bundle_copy: Any, content: str, message: str) -> None:
    bundle_copy.rewrite("pool.json", content.encode())
    with pytest.raises(BundleSchemaError) as caught:
        Router.load(bundle_copy.path)
    assert str(caught.value).startswith(f"{bundle_copy.path / 'pool.json'}: ")
    assert message in str(caught.value)
    assert str(caught.value).count("pool.json") == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"not json"])
def test_an_unusable_tokenizer_names_its_file(bundle_copy: Any, content: bytes) -> None:
    bundle_copy.rewrite("tokenizer.json", content)
    refused(bundle_copy.path, BundleSchemaError, str(bundle_copy.path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["cpu-int8/nir.onnx", "cpu-int8/encoder.onnx"])
@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 50])
def test_a_file_that_is_no_graph_names_itself(bundle_copy: Any, name: str, content: bytes) -> None:
    bundle_copy.rewrite(name, content)
    refused(bundle_copy.path, BundleIntegrityError, str(bundle_copy.path / name), "ONNX Runtime can't open the graph")


def test_truncated_weights_with_fitting_hashes_are_refused(bundle_copy: Any) -> None:
    weights = (bundle_copy.path / "cpu-int8/weights.bin").read_bytes()
    bundle_copy.rewrite("cpu-int8/weights.bin", weights[:1000])
    refused(
        bundle_copy.path, BundleIntegrityError, str(bundle_copy.path / "cpu-int8/encoder.onnx"), variant="cpu-int8"
    )


MISMATCHES: list[tuple[str, str, Change]] = [
    ("nir", "output 'goodness'", lambda graph: graph["outputs"][0].update(name="goodness")),
    ("nir", "'quality'", lambda graph: graph["outputs"][0].update(dtype="int64")),
    ("nir", "'quality'", lambda graph: graph["outputs"][0]["dims"].append("more")),
    ("nir", "'quality'", lambda graph: graph["outputs"].pop()),
    ("nir", "'query_vectors'", lambda graph: graph["inputs"][0]["dims"].__setitem__(1, 99)),
    ("nir", "'model_vectors'", lambda graph: graph["inputs"][1]["dims"].__setitem__(1, 99)),
    ("nir", "'model_vectors'", lambda graph: graph["inputs"][1]["dims"].append("more")),
    ("nir", "'model_vectors'", lambda graph: graph["inputs"][1].update(dtype="int64")),
    ("nir", "model_vectors", lambda graph: graph["inputs"].pop()),
    ("nir", "'extra'", lambda graph: graph["inputs"].append({"name": "extra", "dtype": "bool", "dims": []})),
    ("encoder", "'input_ids'", lambda graph: graph["inputs"][0].update(dtype="float32")),
    ("encoder", "'attention_mask'", lambda graph: graph["inputs"].pop(1)),
    ("encoder", "'query_vector'", lambda graph: graph["outputs"][0]["dims"].__setitem__(1, 5)),
    ("encoder", "'query_vector'", lambda graph: graph["outputs"][0].update(name="vector")),
]


@pytest.mark.parametrize(("kind", "tensor", "change"), MISMATCHES)
def test_a_graph_that_differs_from_the_manifest_is_refused(
    bundle_copy: Any, kind: str, tensor: str, change: Change
) -> None:
    bundle_copy.edit(lambda data: change(data["variants"][0]["graphs"][kind]))
    refused(bundle_copy.path, BundleIOMismatchError, str(bundle_copy.path / f"cpu-int8/{kind}.onnx"), tensor)


def test_swapped_graphs_are_refused(bundle_copy: Any) -> None:
    bundle_copy.rewrite("cpu-int8/encoder.onnx", (bundle_copy.path / "cpu-int8/nir.onnx").read_bytes())
    refused(bundle_copy.path, BundleIOMismatchError, "cpu-int8/encoder.onnx", variant="cpu-int8")


def test_what_is_no_bundle_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path in (tmp_path / "absent", tmp_path / "empty", tmp_path / "file", str(tmp_path / "empty")):
        with pytest.raises(BundleNotFoundError, match="no bundle here") as caught:
            Router.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert isinstance(caught.value, FileNotFoundError)
        assert isinstance(caught.value, ArllmError)


def test_a_shipped_bundle_is_found_by_its_name_alone(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "shipped/small")
    monkeypatch.setattr(bundle_module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert find_bundle("small") == tmp_path / "shipped/small"
    for name in ("other", "x/small", "../small"):
        with pytest.raises(BundleNotFoundError, match="or name one that ships: small"):
            find_bundle(name)
    shutil.copytree(tiny_bundle, tmp_path / "small")  # a folder here comes first
    assert find_bundle("small") == Path("small")
