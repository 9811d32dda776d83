"""A run with a smaller vocabulary: which pieces it keeps, its network on them, and what is lost, measured.

Knows nothing about graphs, variants or bundles: it stands before all of them, and what it returns is a run like any
other. Which vocabularies are whole, and where ids agree, is the business of :mod:`arllm.export.vocabulary`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arllm.export.parity import FP32_TOLERANCE, compare
from arllm.export.vocabulary import BYTES, Vocabulary
from arllm.runtime.errors import ExportError, OutcomesError, ParityError
from arllm.runtime.tokens import TextTokenizer
from arllm.train.encoder import QueryEncoder, by_length, encode_all
from arllm.train.options import NANO
from arllm.train.outcomes import Source, source_of
from arllm.train.records import lines
from arllm.train.run_router import run_router
from arllm.train.rundir import Run
from arllm.train.traffic import held_out, read_traffic

CHARACTERS = 8  # single characters, the most frequent first, may make up one part in so many
COVERED_SAMPLE = 64  # queries whose ids agree, on which the two networks must agree too
SOURCE_KEY = "vocabulary"  # of what was trimmed and lost, in a run's source and so in a bundle's

Ids = NDArray[np.int64]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """What queries look like: tokenized, their texts, and the files that they come from."""

    ids: list[Ids]
    queries: frozenset[str]
    sources: tuple[Source, ...]


def trim(run: Run, keep: str, verify_queries: int, progress: Progress) -> Run:
    """The run on fewer pieces; ``keep`` is their number, or the path of a corpus whose queries must stay as they are.

    A number takes, after what any text needs (:meth:`Vocabulary.indispensable`) and the prompt: the most frequent
    single characters, up to one piece in ``CHARACTERS``; the pieces of the training queries, by the number of queries
    that hold them, which the run's idf weights tell; then pieces by the rank of their merges, which is their
    frequency in the tokenizer's own training. ``nano``'s tokenizer comes from the training queries, so that its ranks
    say both. A corpus takes every piece that it uses, and the same share of single characters.

    What was done is told by the run's ``source["vocabulary"]``, with :func:`losses` on up to ``verify_queries``
    held-out queries that are not in the corpus.

    Raises:
        ExportError: the tokenizer is no plain BPE, or the number is too small or not smaller than what is there.
        OutcomesError: the corpus can't be read.
        ParityError: the trimmed network differs from the whole one where ids agree.
    """
    vocabulary = Vocabulary(run.tokenizer, run.encoder.spec.backbone.vocab_size)
    progress(f"trimming a vocabulary of {len(vocabulary)} pieces")
    whole = run.text_tokenizer()
    spec = whole.spec
    ends = [*spec.prefix_ids, *spec.suffix_ids, spec.pad_id, *whole.encode("")[0].tolist()]
    needed = vocabulary.indispensable() | {vocabulary.pieces[i] for i in ends}
    by: dict[str, Any]
    if keep.isdecimal():
        corpus, limit = Corpus([], frozenset(), ()), int(keep)
        by = {"size": limit}
        if limit >= len(vocabulary):
            raise ExportError(f"a vocabulary of {len(vocabulary)} pieces can't be trimmed to {limit}: give fewer")
        characters = vocabulary.characters[: limit // CHARACTERS]
        kept = vocabulary.closed(needed, [*characters, *_trained(run, vocabulary), *vocabulary.built()], limit)
    else:
        corpus = read_corpus(keep, whole)
        by = {"corpus": [asdict(source) for source in corpus.sources], "queries": len(corpus.ids)}
        used = np.unique(np.concatenate(corpus.ids)).tolist()
        needed = vocabulary.closed(needed | {vocabulary.pieces[i] for i in used})
        limit = len(needed) * CHARACTERS // (CHARACTERS - 1)
        kept = vocabulary.closed(needed, vocabulary.characters, limit)
    tokenizer, old = vocabulary.trimmed(kept)
    trimmed = replace(run, encoder=trim_encoder(run.encoder, old), tokenizer=tokenizer)
    unseen = np.flatnonzero([query not in corpus.queries for query in run.heldout.queries])
    figures = losses(run, trimmed, old, np.random.default_rng(0).permutation(unseen)[:verify_queries])
    told = {"from": len(vocabulary), "to": len(old), "by": by, "losses": figures}
    progress(f"kept {len(old)} of {len(vocabulary)} pieces; {told_losses(figures)}")
    return replace(trimmed, source={**run.source, SOURCE_KEY: told})


def read_corpus(path: str | os.PathLike[str], tokenizer: TextTokenizer) -> Corpus:
    """Queries in any form of :func:`arllm.train.traffic.read_traffic`, or a ``.txt`` file, which is one long text.

    Rows of the splits val, test and ood are left out: what trimming loses is measured on such.

    Raises:
        OutcomesError: the file can't be read, or holds no query.
    """
    path = Path(path)
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        text = "".join(lines(path))
        if not text.strip():
            raise OutcomesError(f"{path}: the file holds no text")
        ids = tokenizer.tokenizer.encode(tokenizer.spec.prompt + text, add_special_tokens=False).ids
        return Corpus([np.array(ids, dtype=np.int64)], frozenset({text}), (source_of(path),))
    rows = held_out(read_traffic(path), ("", "train"))
    ids = [tokenizer.encode(query)[0] for query in rows.queries]
    return Corpus(ids, frozenset(rows.queries), rows.sources or (source_of(path),))


def trim_encoder(encoder: QueryEncoder, old: Ids) -> QueryEncoder:
    """The network on the tokens of ``old`` alone, renumbered in that order: (kept,) int64 former ids, ascending."""
    new = {i: at for at, i in enumerate(old.tolist())}
    tokens, rows = encoder.spec.tokens, torch.from_numpy(old)
    spec = replace(
        encoder.spec,
        backbone=replace(encoder.spec.backbone, vocab_size=len(old)),
        tokens=replace(
            tokens,
            prefix_ids=tuple(new[i] for i in tokens.prefix_ids),
            suffix_ids=tuple(new[i] for i in tokens.suffix_ids),
            pad_id=new[tokens.pad_id],
        ),
    )
    state = dict(encoder.state_dict())
    for name in ("backbone.embed_tokens.weight", "token_weight"):
        state[name] = state[name][rows]
    former = rows if encoder.original_ids is None else encoder.original_ids[rows]
    trimmed = QueryEncoder(spec)
    trimmed.load_state_dict({name: tensor for name, tensor in state.items() if name != "original_ids"})
    trimmed.original_ids = former
    return trimmed.eval()


def losses(run: Run, trimmed: Run, old: Ids, index: Ids) -> dict[str, Any]:
    """What trimming changes on the held-out queries at ``index``; a figure without a query is null.

    ``agreement`` of ids, remapped; ``tokens`` and ``byte_tokens`` (of characters without a piece), trimmed and whole;
    regret, choices and accuracy of the default policy against the untrimmed run's, by PyTorch, as parity has them.

    Raises:
        ParityError: query vectors differ although the ids agree.
    """
    new = np.full(max(run.tokenizer.get_vocab().values()) + 1, -1, dtype=np.int64)
    new[old] = np.arange(len(old))
    before, after = (_encoded(each, index) for each in (run, trimmed))
    same = np.array([np.array_equal(new[a], b) for a, b in zip(before.ids, after.ids, strict=True)], dtype=np.bool_)
    _check_covered(run.encoder, trimmed.encoder, before, after, np.flatnonzero(same)[:COVERED_SAMPLE])
    others = np.flatnonzero(~same)
    share = len(others) / max(1, len(index))
    figures = _compared(run, trimmed, before, after, others, index) if len(others) else {}
    return {
        "queries": len(index),
        "agreement": float(same.mean()) if len(index) else None,
        "tokens": [after.tokens, before.tokens],
        "byte_tokens": [after.byte_tokens, before.byte_tokens],
        "mean_regret": share * figures.get("mean_regret", 0.0) if len(index) else None,
        "choice_agreement": 1.0 - share * (1.0 - figures.get("agreement", 1.0)) if len(index) else None,
        "where_ids_differ": {"queries": len(others), **figures},
    }


def told_losses(figures: dict[str, Any]) -> str:
    """The figures of :func:`losses` in words."""
    if not figures["queries"]:
        return "what is lost was not measured: every held-out query is in the corpus"
    tokens, whole = figures["tokens"]
    return (
        f"ids agree on {figures['agreement']:.1%} of {figures['queries']} held-out queries, "
        f"{tokens / whole:.3f} times the tokens, mean regret {figures['mean_regret']:.1e}"
    )


@dataclass(frozen=True)
class _Encoded:
    """Tokenized queries; all their tokens, those counted that were cut; and of those left, the bytes."""

    ids: list[Ids]
    tokens: int
    byte_tokens: int


def _encoded(run: Run, index: Ids) -> _Encoded:
    tokenizer, vocabulary = run.text_tokenizer(), run.tokenizer.get_vocab()
    rows = [tokenizer.encode(run.heldout.queries[i]) for i in index]
    ids = [row for row, _ in rows]
    bytes_ = np.array([vocabulary[piece] for piece in BYTES if piece in vocabulary], dtype=np.int64)
    return _Encoded(
        ids,
        sum(len(row) + truncation.tokens_dropped for row, truncation in rows),
        sum(int(np.isin(row, bytes_).sum()) for row in ids),
    )


def _check_covered(
    whole: QueryEncoder, trimmed: QueryEncoder, before: _Encoded, after: _Encoded, index: NDArray[np.intp]
) -> None:
    if not len(index):
        return
    expected = _vectors(whole, [before.ids[i] for i in index])
    actual = _vectors(trimmed, [after.ids[i] for i in index])
    for name, a, b in zip(("query vector", "familiarity"), expected, actual, strict=True):
        difference = float(np.abs(a - b).max())
        if not difference <= FP32_TOLERANCE:
            raise ParityError(
                f"trimmed vocabulary: {name} differs by {difference:.3g} where token ids agree, the bound is "
                f"{FP32_TOLERANCE:g}; not published"
            )


def _vectors(encoder: QueryEncoder, ids: Sequence[Ids]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Query vectors (N, Q) and familiarity (N,)."""
    with torch.inference_mode():
        familiarity = by_length(encoder, ids, lambda rows, mask: encoder.familiarity(rows, mask)[:, None], 1)
    return encode_all(encoder, ids), familiarity[:, 0]


def _compared(
    run: Run, trimmed: Run, before: _Encoded, after: _Encoded, others: NDArray[np.intp], index: Ids
) -> dict[str, Any]:
    """The default policy's choices by either run on the queries at ``others``."""
    router = run_router(run, "run")
    qualities = []
    for encoder, encoded in ((run.encoder, before), (trimmed.encoder, after)):
        vectors, familiarity = _vectors(encoder, [encoded.ids[i] for i in others])
        qualities.append(router.predict(vectors, familiarity=familiarity))
    expected, actual = qualities
    return compare(expected, actual, router.normalized_costs, run.heldout.correct[index[others]])


def _trained(run: Run, vocabulary: Vocabulary) -> list[str]:
    """Pieces that training queries hold, by the number of these; none where the tokenizer's ranks tell it."""
    if run.options.backbone == NANO:
        return []
    weight = run.encoder.token_weight.detach().cpu().numpy()  # inverse document frequency, the largest where unseen
    order = np.argsort(weight, kind="stable")
    return [vocabulary.pieces[i] for i in order[weight[order] < weight.max()].tolist() if i in vocabulary.pieces]
