"""Which 8-bit integers are right on which processor: the format of int8 products by ``--target``.

An activation is unsigned, a weight signed. x86 without VNNI adds two of their products in signed 16 bits, which
saturate unless the weights keep 7 bits: 2 * 255 * 64 = 32,640 < 2**15. Where products are summed in 32 bits at once
(AVX-512 VNNI, arm64), weights may use all 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from arllm.runtime.errors import ExportError
from arllm.runtime.session import has_instruction_set

MAX_WEIGHT = 64  # a weight's largest integer that is right on every processor
EXACT_WEIGHT = 127  # where sums are exact


@dataclass(frozen=True)
class Target:
    """How weights become integers, and what the result needs of a processor.

    ``preset`` and ``reduce_range`` are of optimum's ``AutoQuantizationConfig``, for traced graphs; ``max_weight``
    bounds the integers of authored ones.
    """

    preset: str
    reduce_range: bool
    max_weight: int
    instruction_set: str


TARGETS = {
    "auto": Target("avx512", True, MAX_WEIGHT, "any"),
    "avx512_vnni": Target("avx512_vnni", False, EXACT_WEIGHT, "avx512_vnni"),
    "avx2": Target("avx2", False, MAX_WEIGHT, "any"),  # the preset's weights are unsigned: their sums are wider
    "arm64": Target("arm64", False, EXACT_WEIGHT, "arm64"),
}


def target_of(name: str) -> Target:
    """The named target.

    Raises:
        ExportError: there is none of this name.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}: choose among {', '.join(TARGETS)}")
    return TARGETS[name]


def check_verifiable(instruction_set: str) -> None:
    """An export is verified where it is made, so that its integers must be right there.

    Raises:
        ExportError: they aren't on this processor.
    """
    if not has_instruction_set(instruction_set):
        raise ExportError(
            f"the integers of this target are right only with {instruction_set}, which this processor lacks, so that "
            "they can't be verified here: export on one that has it, or leave --target out"
        )
