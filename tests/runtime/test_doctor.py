"""Tests of runtime/doctor.py: the report on this host, and its verdict on a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime import session
from arllm.runtime.doctor import examine
from arllm.runtime.errors import BundleIntegrityError, BundleNotFoundError

HOST = {"arllm", "python", "numpy", "tokenizers", "onnxruntime", "providers", "machine", "instruction sets", "cores"}


def need_missing(data: dict[str, Any], *variants: str) -> None:
    for variant in data["variants"]:
        if variant["name"] in variants:
            variant["instruction_set"] = "avx1024"


def test_without_a_bundle_it_reports_the_host() -> None:
    report, healthy = examine()
    assert healthy
    assert set(report) >= HOST
    assert "variants" not in report
    assert "CPUExecutionProvider" in report["providers"]
    assert report["cores"] >= 1
    assert json.loads(json.dumps(report)) == report


def test_a_good_bundle_is_healthy(tiny_bundle: Path) -> None:
    report, healthy = examine(str(tiny_bundle))
    assert healthy
    assert list(report["variants"]) == ["cpu-int8", "cpu-fp32"]
    for verdict in report["variants"].values():
        assert verdict["runs"] is True
        assert verdict["verdict"].startswith("conforms on ")
        assert verdict["problems"] == []
    assert str(tiny_bundle) in report["bundle"]
    assert json.loads(json.dumps(report)) == report


def test_a_variant_that_does_not_conform_is_not_healthy(bundle_copy: Any) -> None:
    lines = (bundle_copy.path / "conformance.jsonl").read_text(encoding="utf-8").split("\n")
    row = json.loads(lines[0])
    row["expected"]["cpu-int8"]["choice"]["1"] = "sim-frontier"
    lines[0] = json.dumps(row)
    bundle_copy.rewrite("conformance.jsonl", "\n".join(lines).encode())
    report, healthy = examine(str(bundle_copy.path))
    assert not healthy
    assert report["variants"]["cpu-int8"]["verdict"].startswith("does NOT conform: 1 problems")
    assert "sim-frontier" in report["variants"]["cpu-int8"]["problems"][0]
    assert report["variants"]["cpu-fp32"]["verdict"].startswith("conforms on ")


def test_a_variant_that_cannot_run_here_is_reported_not_blamed(bundle_copy: Any) -> None:
    bundle_copy.edit(lambda data: need_missing(data, "cpu-int8"))
    report, healthy = examine(str(bundle_copy.path))
    assert healthy
    assert report["variants"]["cpu-int8"]["runs"] is False
    assert "avx1024" in report["variants"]["cpu-int8"]["verdict"]
    assert report["variants"]["cpu-fp32"]["runs"] is True


def test_a_bundle_of_which_nothing_runs_here_is_not_healthy(bundle_copy: Any) -> None:
    bundle_copy.edit(lambda data: need_missing(data, "cpu-int8", "cpu-fp32"))
    report, healthy = examine(str(bundle_copy.path))
    assert not healthy
    assert not any(verdict["runs"] for verdict in report["variants"].values())


def test_a_broken_bundle_raises(bundle_copy: Any, tmp_path: Path) -> None:
    (bundle_copy.path / "extra.txt").write_text("x", encoding="utf-8")
    with pytest.raises(BundleIntegrityError, match=r"extra\.txt"):
        examine(str(bundle_copy.path))
    with pytest.raises(BundleNotFoundError):
        examine(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "found"),
    [
        ("aarch64", None, {"arm64"}),
        ("arm64", None, {"arm64"}),
        ("x86_64", "model name : x\nflags\t\t: fpu avx2 avx512_vnni sse\nbugs : avx9\n", {"avx2", "avx512_vnni"}),
        ("x86_64", "flags : fpu sse2 avx2x\n", set()),
        ("x86_64", "nothing known\n", set()),
        ("x86_64", None, set()),
    ],
)
def test_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, machine: str, cpuinfo: str | None, found: set[str]
) -> None:
    def read_text(self: Path, **options: Any) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(self)
        return cpuinfo

    monkeypatch.setattr(session.platform, "machine", lambda: machine)
    monkeypatch.setattr(session.Path, "read_text", read_text)
    assert session.instruction_sets.__wrapped__() == found
