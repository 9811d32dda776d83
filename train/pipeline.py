"""``arllm train``: outcomes and a pool in, a run folder out. Prepares, fits, measures, publishes atomically."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from arllm.runtime.calibration import calibrated
from arllm.runtime.errors import RunError
from arllm.runtime.pool import Pool
from arllm.runtime.tokens import TextTokenizer, TokenSpec
from arllm.train import backbones, rundir
from arllm.train.calibration import choose_calibration
from arllm.train.domains import Domains, assign_domains, difficulty, model_vectors
from arllm.train.encoder import EncoderSpec, QueryEncoder, encode_all
from arllm.train.familiarity import fit_familiarity
from arllm.train.fit import Examples, RouterNet, fit
from arllm.train.hdp import fit_hdp
from arllm.train.heads import fit_heads, standardize
from arllm.train.lexical import idf_weights, init_token_table, token_counts
from arllm.train.metrics import brier, candidate_auc, mean_per_subset
from arllm.train.nir import build_nir
from arllm.train.options import NANO, TrainOptions
from arllm.train.outcomes import Outcomes, assign_splits, carve_validation
from arllm.train.pools import match_pool
from arllm.train.staging import staged_folder
from arllm.train.teacher import teach

Progress = Callable[[str], None]


def train(
    outcomes: Outcomes,
    pool: Pool,
    options: TrainOptions,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Progress = lambda message: print(message, file=sys.stderr),
) -> rundir.Run:
    """Train the query encoder and NIR jointly, fit HDP on validation, write the run folder ``out``.

    While training, checkpoints stand in ``out`` + ".partial"; the folder goes when the run is written.

    Raises:
        RunError: ``out`` exists, a partial run exists and ``resume`` is not asked for, or nothing to learn from.
        OutcomesError, PoolError: from preparing the data.
    """
    out = Path(out)
    partial = _partial_folder(out, resume)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    outcomes = carve_validation(assign_splits(outcomes))
    pool = match_pool(pool, outcomes.candidates)
    outcomes = outcomes.columns(pool.names)
    train_rows, val_rows = outcomes.split("train"), outcomes.split("val")
    if options.max_queries is not None and options.max_queries < len(train_rows):
        order = np.random.default_rng(options.seed).permutation(len(train_rows))[: options.max_queries]
        train_rows = train_rows.rows(np.sort(order))
    if not len(train_rows) or not len(val_rows):
        raise RunError(f"{len(train_rows)} training and {len(val_rows)} validation queries: both splits need some")
    domains = assign_domains(train_rows, options.domains, min_queries=options.min_domain_queries)
    val_domains = assign_domains(val_rows, options.domains, names=domains.names)
    vectors = model_vectors(train_rows.correct, domains.index, len(domains.names), names=pool.names)
    pool = pool.with_vectors(pool.names, vectors)
    progress(
        f"{len(train_rows)} training and {len(val_rows)} validation queries, {len(pool)} candidates, "
        f"{len(domains.names)} domains"
    )

    partial.mkdir(parents=True, exist_ok=True)
    if resume and not (partial / "checkpoint.pt").is_file():
        # The first phase keeps no checkpoint: it is short, and seeded, so that it ends in the same weights.
        progress("interrupted before the first checkpoint: starting over")
        resume = False
    backbone = _backbone(options, train_rows.queries, partial, resume, progress)
    tokens = TokenSpec(options.max_tokens, backbone.prefix_ids, backbone.suffix_ids, backbone.pad_id, backbone.prompt)
    spec = EncoderSpec(backbone.spec, tokens, domains.names, options.embedding_width, backbone.source)
    tokenizer = TextTokenizer(backbone.tokenizer, tokens)
    examples, val_examples = (
        _examples(tokenizer, rows, d) for rows, d in ((train_rows, domains), (val_rows, val_domains))
    )
    encoder = QueryEncoder(spec, backbone.model, options.dropout)
    _start_lexical(encoder, examples, backbone.pretrained, options.seed)
    fit_familiarity(encoder, examples.ids, val_examples.ids)
    net = RouterNet(encoder, build_nir(options.nir, spec.query_width, len(domains.names)))
    taught_file = partial / "taught.npy"
    if resume:
        if options.teacher_folds and not taught_file.is_file():
            raise RunError(f"{taught_file}: missing, the run can't be resumed; delete {partial} and start again")
        examples = replace(examples, taught=np.load(taught_file) if options.teacher_folds else None)
    else:
        views, val_views = standardize(encoder, examples, val_examples, options, progress)
        if options.teacher_folds:
            taught = teach(encoder, views, examples, options, progress)
            np.save(taught_file, taught)
            examples = replace(examples, taught=taught)
        held_out = (val_views, val_examples)
        fit_heads(net, views, examples, vectors, options, held_out=held_out, progress=progress)
    history = fit(
        net,
        examples,
        val_examples,
        vectors,
        options,
        pretrained=backbone.pretrained,
        checkpoint=partial / "checkpoint.pt",
        identity={"data": [s.sha256 for s in outcomes.sources], "pool": list(pool.names), **options.to_json()},
        resume=resume,
        progress=progress,
    )

    query_vectors = encode_all(encoder, val_examples.ids)
    hdp = fit_hdp(query_vectors, vectors, val_rows.correct)
    predicted = net.nir.quality(query_vectors, vectors)
    calibration = choose_calibration(predicted, query_vectors, vectors, val_rows.correct, pool)
    table = calibration.table(pool.names)
    predicted = calibrated(calibration, table, predicted, query_vectors, vectors).astype(np.float32)
    metrics = _metrics(train_rows, val_rows, pool, predicted, query_vectors, val_domains)
    metrics["history"] = asdict(history)
    run = rundir.Run(
        encoder=encoder,
        nir=net.nir,
        hdp=hdp,
        calibration=calibration,
        domain_shares=tuple(_shares(domains)),
        mean_difficulty=float(np.nanmean(examples.difficulty)),
        tokenizer=backbone.tokenizer,
        pool=pool,
        options=options,
        source={
            "outcomes": [asdict(source) for source in outcomes.sources],
            "splits": dict(Counter(outcomes.splits)),
            "training_queries": len(train_rows),
            "seed": options.seed,
            # the generator marks its candidates, so that its outcomes can't pass for real ones further down
            "synthetic": any(c.metadata.get("synthetic") for c in pool.candidates),
        },
        metrics=metrics,
        heldout=rundir.HeldOut(val_rows.queries, val_rows.correct),
    )
    with staged_folder(out) as staging:
        rundir.write_run(run, staging)
    for name in ("checkpoint.pt", "tokenizer.json", "taught.npy"):
        (partial / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: holds something that isn't ours
        partial.rmdir()
    return run


def _partial_folder(out: Path, resume: bool) -> Path:
    """Where the run is made; nothing is written yet, so that unusable data leaves nothing behind."""
    if out.exists():
        raise RunError(f"{out}: exists already; choose another --out, or delete it")
    partial = out.with_name(out.name + ".partial")
    if resume and not partial.is_dir():
        raise RunError(f"{partial}: no interrupted run to resume; start without --resume")
    if not resume and (partial / "checkpoint.pt").exists():
        raise RunError(f"{partial}: an interrupted run; continue it with --resume, or delete it")
    return partial


def _backbone(
    options: TrainOptions, texts: tuple[str, ...], partial: Path, resume: bool, progress: Progress
) -> backbones.Backbone:
    """The backbone; a resumed nano keeps the tokenizer that its interrupted run trained."""
    path = partial / "tokenizer.json"
    progress(f"backbone {options.backbone}")
    if options.backbone == NANO:
        kept = Tokenizer.from_file(str(path)) if resume and path.is_file() else None
        backbone = backbones.nano(texts, vocab_size=options.vocab_size, layers=options.layers, tokenizer=kept)
        backbone.tokenizer.save(str(path))
        return backbone
    return backbones.load_backbone(options.backbone, layers=options.layers)


def _start_lexical(encoder: QueryEncoder, examples: Examples, pretrained: bool, seed: int) -> None:
    """The weights of the lexical view; a token table from scratch starts from LSA of the training queries."""
    counts = token_counts(examples.ids, encoder.spec.backbone.vocab_size)
    weights = idf_weights(counts)
    if not pretrained:
        weights = weights * init_token_table(encoder.backbone, counts, seed)
    encoder.token_weight.copy_(torch.from_numpy(weights))


def _examples(tokenizer: TextTokenizer, rows: Outcomes, domains: Domains) -> Examples:
    return Examples(
        ids=[tokenizer.encode(query)[0] for query in rows.queries],
        correct=rows.correct,
        domain=domains.index,
        difficulty=difficulty(rows.correct).astype(np.float32),
    )


def _shares(domains: Domains) -> list[float]:
    """Share of the training queries in each domain, of those in one; sum 1."""
    counts = np.bincount(domains.index[domains.index >= 0], minlength=len(domains.names))
    return [float(share) for share in counts / counts.sum()]


def _metrics(
    train_rows: Outcomes,
    val_rows: Outcomes,
    pool: Pool,
    predicted: NDArray[np.float32],
    query_vectors: NDArray[np.float32],
    val_domains: Domains,
) -> dict[str, Any]:
    """Validation measures of NIR beside the mean-per-subset baseline; an AUC that is undefined is null."""
    baseline = mean_per_subset(train_rows, val_rows)
    areas, base_areas = (candidate_auc(val_rows.correct, p) for p in (predicted, baseline))
    known = val_domains.index >= 0
    guessed = query_vectors[known, : len(val_domains.names)].argmax(axis=1)
    return {
        "split": "val",
        "queries": len(val_rows),
        "auc": {name: _number(a) for name, a in zip(pool.names, areas, strict=True)},
        "auc_mean_per_subset": {name: _number(a) for name, a in zip(pool.names, base_areas, strict=True)},
        "auc_mean": _number(np.nanmean(areas)),
        "auc_mean_per_subset_mean": _number(np.nanmean(base_areas)),
        "brier": brier(val_rows.correct, predicted),
        "domain_accuracy": _number(np.mean(guessed == val_domains.index[known])) if known.any() else None,
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
