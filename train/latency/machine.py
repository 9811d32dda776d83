"""What a benchmark says of the machine: processor, its instruction sets, load, versions. Measures nothing itself."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# Instruction sets that decide how fast a matrix product is, in /proc/cpuinfo's words.
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
CPUINFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
SET_BY_HAND = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS")


def load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes; None where the system doesn't tell."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def describe() -> dict[str, Any]:
    """Plain JSON types; None where the machine doesn't say."""
    from importlib import metadata

    from arllm.runtime.doctor import examine

    host, _ = examine()
    return {
        "cpu": processor(),
        "cores": host["cores"],
        "flags": parse_cpuinfo(_read(CPUINFO) or "")[1],
        "governor": (_read(GOVERNOR) or "").strip() or None,
        "system": platform.platform(),
        "load_before": load_average(),
        "load_after": None,
        "environment": {name: os.environ[name] for name in SET_BY_HAND if name in os.environ},
        "versions": {
            "arllm": metadata.version("arllm"),
            **{name: str(host[name]) for name in ("python", "onnxruntime", "tokenizers", "numpy")},
        },
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    return parse_cpuinfo(_read(CPUINFO) or "")[0] or platform.processor() or platform.machine()


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """The processor's name, and those of :data:`FLAGS` that it has, of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, found, value = line.partition(":")
        if found:
            fields.setdefault(name.strip().lower(), value.strip())
    have = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name"), [flag for flag in FLAGS if flag in have]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return None
