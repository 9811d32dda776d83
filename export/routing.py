"""``router.onnx``: token ids to chosen candidate in one graph, for hosts without this package.

Joins the encoder and NIR as they stand in a variant's folder and writes calibration, familiarity and the decision
rule behind them, in double as the runtime computes them. Nothing that a pool or a preference changes is a constant
here. Knows nothing about how the other graphs were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, compose, external_data_helper, helper, numpy_helper

from arllm.export.builder import Builder
from arllm.export.graphs import INLINE, WEIGHTS
from arllm.runtime.calibration import EDGE, Calibration, logit
from arllm.runtime.conformance import BETAS
from arllm.runtime.errors import ParityError
from arllm.runtime.router import Router
from arllm.runtime.router_graph import RouterGraph, compare

ALIGNMENT = 64  # of a tensor in weights.bin, so that its mapped numbers start where any processor can load them
REFUSED = -1  # `choice` where beta lies outside [0, 1] or no candidate is allowed


class Rules(Protocol):
    """What a bundle's content or manifest says of the way from NIR's prediction to quality."""

    @property
    def domains(self) -> tuple[str, ...]: ...
    @property
    def embedding_width(self) -> int: ...
    @property
    def domain_shares(self) -> tuple[float, ...] | None: ...
    @property
    def mean_difficulty(self) -> float | None: ...
    @property
    def policies(self) -> Mapping[str, Mapping[str, Any]]: ...


def export_router(folder: Path, rules: Rules) -> Path:
    """Write ``router.onnx`` beside the ``encoder.onnx`` and ``nir.onnx`` of a variant's ``folder``.

    Its weights are theirs: large tensors that still stand inside those files, as NIR's do, move into the folder's
    ``weights.bin``, and both graphs refer to them there.

    Inputs: ``input_ids``, ``attention_mask`` (batch, tokens) int64; ``model_vectors`` (candidates, D) float32;
    ``offsets`` (candidates, 1 + D), ``costs`` (candidates,) and ``cost_bounds`` (2,) float64; ``candidate_mask``
    (candidates,) bool; ``beta`` (batch,) float64. Outputs: ``quality``, ``utility`` (batch, candidates) float64,
    ``choice`` (batch,) int64, ``familiarity`` (batch,) float32.

    Raises:
        ValueError: the graphs can't be joined: they use operators of different versions, or the same names.
        BundleSchemaError: the calibration of ``nir`` is unusable.
    """
    paths = [folder / "encoder.onnx", folder / "nir.onnx"]
    for path in paths:
        share_weights(path)
    encoder, nir = (onnx.load(str(path), load_external_data=False) for path in paths)
    written = folder / "router.onnx"
    onnx.save_model(join(encoder, nir, rules), str(written))
    return written


def share_weights(path: Path) -> None:
    """Move the large tensors of a graph to the end of ``weights.bin`` beside it, where others can refer to them."""
    model = onnx.load(str(path), load_external_data=False)
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    large = [(t, data) for t in inside if len(data := numpy_helper.to_array(t).tobytes()) >= INLINE]
    if not large:
        return
    with (path.parent / WEIGHTS).open("ab") as file:
        for tensor, data in large:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            # Numbers may stand in any of the fields; what is external has none, and the helper asks for raw data.
            tensor.CopyFrom(
                TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
            )
            external_data_helper.set_external_data(tensor, WEIGHTS, offset=file.tell(), length=len(data))
            tensor.ClearField("raw_data")
            file.write(data)
    onnx.save_model(model, str(path))


def verify_router(router: Router, texts: Sequence[str]) -> None:
    """Compare ``router.onnx`` of the router's variant with the router itself on texts, at the betas of conformance.

    Raises:
        ParityError: quality or a choice outside a numeric tie differs.
    """
    bundle = router.bundle
    graph = RouterGraph(bundle, bundle.manifest.variants[router.variant])
    for text in texts:
        decisions = [router.route(text, beta) for beta in BETAS]
        _, problems = compare(graph, router.tokenize(text)[0], decisions)
        if problems:
            raise ParityError(f"variant {router.variant}: {problems[0]} on {text[:40]!r}; not published")


def join(encoder: onnx.ModelProto, nir: onnx.ModelProto, rules: Rules) -> onnx.ModelProto:
    """The three parts as one model; tensors outside the files stay where they are.

    Raises:
        ValueError: see :func:`export_router`.
    """
    scorer = compose.add_prefix(nir, "nir/", rename_inputs=False)
    rule = compose.add_prefix_graph(_rule(rules), "rule/", rename_inputs=False, rename_outputs=False)
    given = [value for value in encoder.graph.output if value.name == "familiarity"]
    graph = helper.make_graph(
        [
            *encoder.graph.node,
            helper.make_node("Identity", ["query_vector"], ["query_vectors"], name="nir/query_vectors"),
            *scorer.graph.node,
            *rule.node,
        ],
        "router",
        [*encoder.graph.input, *(value for value in rule.input if value.name in _POOL_INPUTS)],
        [*rule.output, *given],
        [*encoder.graph.initializer, *scorer.graph.initializer, *rule.initializer],
    )
    _check_names(graph)
    return helper.make_model(
        graph,
        opset_imports=_opsets(encoder, nir),
        functions=[*encoder.functions, *scorer.functions],
        ir_version=max(encoder.ir_version, nir.ir_version),
        producer_name="arllm",
    )


_POOL_INPUTS = ("model_vectors", "offsets", "costs", "cost_bounds", "candidate_mask", "beta")


def _rule(rules: Rules) -> onnx.GraphProto:
    """(query vector, familiarity, NIR's prediction, pool, beta) → quality, utility, choice; as the runtime has them.

    In the comments B = batch, M = candidates, D = domains.
    """
    b = Builder()
    width = len(rules.domains)
    domains, difficulty = _query(b, width, rules.embedding_width)
    vectors = b("Cast", "model_vectors", to=TensorProto.DOUBLE)  # (M, D)
    quality = b("Cast", "nir/quality", to=TensorProto.DOUBLE)  # (B, M)
    if "calibration" in rules.policies["nir"]:
        calibration = Calibration.from_json(rules.policies["nir"]["calibration"], width)
        quality = _calibrated(b, calibration, quality, domains, vectors)
    if rules.domain_shares is not None and rules.mean_difficulty is not None:
        quality = _shrunk(b, rules.domain_shares, rules.mean_difficulty, quality, difficulty, vectors)
    _decide(b, b("Identity", quality, output="quality"))
    info, double = helper.make_tensor_value_info, TensorProto.DOUBLE
    return helper.make_graph(
        b.nodes,
        "rule",
        [
            info("query_vector", TensorProto.FLOAT, ["batch", width + 1 + rules.embedding_width]),
            info("familiarity", TensorProto.FLOAT, ["batch"]),
            info("nir/quality", TensorProto.FLOAT, ["batch", "candidates"]),
            info("model_vectors", TensorProto.FLOAT, ["candidates", width]),
            info("offsets", double, ["candidates", 1 + width]),
            info("costs", double, ["candidates"]),
            info("cost_bounds", double, [2]),
            info("candidate_mask", TensorProto.BOOL, ["candidates"]),
            info("beta", double, ["batch"]),
        ],
        [
            info("quality", double, ["batch", "candidates"]),
            info("utility", double, ["batch", "candidates"]),
            info("choice", TensorProto.INT64, ["batch"]),
        ],
        b.initializers,
    )


def _query(b: Builder, domains: int, embedding: int) -> tuple[str, str]:
    """Domain probabilities (B, D) and difficulty (B, 1), in double."""
    parts = b.split("query_vector", domains, 1, *([embedding] if embedding else []))
    return b("Cast", parts[0], to=TensorProto.DOUBLE), b("Cast", parts[1], to=TensorProto.DOUBLE)


def _calibrated(b: Builder, calibration: Calibration, quality: str, domains: str, vectors: str) -> str:
    """:func:`arllm.runtime.calibration.calibrated`, (B, M)."""
    ability = b("MatMul", domains, b("Transpose", vectors, perm=[1, 0]))
    mixed = b(
        "Add",
        b("Mul", quality, b.constant(1.0 - calibration.ability, np.float64)),
        b("Mul", ability, b.constant(calibration.ability, np.float64)),
    )
    level, slopes = b.split("offsets", 1, len(calibration.default) - 1)  # (M, 1), (M, D)
    offset = b(
        "Add",
        b("Transpose", level, perm=[1, 0]),
        b("MatMul", domains, b("Transpose", slopes, perm=[1, 0])),
    )
    score = b("Mul", _logit(b, mixed), b.constant(calibration.scale, np.float64))
    return b("Sigmoid", b("Add", score, offset))


def _shrunk(
    b: Builder, shares: Sequence[float], mean_difficulty: float, quality: str, difficulty: str, vectors: str
) -> str:
    """:func:`arllm.runtime.calibration.shrunk` toward :func:`arllm.runtime.calibration.overall`, (B, M)."""
    prior = b("MatMul", vectors, b.constant(np.array(shares)[:, None], np.float64))  # (M, 1)
    mean = float(logit(np.array(1.0 - mean_difficulty)))
    standing = b("Sub", _logit(b, b("Transpose", prior, perm=[1, 0])), b.constant(mean, np.float64))  # (1, M)
    ease = _logit(b, b("Sub", b.constant(1.0, np.float64), difficulty))  # (B, 1)
    known = b("Sigmoid", b("Add", standing, ease))
    certain = b("Unsqueeze", b("Cast", "familiarity", to=TensorProto.DOUBLE), b.shape(1))  # (B, 1)
    return b("Add", known, b("Mul", certain, b("Sub", quality, known)))


def _logit(b: Builder, probability: str) -> str:
    edges = (b.constant(EDGE, np.float64), b.constant(1.0 - EDGE, np.float64))
    held = b("Clip", probability, *edges)
    return b("Log", b("Div", held, b("Sub", b.constant(1.0, np.float64), held)))


def _decide(b: Builder, quality: str) -> None:
    """:mod:`arllm.runtime.decision`: ``utility`` (B, M) and ``choice`` (B,)."""
    zero, one = b.constant(0.0, np.float64), b.constant(1.0, np.float64)
    minimum, maximum = b.split("cost_bounds", 1, 1)
    span = b("Sub", maximum, minimum)  # (1,)
    scaled = b("Div", b("Sub", "costs", minimum), span)
    normalized = b("Where", b("Greater", span, zero), scaled, zero)  # (M,)
    beta = b("Unsqueeze", "beta", b.shape(1))  # (B, 1)
    gain = b("Mul", b("Sub", one, beta), quality)
    utility = b("Sub", gain, b("Mul", beta, normalized), output="utility")
    allowed = b("Where", "candidate_mask", utility, b.constant(-np.inf, np.float64))
    best = b("ArgMax", allowed, axis=1, keepdims=0)  # the first maximum
    any_allowed = b("Cast", b("ReduceMax", b("Cast", "candidate_mask", to=TensorProto.INT64)), to=TensorProto.BOOL)
    in_range = b("And", b("GreaterOrEqual", "beta", zero), b("LessOrEqual", "beta", one))
    valid = b("And", in_range, any_allowed)  # (B,); a NaN is in no range
    b("Where", valid, best, b.constant(REFUSED, np.int64), output="choice")


def _opsets(*models: onnx.ModelProto) -> list[onnx.OperatorSetIdProto]:
    versions: dict[str, int] = {}
    for model in models:
        for opset in model.opset_import:
            if versions.setdefault(opset.domain, opset.version) != opset.version:
                raise ValueError(
                    f"the graphs can't be joined: they use {opset.domain or 'ai.onnx'} {opset.version} and "
                    f"{versions[opset.domain]}"
                )
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _check_names(graph: onnx.GraphProto) -> None:
    """Every value has one source; a name that two parts use would cross their wires in silence."""
    names = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    names += [name for node in graph.node for name in node.output if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the graphs can't be joined: both name a value {twice[0]!r}")
