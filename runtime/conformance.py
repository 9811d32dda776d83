"""A bundle's conformance.jsonl: its lines, and rerunning them on this host: ids, query vectors, qualities, choices.

Needs nothing beside the runtime. The texts of a new export are :mod:`arllm.export.conformance`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arllm.runtime.answer import Decision
from arllm.runtime.bundle import Variant
from arllm.runtime.decision import NUMERIC_TIE
from arllm.runtime.errors import BundleSchemaError
from arllm.runtime.router import Router
from arllm.runtime.router_graph import RouterGraph, compare

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)

# fp32 differs between processors by rounding; int8 by an activation that rounds to the other side.
TOLERANCE = {"fp32": 1e-4, "int8": 0.05}


@dataclass(frozen=True)
class Conformance:
    """The outcome of a rerun. ``problems`` is empty where this host conforms."""

    texts: int
    query_vector_difference: float  # largest, absolute
    quality_difference: float  # largest, absolute
    problems: tuple[str, ...]
    router_graph_difference: float | None = (
        None  # of router.onnx to this host's router: quality, largest; None = absent
    )


def rows(routers: Mapping[str, Router], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of conformance.jsonl: text → token ids → per variant: query vector, quality, choice per beta."""
    lines = []
    first = next(iter(routers.values()))
    for text in texts:
        ids, cut = first.tokenize(text)
        expected = {}
        for name, router in routers.items():
            decisions = [router.route(text, beta) for beta in BETAS]
            expected[name] = {
                "query_vector": [round(float(v), 6) for v in decisions[0].vector],
                "familiarity": round(decisions[0].familiarity, 6),
                **_decided(decisions),
            }
        lines.append(
            {
                "text": text,
                "ids": ids.tolist(),
                "bytes_dropped": cut.bytes_dropped,
                "tokens_dropped": cut.tokens_dropped,
                "expected": expected,
            }
        )
    return lines


def vector_rows(routers: Mapping[str, Router], vectors: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The same for a bundle without an encoder: given query vectors → quality, choice per beta."""
    return [
        {
            "query_vector": [float(v) for v in vector],
            "expected": {
                name: _decided([router.route_vector(vector, beta) for beta in BETAS])
                for name, router in routers.items()
            },
        }
        for vector in vectors
    ]


def _decided(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Quality and choices of one query, a decision for each of ``BETAS``."""
    return {
        "quality": {candidate: round(q, 6) for candidate, q in decisions[0].quality.items()},
        "choice": {f"{beta:g}": decision.model for beta, decision in zip(BETAS, decisions, strict=True)},
    }


def rerun(router: Router) -> Conformance:
    """Compare this host with what the exporting host recorded for the router's variant.

    ``router.onnx``, where the variant has it, is held against this host's router on the same texts.

    Raises:
        BundleSchemaError: conformance.jsonl is missing or malformed, or does not cover the variant.
        BundleError: ``router.onnx`` can't be opened, or is not what the manifest says.
    """
    path = router.bundle.path / "conformance.jsonl"
    variant = router.bundle.manifest.variants[router.variant]
    tolerance = TOLERANCE.get(variant.precision, 0.05) if variant.verified_on != () else 0.05
    problems: list[str] = []
    vector_difference = quality_difference = 0.0
    graph = None if variant.router is None else RouterGraph(router.bundle, variant, router.pool)
    graph_gaps: list[float] = []
    count = 0
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # splitlines() also cuts at U+2028
        if lines == [""]:
            raise ValueError("the file is empty")
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            expected = _expected(row["expected"], variant)
            where = f"line {number}"
            if "text" in row:
                ids, _ = router.tokenize(row["text"])
                if ids.tolist() != row["ids"]:
                    problems.append(f"{where}: other token ids")
                decisions = {beta: router.route(row["text"], float(beta)) for beta in expected["choice"]}
                if graph is not None:
                    gap, found = compare(graph, ids, list(decisions.values()))
                    graph_gaps.append(gap)
                    problems += [f"{where}: {problem}" for problem in found]
                vector = next(iter(decisions.values())).vector
                gap = float(np.abs(vector - np.array(expected["query_vector"], dtype=np.float32)).max())
                vector_difference = max(vector_difference, gap)
                if not gap <= tolerance:
                    problems.append(f"{where}: the query vector differs by {gap:.2g} (bound {tolerance:g})")
                certain = next(iter(decisions.values())).familiarity
                if "familiarity" in expected and not abs(certain - expected["familiarity"]) <= TOLERANCE["fp32"]:
                    problems.append(f"{where}: familiarity is {certain:g}, expected {expected['familiarity']:g}")
            else:
                decisions = {
                    beta: router.route_vector(row["query_vector"], float(beta)) for beta in expected["choice"]
                }
            gap = _quality_gap(next(iter(decisions.values())), expected["quality"])
            quality_difference = max(quality_difference, gap)
            if not gap <= tolerance:
                problems.append(f"{where}: quality differs by {gap:.2g} (bound {tolerance:g})")
            problems += [
                f"{where}: beta {beta}: chose {decision.model}, expected {expected['choice'][beta]}"
                for beta, decision in decisions.items()
                if not _same_choice(decision, expected["choice"][beta], tolerance)
            ]
            count += 1
    except OSError as error:
        raise BundleSchemaError(f"{path}: can't be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError) as error:
        raise BundleSchemaError(
            f"{path}: line {count + 1} is malformed or lacks {router.variant}: {error!r}"
        ) from None
    graph_difference = float(np.max(graph_gaps)) if graph_gaps else None
    return Conformance(count, vector_difference, quality_difference, tuple(problems), graph_difference)


def _expected(recorded: dict[str, Any], variant: Variant) -> Any:
    """What was recorded of a variant; of one that no card had run then, the first of what others said."""
    if variant.verified_on == () and variant.name not in recorded:
        return next(iter(recorded.values()))
    return recorded[variant.name]


def _quality_gap(decision: Decision, expected: dict[str, Any]) -> float:
    quality = decision.quality
    gaps = [abs(quality[name] - float(value)) for name, value in expected.items()]
    return float(np.max(gaps))  # NaN where one is NaN


def _same_choice(decision: Decision, expected: str, tolerance: float) -> bool:
    """Equal, or a tie within what the tolerance of quality and a numeric tie allow."""
    if decision.model == expected:
        return True
    utility = decision.utility
    return utility[decision.model] - utility[expected] <= 2 * (1 - decision.beta) * tolerance + NUMERIC_TIE
