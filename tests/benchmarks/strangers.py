"""Familiarity on queries left out of training: what its marks were chosen by. Prints a table; see QUALITY.md.

    python tests/benchmarks/strangers.py ../shared/data/ollb2 --pool ../shared/data/costs.csv \
        --pool-where bundle=ollb2 --cost-column usd_out_per_Mtok --leave bbh/web_of_lies --leave bbh/

Each group of subsets is left out in turn: tokenizer, token table, pair densities and a kernel regression are made
from the other training queries; its own are then strangers. The ood split is never touched.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from arllm.runtime.tokens import TextTokenizer, TokenSpec
from arllm.train import curves
from arllm.train.backbones import nano
from arllm.train.bench import Bench, prepare
from arllm.train.encoder import EncoderSpec, QueryEncoder, view_all
from arllm.train.familiarity import fit_familiarity, wordings
from arllm.train.lexical import idf_weights, init_token_table, token_counts
from arllm.train.outcomes import read_outcomes
from arllm.train.pools import match_pool, read_pool
from arllm.train.teacher import kernel_regression

MARKS = ((0.0, 0.05), (0.01, 0.1), (0.05, 0.1), (0.05, 0.25), (0.1, 0.5), (0.25, 0.5))  # quantiles of validation


def strangers(bench: Bench, left_out: tuple[str, ...], max_tokens: int = 128) -> dict[str, Any]:
    """AUROC of wording between known and left-out queries; gap closed on both, by the marks."""
    outcomes = bench.outcomes
    names = [f"{d}/{s}" for d, s in zip(outcomes.datasets, outcomes.subsets, strict=True)]
    strange = np.array([any(name.startswith(prefix) for prefix in left_out) for name in names])
    split = np.array(outcomes.splits)
    known, val = np.flatnonzero((split == "train") & ~strange), np.flatnonzero((split == "val") & ~strange)
    other = np.flatnonzero(np.isin(split, ("train", "val")) & strange)
    other = np.random.default_rng(0).permutation(other)[:1500]
    backbone = nano([outcomes.queries[i] for i in known])
    tokens = TokenSpec(max_tokens, backbone.prefix_ids, backbone.suffix_ids, backbone.pad_id)
    tokenizer = TextTokenizer(backbone.tokenizer, tokens)
    encoder = QueryEncoder(EncoderSpec(backbone.spec, tokens, ("all",), 0), backbone.model)
    ids = {i: tokenizer.encode(outcomes.queries[i])[0] for i in (*known, *val, *other)}
    counts = token_counts([ids[i] for i in known], backbone.spec.vocab_size)
    weights = idf_weights(counts) * init_token_table(backbone.model, counts, 0)
    encoder.token_weight.copy_(torch.from_numpy(weights))
    fit_familiarity(encoder, [ids[i] for i in known], [ids[i] for i in val])
    judged = np.concatenate([val, other])
    half = backbone.spec.hidden_size
    features, queries = (view_all(encoder, [ids[i] for i in rows])[:, half:] for rows in (known, judged))
    quality = kernel_regression(features, outcomes.correct[known], queries, 0)
    prior = np.nanmean(outcomes.correct[known], axis=0)
    wording = wordings(encoder, [ids[i] for i in judged])
    is_known = np.arange(len(judged)) < len(val)
    tables = [curves.outcome_table(outcomes.correct[rows], bench.pool.costs) for rows in (val, other)]
    best = curves.best_single(outcomes.correct[known])

    def gap(qualities: Any, rows: Any, table: curves.Table) -> float:
        betas = curves.hull_betas(qualities[is_known], tables[0])
        played = curves.play(qualities[rows], table, betas)
        top = curves.play(qualities[rows], table, [0.0])
        return float(curves.measure(played, top, curves.frame(tables[0], table, best)).gap_closed)

    rows = []
    for marks in (None, *MARKS):
        certain = np.ones(len(judged))
        if marks is not None:
            low, high = np.quantile(wording[is_known], marks)
            certain = np.clip((wording - low) / max(high - low, 1.0), 0.0, 1.0)
        mixed = prior + certain[:, None] * (quality - prior)
        rows.append(
            {
                "marks": marks,
                "left out": gap(mixed, ~is_known, tables[1]),
                "known": gap(mixed, is_known, tables[0]),
                "familiarity": [float(certain[~is_known].mean()), float(certain[is_known].mean())],
            }
        )
    area = float(roc_auc_score(is_known, wording))
    return {"left_out": left_out, "queries": len(other), "auroc": area, "by_marks": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Familiarity on queries left out of training.")
    parser.add_argument("outcomes")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--pool-where", action="append", default=[])
    parser.add_argument("--cost-column")
    parser.add_argument("--leave", action="append", required=True, help="dataset/subset prefixes, comma-separated")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    where = dict(item.split("=", 1) for item in given.pool_where)
    outcomes = read_outcomes(given.outcomes)
    pool = read_pool(given.pool, cost_column=given.cost_column, where=where or None)
    names = [name for name in outcomes.candidates if name in pool.names]
    bench = prepare(outcomes, match_pool(pool, names))
    found = [strangers(bench, tuple(leave.split(","))) for leave in given.leave]
    if given.json:
        json.dump(found, sys.stdout)
        return
    for one in found:
        print(f"\n{', '.join(one['left_out'])}: {one['queries']} queries, AUROC of wording {one['auroc']:.3f}")
        print("| marks | gap closed, left out | gap closed, known | mean familiarity, left out / known |")
        print("|---|---|---|---|")
        for row in one["by_marks"]:
            marks = "none" if row["marks"] is None else "{:g} … {:g}".format(*row["marks"])
            strange, known = row["familiarity"]
            print(f"| {marks} | {row['left out']:.1%} | {row['known']:.1%} | {strange:.2f} / {known:.2f} |")


if __name__ == "__main__":
    main()
