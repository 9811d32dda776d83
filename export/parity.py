"""Measuring an exported variant against the PyTorch model, on what the gateway would load; the bounds stand here.

Every number is taken through the runtime's own code on the staged bundle. A variant past a bound raises
:class:`arllm.runtime.errors.ParityError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arllm.runtime import decision as rule
from arllm.runtime.conformance import TOLERANCE
from arllm.runtime.encoder import TOGETHER, TOKENS_TOGETHER
from arllm.runtime.errors import ParityError
from arllm.runtime.quality import Hdp, HdpPaper
from arllm.runtime.router import Router
from arllm.runtime.session import Session
from arllm.train.encoder import QueryEncoder, pad_batch
from arllm.train.nir import Nir

BETAS = tuple(round(0.05 * k, 2) for k in range(21))

FP32_TOLERANCE = 1e-4  # of the query vector and quality, absolute
INT8_REGRET = 0.002  # mean utility lost by choosing as the variant does, judged by PyTorch's utilities
# Of the query vector between a padded batch and the query alone, authored int8: 0 where ONNX Runtime's kernels sum in
# one order whatever the padding (AVX-512); elsewhere a few activations may round to the other side, as they may on
# another processor: the same bound as conformance has.
INVARIANCE = TOLERANCE["int8"]
# Half of it: 8 bits of mantissa everywhere between two norms, but no scale to be wrong by. Nine layers of Gemma 270M,
# trained on real outcomes and emulated on a CPU, lose 1.2e-7.
BF16_REGRET = 0.001
INT8_ACCURACY_LOSS = 0.003  # of the chosen candidates on held-out outcomes, mean over beta

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Reference:
    """What PyTorch says: the yardstick of every variant."""

    encoder: QueryEncoder | None
    nir: Nir
    hdp: Hdp | None
    query_vectors: NDArray[np.float32]  # (N, Q)
    familiarity: NDArray[np.float32] | None  # (N,)
    pooled: NDArray[np.float32] | None  # (N, width)
    ids: Sequence[NDArray[np.int64]]  # N tokenized queries, empty without an encoder
    correct: NDArray[np.float32] | None  # (N, M) held-out outcomes in the pool's order, NaN = not evaluated

    def prediction(self, policy: str, model_vectors: NDArray[np.float32]) -> Floats:
        """(N, M) the bare prediction by PyTorch, or by the formula on PyTorch's query vectors."""
        if policy == "hdp-paper":
            return HdpPaper().predict(self.query_vectors, model_vectors)
        if policy == "hdp" and self.hdp is not None:
            return self.hdp.predict(self.query_vectors, model_vectors)
        return self.nir.quality(self.query_vectors, model_vectors)


@torch.inference_mode()
def encode_reference(encoder: QueryEncoder, ids: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.float32], ...]:
    """Query vectors (N, Q), familiarity (N,) and pooled vectors (N, width) of tokenized queries, one at a time."""
    vectors, familiarity, pooled = [], [], []
    for row in ids:
        one = torch.from_numpy(row)[None]
        mask = torch.ones_like(one)
        views = encoder.views(one, mask)
        vectors.append(encoder.heads(torch.cat(views, dim=-1)).query_vector[0].numpy())
        familiarity.append(encoder.familiarity(one, mask).numpy())
        pooled.append(views[0][0].numpy())
    return np.stack(vectors), np.concatenate(familiarity), np.stack(pooled)


def measure(router: Router, reference: Reference) -> dict[str, Any]:
    """Every figure of one variant, for parity.json."""
    report: dict[str, Any] = {"queries": len(reference.query_vectors), "betas": list(BETAS)}
    vectors, familiarity = reference.query_vectors, reference.familiarity
    if reference.encoder is not None and reference.pooled is not None and reference.familiarity is not None:
        session = encoder_session(router)
        vectors, familiarity, pooled = _run_singly(session, reference.ids)
        report["familiarity_max_difference"] = _largest(familiarity, reference.familiarity)
        report["query_vector_max_difference"] = _largest(vectors, reference.query_vectors)
        report["pooled_max_difference"] = _largest(pooled, reference.pooled)
        report["pooled_cosine"] = cosine(pooled, reference.pooled)
        mean = reference.pooled.mean(axis=0)
        report["pooled_centred_cosine"] = cosine(pooled - mean, reference.pooled - mean)
        report["padded_batch_max_difference"] = _padded_difference(session, reference, vectors)
        report["batch_max_difference"] = _batch_difference(session, reference.ids, vectors, familiarity)
    model_vectors, costs = router.pool.vectors(), router.normalized_costs
    twins, twin_costs = _near_ties(model_vectors, costs)
    report["policies"], report["near_ties"] = {}, {}
    for policy in router.policies:
        # The whole route, not its parts: the graph scores what the variant's own encoder says.
        expected = router.refine(
            policy,
            reference.prediction(policy, model_vectors),
            reference.query_vectors,
            reference.familiarity,
        )
        actual = router.predict(vectors, policy, familiarity)
        report["policies"][policy] = compare(expected, actual, costs, reference.correct)
        bare = router.quality_of(policy).predict(vectors, twins)
        report["near_ties"][policy] = compare(reference.prediction(policy, twins), bare, twin_costs, None)
    return report


def check(report: dict[str, Any], variant: str, precision: str) -> None:
    """Hold a report against the bounds.

    A traced int8 graph shares activation scales in a batch: it is run on single queries, and what padding does to it
    is recorded, not bounded.

    Raises:
        ParityError: names the variant, the figure, its value and its bound.
    """

    def bound(name: str, value: float, limit: float) -> None:
        if not value <= limit:  # NaN is past every bound
            raise ParityError(f"variant {variant}: {name} is {value:.3g}, the bound is {limit:g}; not published")

    for group in ("policies", "near_ties"):
        for policy, figures in report[group].items():
            where = f"{policy} {group.replace('_', ' ')}"
            if precision == "fp32":
                bound(f"{where}: quality difference", figures["quality_max_difference"], FP32_TOLERANCE)
                bound(f"{where}: choices that differ outside numeric ties", figures["differing_choices"], 0)
            else:
                limit = BF16_REGRET if precision == "bf16" else INT8_REGRET
                bound(f"{where}: mean utility regret", figures["mean_regret"], limit)
                if figures.get("accuracy_loss") is not None:
                    bound(f"{where}: accuracy lost", figures["accuracy_loss"], INT8_ACCURACY_LOSS)
    if precision == "fp32":
        for name in ("query_vector_max_difference", "familiarity_max_difference", "padded_batch_max_difference"):
            if name in report:
                bound(name.replace("_", " "), report[name], FP32_TOLERANCE)
    elif report.get("graph") == "authored":
        bound("padded batch max difference", report["padded_batch_max_difference"], INVARIANCE)


def summary(report: dict[str, Any], default_policy: str) -> dict[str, Any]:
    """The few figures that stand in the manifest beside each variant."""
    figures = report["policies"][default_policy]
    wanted = (
        *("bytes", "verified_on", "queries", "query_vector_max_difference", "pooled_centred_cosine"),
        *("batch_max_difference", "latency"),
    )
    short = {key: report[key] for key in wanted if key in report}
    keys = ("quality_max_difference", "mean_regret", "agreement", "distinct_choices", "accuracy_loss")
    return {**short, "policy": default_policy, **{key: figures[key] for key in keys}}


def compare(
    expected: Floats, actual: Floats, normalized_costs: Floats, outcomes: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Qualities (N, M) by PyTorch and by the variant: the variant's decisions, judged by PyTorch's utilities."""
    regrets, agreements, differing = [], [], 0
    accuracy: dict[str, list[float | None]] = {"expected": [], "actual": []}
    distinct: dict[str, set[int]] = {"expected": set(), "actual": set()}
    rows = np.arange(len(expected))
    for beta in BETAS:
        judged = rule.utility(expected, normalized_costs, beta)
        own = rule.utility(actual, normalized_costs, beta)
        want, have = rule.choose(judged), rule.choose(own)
        loss = judged[rows, want] - judged[rows, have]
        regrets.append(float(loss.mean()))
        agreements.append(float((want == have).mean()))
        differing += int(((want != have) & (loss > rule.NUMERIC_TIE)).sum())
        for key, choice in (("expected", want), ("actual", have)):
            distinct[key].update(int(i) for i in np.unique(choice))
            if outcomes is not None:
                accuracy[key].append(_mean_observed(outcomes[rows, choice]))
    pairs = zip(accuracy["expected"], accuracy["actual"], strict=True)
    lost = [want - have for want, have in pairs if want is not None and have is not None]
    return {
        "quality_max_difference": _largest(actual, expected),
        "mean_regret": float(np.mean(regrets)),
        "agreement": float(np.mean(agreements)),
        "differing_choices": differing,
        "distinct_choices": len(distinct["actual"]),
        "distinct_choices_pytorch": len(distinct["expected"]),
        "accuracy_loss": float(np.mean(lost)) if lost else None,
        "accuracy_at_beta_0": accuracy["actual"][0] if outcomes is not None else None,
        "accuracy_at_beta_0_pytorch": accuracy["expected"][0] if outcomes is not None else None,
    }


def _mean_observed(correct: NDArray[np.float32]) -> float | None:
    """None where not one of the chosen candidates was evaluated on its query."""
    return None if np.isnan(correct).all() else float(np.nanmean(correct))


def _near_ties(vectors: NDArray[np.float32], costs: Floats) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Every candidate with a twin of equal cost whose vector differs by about a thousandth."""
    shift = np.random.default_rng(0).normal(0.0, 1e-3, vectors.shape).astype(np.float32)
    twins = np.stack([vectors, np.clip(vectors + shift, 0.0, 1.0)], axis=1).reshape(-1, vectors.shape[1])
    return twins, np.repeat(np.asarray(costs, dtype=np.float64), 2)


def encoder_session(router: Router) -> Session:
    """A session of the variant's encoder graph alone, with one thread.

    Raises:
        ParityError: the variant has none.
    """
    variant = router.bundle.manifest.variants[router.variant]
    if variant.encoder is None:
        raise ParityError(f"variant {variant.name} has no encoder to measure")
    return Session(router.bundle.path, variant.encoder, variant.provider, 1)


def _run_singly(session: Session, ids: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.float32], ...]:
    outputs = []
    for row in ids:
        inputs = {"input_ids": row[None], "attention_mask": np.ones_like(row)[None]}
        outputs.append(session.run_many(("query_vector", "familiarity", "pooled"), inputs))
    return tuple(np.concatenate(column) for column in zip(*outputs, strict=True))


def _padded_difference(session: Session, reference: Reference, singly: NDArray[np.float32]) -> float:
    """Largest difference of the query vector between padded batches of 5 unlike lengths and single queries."""
    if reference.encoder is None:
        return 0.0
    order = np.random.default_rng(0).permutation(len(reference.ids))[:250]
    worst = 0.0
    for start in range(0, len(order), 5):
        index = order[start : start + 5]
        ids, mask = pad_batch([reference.ids[i] for i in index], reference.encoder.spec.tokens.pad_id)
        batched = session.run("query_vector", {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        worst = max(worst, _largest(batched, singly[index]))
    return worst


def _batch_difference(
    session: Session, ids: Sequence[NDArray[np.int64]], vectors: NDArray[np.float32], familiarity: NDArray[np.float32]
) -> float:
    """Largest difference of query vector and familiarity between batches of one length and single queries.

    0 lets the runtime encode queries of one length together. Up to 64 lengths, the runtime's batch sizes in turn.
    """
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    lengths = sorted(by_length)
    worst = 0.0
    for turn, at in enumerate(np.unique(np.linspace(0, len(lengths) - 1, 64).astype(int))):
        most = max(2, TOKENS_TOGETHER // lengths[at])
        index = np.resize(by_length[lengths[at]], min(TOGETHER[turn % len(TOGETHER)], most))
        together = np.stack([ids[i] for i in index])
        inputs = {"input_ids": together, "attention_mask": np.ones_like(together)}
        found, known = session.run_many(("query_vector", "familiarity"), inputs)
        worst = max(worst, _largest(found, vectors[index]), _largest(known, familiarity[index]))
    return worst


def _largest(a: Floats, b: Floats) -> float:
    return float(np.max(np.abs(np.asarray(a, dtype=np.float64) - b)))


def cosine(a: Floats, b: Floats) -> dict[str, float]:
    """Mean and least cosine of the rows of (N, width) and (N, width)."""
    norms = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    values = (a * b).sum(axis=1) / norms
    return {"mean": float(values.mean()), "min": float(values.min())}
