"""Tests of picking a variant (runtime/session.py): order, instruction sets and providers that this host lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from arllm.runtime import session
from arllm.runtime.devices import CudaDevice
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


H100, T4 = CudaDevice("NVIDIA H100", (9, 0)), CudaDevice("Tesla T4", (7, 5))


@pytest.fixture
def cuda_first(bundle_copy: Any) -> Any:
    """The tiny bundle, its first variant said to be bf16 on CUDA."""
    demand(bundle_copy, "provider", cpu_int8=session.CUDA)
    demand(bundle_copy, "precision", cpu_int8="bf16")
    return bundle_copy


class Recorded:
    """Stands in for ONNX Runtime's session: opens on the CPU, notes what was asked, says that it got it."""

    calls: ClassVar[list[tuple[Any, dict[str, Any], Any]]] = []
    real: Any = session.onnxruntime.InferenceSession

    def __init__(self, source: Any, options: Any, providers: list[Any], **more: Any) -> None:
        on_cpu = providers[0] == session.CPU
        strict = None if on_cpu else options.get_session_config_entry("session.disable_cpu_ep_fallback")
        self.calls.append((providers[0], more, strict))
        self._real = self.real(source, options if on_cpu else None, providers=[session.CPU])
        self._asked = providers[0] if isinstance(providers[0], str) else providers[0][0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [self._asked]


def pretend(monkeypatch: pytest.MonkeyPatch, *devices: CudaDevice) -> None:
    """A package for GPUs, and these cards."""
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    monkeypatch.setattr(session, "cuda_devices", lambda: devices)


def test_a_package_without_cuda_says_what_to_install(cuda_first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: [session.CPU])
    with pytest.raises(VariantError, match=r'needs CUDAExecutionProvider; .*pip install "arllm\[gpu\]"'):
        Router.load(cuda_first.path, variant="cpu-int8")
    assert Router.load(cuda_first.path).variant == "cpu-fp32"


def test_a_package_without_a_card_is_passed_over(cuda_first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(VariantError, match="the driver shows no CUDA device"):
        Router.load(cuda_first.path, variant="cpu-int8")
    assert Router.load(cuda_first.path).variant == "cpu-fp32"


def test_bfloat16_needs_a_card_that_has_it(cuda_first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, T4, H100)  # the first counts: it is the one that runs
    with pytest.raises(VariantError, match=r"bfloat16 needs compute capability 8\.0; Tesla T4 has 7\.5"):
        Router.load(cuda_first.path, variant="cpu-int8")
    demand(cuda_first, "precision", cpu_int8="fp32")
    variants = Router.load(cuda_first.path, variant="cpu-fp32").bundle.manifest.variants
    assert session.why_not(variants["cpu-int8"]) is None


def test_cuda_is_strict_and_runs_the_encoder_alone(cuda_first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, H100)
    monkeypatch.setattr(session.onnxruntime, "InferenceSession", Recorded)
    monkeypatch.setattr(Recorded, "calls", [])
    preloaded: list[bool] = []
    monkeypatch.setattr(session.onnxruntime, "preload_dlls", lambda: preloaded.append(True), raising=False)
    session._preload_cuda.cache_clear()
    router = Router.load(cuda_first.path)
    session._preload_cuda.cache_clear()
    assert router.variant == router.route("x").variant == "cpu-int8"
    (encoder,) = [call for call in Recorded.calls if call[0] != session.CPU]
    assert encoder == ((session.CUDA, session.CUDA_OPTIONS), {"enable_fallback": 0}, "1")
    assert session.CUDA_OPTIONS["use_tf32"] == "0"
    rest = [call for call in Recorded.calls if call != encoder]
    assert rest
    assert all(call == (session.CPU, {"enable_fallback": 0}, None) for call in rest)
    assert preloaded == [True]


def test_cuda_that_cannot_be_opened_is_refused(cuda_first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, with the real ONNX Runtime: its package for CPUs refuses the provider."""
    pretend(monkeypatch, H100)
    with pytest.raises(VariantError, match=r'can\'t run every node .* on CUDA: .*"onnxruntime-gpu\[cuda,cudnn\]"'):
        Router.load(cuda_first.path, variant="cpu-int8")


def test_preloading_keeps_stdout_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(session.onnxruntime, "preload_dlls", lambda: print("no CUDA here"), raising=False)
    session._preload_cuda.cache_clear()
    session._preload_cuda()
    session._preload_cuda.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no CUDA here" in captured.err
