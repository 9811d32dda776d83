"""Tests of the import rules: what arllm.runtime brings in, which way imports point, what needs no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import arllm.runtime
from arllm.runtime.errors import MissingExtraError

ROOT = Path(arllm.runtime.__file__).resolve().parents[1]

# What a gateway's process gets. onnxruntime depends on flatbuffers and protobuf, and tokenizers on huggingface_hub,
# but deciding imports none of them.
ALLOWED = {"arllm", "numpy", "onnxruntime", "tokenizers"}
OF_THE_INSTALLATION = {"sitecustomize", "usercustomize"}  # hooks of the environment, not of a package
FORBIDDEN = {"torch", "transformers", "pandas", "onnx", "click", "sklearn", "scipy", "safetensors", "optimum"}

COMMANDS = (
    ROOT / "export" / "commands.py",
    ROOT / "train" / "commands.py",
    ROOT / "train" / "latency" / "commands.py",
    ROOT / "train" / "pool_commands.py",
    ROOT / "train" / "preference_commands.py",
    ROOT / "runtime" / "gateways" / "commands.py",
)
TORCH_FREE = [
    "arllm.train",
    "arllm.train.baselines",
    "arllm.train.bench",
    "arllm.train.calibration",
    "arllm.train.curves",
    "arllm.train.domains",
    "arllm.train.evaluate",
    "arllm.train.examples",
    "arllm.train.hdp",
    "arllm.train.import_harness",
    "arllm.train.import_leaderboard",
    "arllm.train.import_wide",
    "arllm.train.importers",
    "arllm.train.latency.measure",
    "arllm.train.latency.child",
    "arllm.train.latency.cold",
    "arllm.train.latency.machine",
    "arllm.train.latency.plot",
    "arllm.train.latency.report",
    "arllm.train.latency.rounds",
    "arllm.train.latency.show",
    "arllm.train.latency.stats",
    "arllm.train.latency.texts",
    "arllm.train.metrics",
    "arllm.train.newcomers",
    "arllm.train.outcomes",
    "arllm.train.pools",
    "arllm.train.preferences",
    "arllm.train.query_costs",
    "arllm.train.rebundle",
    "arllm.train.records",
    "arllm.train.reliability",
    "arllm.train.report",
    "arllm.train.report_html",
    "arllm.train.scored",
    "arllm.train.staging",
    "arllm.train.synthetic",
    "arllm.train.synthetic_tasks",
    "arllm.train.traffic",
]


def modules_after(code: str, *flags: str) -> set[str]:
    """Top-level modules that ``code`` brings into a fresh interpreter, the standard library left out."""
    report = "import json\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    script = f"import sys\nbefore = set(sys.modules)\n{code}\n{report}"
    result = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("__editable__")}


def test_the_runtime_brings_in_numpy_onnxruntime_and_tokenizers_alone() -> None:
    found = modules_after("import arllm.runtime\narllm.runtime.Router", "-I")
    assert found >= {"arllm", "numpy", "onnxruntime", "tokenizers"}
    assert found - ALLOWED - OF_THE_INSTALLATION == set()
    assert not found & FORBIDDEN


def test_the_doctor_and_conformance_bring_in_no_more() -> None:
    found = modules_after("import arllm.runtime.doctor, arllm.runtime.conformance, arllm.runtime.tables", "-I")
    assert found - ALLOWED - OF_THE_INSTALLATION == set()


def test_the_runtime_knows_no_gateway() -> None:
    code = "import arllm.runtime, arllm.runtime.doctor, arllm.runtime.conformance\narllm.runtime.Router\n"
    code += "assert not [m for m in sys.modules if m.startswith('arllm.runtime.gateways')]"
    modules_after(code, "-I")


def test_the_shared_piece_of_the_gateways_needs_no_extra() -> None:
    hidden = "\n".join(f"sys.modules[{name!r}] = None" for name in ("prometheus_client", "opentelemetry"))
    found = modules_after(f"{hidden}\nimport arllm.runtime.gateways.gate, arllm.runtime.gateways.body", "-I")
    assert found - ALLOWED - OF_THE_INSTALLATION <= {"prometheus_client", "opentelemetry"}  # the blocked ones


def test_training_can_share_the_rule_without_an_onnx_runtime() -> None:
    names = ("answer", "bundle", "calibration", "decision", "errors", "pool", "quality", "tables", "tokens")
    found = modules_after("import " + ", ".join(f"arllm.runtime.{name}" for name in names), "-I")
    assert "onnxruntime" not in found
    assert modules_after("import arllm.runtime", "-I") - OF_THE_INSTALLATION <= {"arllm"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in ("train", "export", "route", "serve", "doctor", "calibrate", "pool", "bench")),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import contextlib, io\nfrom arllm.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    main({arguments!r}, standalone_mode=False)"
    )
    found = modules_after(code)
    assert "click" in found
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "pandas", "scipy", "sklearn", "tokenizers"}
    assert not found & (heavy | {"starlette", "uvicorn", "prometheus_client", "opentelemetry", "litellm", "grpc"})


@pytest.mark.parametrize("module", TORCH_FREE)
def test_evaluation_and_pool_work_need_no_torch(module: str) -> None:
    found = modules_after(f"import {module}", "-I")
    assert "arllm" in found
    assert not found & {"torch", "transformers", "onnx", "onnxruntime", "safetensors"}


def test_training_needs_no_onnx_runtime() -> None:
    pytest.importorskip("torch")
    modules_after(
        'sys.modules["onnxruntime"] = None\nimport arllm.train.pipeline'
    )  # the extra train doesn't bring it


def test_all_names_resolve() -> None:
    assert arllm.runtime.__all__ == sorted(arllm.runtime.__all__)
    assert dir(arllm.runtime) == arllm.runtime.__all__
    for name in arllm.runtime.__all__:
        value = getattr(arllm.runtime, name)
        assert value.__name__ == name
        assert value.__module__.startswith("arllm.runtime.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'arllm\.runtime' has no attribute 'Nothing'"):
        arllm.runtime.Nothing  # noqa: B018
    assert not hasattr(arllm.runtime, "np")
    with pytest.raises(ImportError):
        exec("from arllm.runtime import Nothing")


def test_a_missing_onnxruntime_names_the_extra() -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None  # as if it were not installed
import arllm.runtime
try:
    arllm.runtime.Router
except ImportError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(MissingExtraError.__name__)
    assert 'pip install "arllm[cpu]"' in result.stdout


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, inside functions and TYPE_CHECKING blocks too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("runtime", ("arllm.train", "arllm.export", "arllm.cli", "torch", "transformers", "pandas", "onnx", "click")),
        ("train", ("arllm.export", "arllm.cli", "onnx", "onnxruntime", "click")),
        ("export", ("arllm.cli", "click")),
    ],
)
def test_imports_point_one_way(folder: str, banned: tuple[str, ...]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        for name in imported(path):
            if path in COMMANDS and name == "click":
                continue  # the root may hold one module, so cli.py's second half lives there
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in banned), f"{path}: imports {name}"
            top = name.partition(".")[0]
            assert top not in ("runtime", "train", "export", "cli"), (
                f"{path}: imports {name}, a second copy of arllm's"
            )


@pytest.mark.parametrize("path", [ROOT / "cli.py", *COMMANDS])
def test_the_command_line_imports_the_heavy_halves_inside_its_commands(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {
        f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("arllm")
        for alias in node.names
    }
    light = ("arllm.runtime.errors.", "arllm.runtime.tables", "arllm.runtime.requests")
    light += ("arllm.train.commands", "arllm.train.preference_commands", "arllm.runtime.gateways.commands")
    light += ("arllm.export.commands", "arllm.train.pool_commands", "arllm.train.latency.commands")
    assert all(name.startswith(light) for name in top), top
