"""Tests of picking a variant (runtime/session.py): order, instruction sets and providers that this host lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arllm.runtime import session
from arllm.runtime.errors import VariantError
from arllm.runtime.router import Router


def demand(bundle_copy: Any, field: str, **wanted: str) -> None:
    """Set a field of variants by name: ``demand(copy, "provider", cpu_int8="X")``."""

    def change(data: dict[str, Any]) -> None:
        for variant in data["variants"]:
            key = variant["name"].replace("-", "_")
            if key in wanted:
                variant[field] = wanted[key]

    bundle_copy.edit(change)


def test_auto_is_the_first_of_the_manifest(tiny_bundle: Path, bundle_copy: Any) -> None:
    assert Router.load(tiny_bundle).variant == "cpu-int8"
    bundle_copy.edit(lambda data: data["variants"].reverse())
    assert Router.load(bundle_copy.path).variant == "cpu-fp32"


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_a_named_variant_is_used(tiny_bundle: Path, variant: str) -> None:
    router = Router.load(tiny_bundle, variant=variant)
    assert router.variant == variant
    assert router.route("x").variant == variant


@pytest.mark.parametrize("variant", ["cuda-bf16", "", "CPU-INT8"])
def test_an_unknown_variant_is_refused(tiny_bundle: Path, variant: str) -> None:
    with pytest.raises(VariantError, match=r"no variant .*: the bundle has cpu-int8, cpu-fp32"):
        Router.load(tiny_bundle, variant=variant)


def test_a_missing_instruction_set_is_passed_over(bundle_copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    demand(bundle_copy, "instruction_set", cpu_int8="avx512_vnni")
    monkeypatch.setattr(session, "instruction_sets", lambda: frozenset({"avx2"}))
    router = Router.load(bundle_copy.path)
    assert router.variant == router.route("x").variant == "cpu-fp32"
    with pytest.raises(VariantError, match=r"'cpu-int8' can't run here: .*only with avx512_vnni"):
        Router.load(bundle_copy.path, variant="cpu-int8")
    monkeypatch.setattr(session, "instruction_sets", lambda: frozenset({"avx2", "avx512_vnni"}))
    assert Router.load(bundle_copy.path).variant == "cpu-int8"


@pytest.mark.parametrize(
    ("have", "wanted", "runs"),
    [
        ({"avx2", "avx512_vnni"}, "arm64", True),  # both sum in 32 bits: the same integers come out
        ({"arm64"}, "avx512_vnni", True),
        ({"avx2"}, "arm64", False),
        ({"arm64"}, "avx2", False),
        (set(), "any", True),
    ],
)
def test_integers_of_exact_sums_run_wherever_sums_are_exact(
    have: set[str], wanted: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "instruction_sets", lambda: frozenset(have))
    assert session.has_instruction_set(wanted) is runs


def test_where_nothing_runs_every_reason_is_given(bundle_copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    demand(bundle_copy, "instruction_set", cpu_int8="avx512_vnni", cpu_fp32="arm64")
    monkeypatch.setattr(session, "instruction_sets", frozenset)
    with pytest.raises(VariantError, match="no variant of the bundle can run here") as caught:
        Router.load(bundle_copy.path)
    for reason in ("cpu-int8: ", "avx512_vnni", "cpu-fp32: ", "arm64"):
        assert reason in str(caught.value)


def test_a_missing_provider_is_never_replaced_in_silence(bundle_copy: Any) -> None:
    demand(bundle_copy, "provider", cpu_int8="NoSuchExecutionProvider")
    with pytest.raises(VariantError, match=r"needs NoSuchExecutionProvider; this onnxruntime has .*CPU"):
        Router.load(bundle_copy.path, variant="cpu-int8")
    assert Router.load(bundle_copy.path).variant == "cpu-fp32"
    demand(bundle_copy, "provider", cpu_fp32="NoSuchExecutionProvider")
    with pytest.raises(VariantError, match="no variant of the bundle can run here"):
        Router.load(bundle_copy.path)


def test_a_provider_that_falls_back_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.onnxruntime.InferenceSession

    class Fallen:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._real = real(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def get_providers(self) -> list[str]:
            return ["SomethingElse", *self._real.get_providers()]

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(VariantError, match="asked for CPUExecutionProvider, ONNX Runtime fell back to SomethingElse"):
        Router.load(tiny_bundle)
