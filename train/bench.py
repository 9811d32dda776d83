"""What an evaluation works on: outcomes joined with a pool, and a router's qualities on them. Free of torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.runtime.pool import Pool
from arllm.train.outcomes import Outcomes, assign_splits, carve_validation

if TYPE_CHECKING:  # evaluation of given qualities needs no ONNX Runtime
    from arllm.runtime.router import Router

Array = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

SPLITS = ("val", "test", "ood")  # what can be judged
COVERAGE = 0.95


@dataclass(frozen=True, eq=False)
class Bench:
    """Outcomes and pool made to fit: the same candidates in the pool's order, every query with a split."""

    outcomes: Outcomes
    pool: Pool
    left_out: Mapping[str, str]  # candidate → why it can't be compared
    paid: Array | None = None  # (N, M) cost per query, by which choices are judged; None: the pool's flat costs
    unit: str = ""  # of the costs by which choices are judged


def prepare(
    outcomes: Outcomes,
    pool: Pool,
    *,
    coverage: float = COVERAGE,
    paid: Floats | None = None,
    paid_unit: str = "cost of each query",
) -> Bench:
    """Join outcomes and pool, and give splits to queries without one; a tenth of train becomes val where none is.

    Only candidates evaluated on at least ``coverage`` of *every* dataset's judged queries are kept: mean accuracies
    over different queries can't be compared, and one that skipped the hardest set would look best. Judged queries
    without an evaluated candidate are dropped.

    Args:
        paid: (N, M) over the rows and columns of ``outcomes``: what a query cost with a candidate. Choices are then
            judged by it, while decisions stay on the pool's flat costs; a judged pair with NaN is left out.
        paid_unit: the unit of ``paid``, for the report.

    Raises:
        OutcomesError: fewer than two candidates are left, or no query to judge or to choose settings on.
    """
    if paid is not None and paid.shape != outcomes.correct.shape:
        raise OutcomesError(f"costs per query have shape {paid.shape}, the outcomes {outcomes.correct.shape}")
    left_out = {name: "no outcomes" for name in pool.names if name not in outcomes.candidates}
    left_out |= {name: "not in the pool" for name in outcomes.candidates if name not in pool.names}
    known = [name for name in pool.names if name not in left_out]
    joined = carve_validation(assign_splits(outcomes.columns(known)))
    judged = np.array([split != "train" for split in joined.splits], dtype=np.bool_)
    costs = None
    if paid is not None:
        costs = np.asarray(paid[:, [outcomes.candidates.index(name) for name in known]], dtype=np.float64)
        blank = np.isnan(costs) & judged[:, None]  # the baselines may learn from answers whose cost nobody noted
        joined = replace(joined, correct=np.where(blank, np.float32(np.nan), joined.correct))
    keep = np.flatnonzero(~judged | ~np.isnan(joined.correct).all(axis=1))
    joined, judged = joined.rows(keep), judged[keep]
    datasets = np.array(joined.datasets)
    for column, name in enumerate(known):
        for dataset in sorted(set(datasets[judged])):
            share = float(np.mean(~np.isnan(joined.correct[judged & (datasets == dataset), column])))
            if share < coverage:
                left_out.setdefault(name, f"evaluated on {share:.0%} of {dataset}")
    kept = [name for name in known if name not in left_out]
    if len(kept) < 2:
        raise OutcomesError(
            f"an evaluation needs two candidates with outcomes on {coverage:.0%} of every dataset; left are "
            f"{kept or 'none'}, the others: " + ", ".join(f"{name} ({why})" for name, why in left_out.items())
        )
    joined = joined.columns(kept)
    some = np.flatnonzero(~np.isnan(joined.correct).all(axis=1))
    joined = joined.rows(some)
    for need in (("val",), ("test", "ood")):
        if not set(need) & set(joined.splits):
            raise OutcomesError(f"no query in the split {' or '.join(need)}; the evaluation needs some")
    if costs is not None:
        costs = costs[keep][some][:, [known.index(name) for name in kept]]
    return Bench(joined, pool.subset(kept), left_out, costs, pool.unit if costs is None else paid_unit)


def router_qualities(
    router: Router, outcomes: Outcomes, policies: Sequence[str] | None = None, splits: Collection[str] = SPLITS
) -> dict[str, Array]:
    """Predicted quality under each policy: policy → (N, M) float64, columns those of ``outcomes``.

    Each distinct text is encoded once, by ``Router.encode``. Rows of other splits are NaN.

    Args:
        policies: None: all of the bundle's.

    Raises:
        OutcomesError: a candidate of the outcomes is not in the router's pool.
        PolicyError, QueryError: as the router raises.
    """
    at = {name: i for i, name in enumerate(router.pool.names)}
    missing = [name for name in outcomes.candidates if name not in at]
    if missing:
        raise OutcomesError(f"candidate {missing[0]!r} is not in the router's pool; keep those of both")
    columns = [at[name] for name in outcomes.candidates]
    rows = [i for i, split in enumerate(outcomes.splits) if split in splits]
    texts = list(dict.fromkeys(outcomes.queries[i] for i in rows))
    found: dict[str, Array] = {}
    position = {text: i for i, text in enumerate(texts)}
    index = [position[outcomes.queries[i]] for i in rows]
    encoded = [router.encode(text) for text in texts]
    familiarity = np.array([one.familiarity for one in encoded])
    for policy in router.policies if policies is None else policies:
        quality = np.full((len(outcomes), len(columns)), np.nan)
        if encoded:
            vectors = np.stack([one.vector for one in encoded])
            quality[rows] = router.predict(vectors, policy, familiarity)[:, columns][index]
        found[policy] = quality
    return found
