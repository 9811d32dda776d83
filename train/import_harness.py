"""Outcomes from lm-evaluation-harness: the ``samples_<task>_<time>.jsonl`` files that ``--log_samples`` writes.

A row holds one document: ``doc_id``, ``doc`` (the document as the task sees it), ``doc_hash``, ``filter``, the
names of its ``metrics`` and a field for each. The few-shot prompt (``arguments``) and the answers are not read.

**The query** is the document's own text, by this rule, unless ``query_field`` names the fields:

1. a passage, where the document has one: the first of ``PASSAGES``;
2. the question: the first of ``QUESTIONS``, without which the document is refused;
3. the options: the first of ``OPTIONS`` that is a list of strings (or ARC's ``{"text": [...]}``), a line each,
   lettered. Without them "which of the following" would be one query of many documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from arllm.runtime.errors import OutcomesError
from arllm.train.importers import (
    DatasetNames,
    Observation,
    Paths,
    checked_query,
    dataset_of,
    each,
    each_path,
    join,
    refuse_pickle,
    score,
    text_id,
    text_list,
)
from arllm.train.outcomes import Outcomes
from arllm.train.records import Record, jsonl_records, lines

JoinBy: TypeAlias = Literal["doc_id", "text"]

PASSAGES = ("passage", "context", "narrative", "article", "story")
QUESTIONS = ("question", "Question", "query", "problem", "prompt", "input", "goal", "sentence", "ctx", "text")
OPTIONS = ("choices", "options", "endings")

# Every field of a row that is not a metric, in all versions of the harness since 0.4.
_NOT_METRICS = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
    | {"doc_hash", "prompt_hash", "target_hash"}
)
_FILE = re.compile(r"samples_(?P<task>.+?)(?:_(?P<stamp>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?))?$")


@dataclass(frozen=True)
class SampleFile:
    """One model's rows of one task: a file, or a split of a hub dataset. ``stamp`` sorts by time, "" if unknown."""

    name: str
    model: str
    task: str
    stamp: str
    records: Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class SampleOptions:
    """How rows are read; the fields are the arguments of :func:`import_harness`."""

    metric: tuple[str, ...]
    filter_name: tuple[str, ...]
    dataset: DatasetNames
    subset_from: str
    query_field: tuple[str, ...]
    join_by: JoinBy
    latest: bool


@dataclass(frozen=True)
class _Sample:
    """The part of a row that is kept."""

    where: str
    doc_id: str
    doc_hash: str
    filter_name: str
    query: str
    subset: str  # "" where the document lacks the field
    metrics: Mapping[str, Any]


def import_harness(
    paths: Paths,
    *,
    model: str | None = None,
    metric: str | Sequence[str] | None = None,
    filter_name: str | Sequence[str] | None = None,
    dataset: DatasetNames = None,
    subset_from: str = "task",
    query_field: str | Sequence[str] | None = None,
    join_by: JoinBy = "doc_id",
    latest: bool = False,
) -> Outcomes:
    """Read samples files (.jsonl, .json, also .gz), or every ``samples_*`` file below a folder.

    The model of a file is the ``model_name`` of the ``results_*.json`` beside it (that of the same time, where
    there are several); without one the name of its folder, as the harness writes it ("org__name").

    Args:
        model: the model of all files, in place of that.
        metric: the metric that says "correct"; of several the first that a file has. A file that has none of
            them, or where none is given, must have exactly one metric in [0, 1].
        filter_name: the same for the answer filter ("strict-match", "flexible-extract").
        dataset: None (each task is a dataset), one name for all, or prefixes of tasks to names.
        subset_from: "task", or a field of the document; a document without the field counts by its task.
        query_field: the fields of the document that make up the query, in place of the module's rule.
        join_by: "doc_id", checked against texts and hashes; or "text" within a task, where equal ones are
            averaged. Rows without a ``doc_id`` are joined by text.
        latest: of several runs of a task by one model take the last; else they are an error.

    Raises:
        OutcomesError: names the file and line, what is wrong and what mends it.
    """
    options = SampleOptions(each(metric), each(filter_name), dataset, subset_from, each(query_field), join_by, latest)
    files = [
        SampleFile(str(path), model or model_of(path), *task_and_stamp(path), records=_records(path))
        for path in find_files(each_path(paths), is_samples_file)
    ]
    return import_samples(files, options)


def is_samples_file(name: str) -> bool:
    return name.startswith("samples_") and name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def find_files(paths: Iterable[Path], wanted: Callable[[str], bool]) -> list[Path]:
    """The paths, folders replaced by the wanted files below them, in the order of their names."""
    found = []
    for path in paths:
        refuse_pickle(path)
        below = sorted(p for p in path.rglob("*") if p.is_file() and wanted(p.name)) if path.is_dir() else [path]
        if not below:
            raise OutcomesError(f"{path}: no samples files in the folder; run the evaluation with --log_samples")
        found += below
    return found


def task_and_stamp(path: Path) -> tuple[str, str]:
    stem = re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    parts = _FILE.match(stem)
    return (parts["task"], parts["stamp"] or "") if parts else (stem, "")


def model_of(path: Path) -> str:
    """See :func:`import_harness`."""
    _, stamp = task_and_stamp(path)
    beside = sorted(path.parent.glob("results_*.json"))
    same_run = [file for file in beside if stamp and file.stem == f"results_{stamp}"]
    names = {name for file in same_run or beside if (name := _model_name(file))}
    if len(names) > 1:
        raise OutcomesError(
            f"{path}: the results files beside it name the models {', '.join(sorted(names))}; "
            "put each model's files in a folder of its own, or name the model with --model"
        )
    return names.pop() if names else path.resolve().parent.name.replace("__", "/")


def _model_name(file: Path) -> str:
    try:
        results = json.loads("".join(lines(file)))
    except (ValueError, RecursionError) as cause:
        raise OutcomesError(f"{file}: malformed JSON ({cause}); mend it, or name the model with --model") from None
    name = results.get("model_name") if isinstance(results, dict) else None
    return name if isinstance(name, str) else ""


def _records(path: Path) -> Callable[[], Iterable[Record]]:
    return lambda: sample_records(path)


def sample_records(path: Path) -> Iterator[Record]:
    """The rows of a JSONL file, or of one that holds a single JSON array, as the leaderboard's older ones do."""
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        yield from jsonl_records(path)
        return
    if not path.name.lower().removesuffix(".gz").endswith(".json"):
        raise OutcomesError(f"{path}: unknown form; give .jsonl or .json (also .gz)")
    if not next(lines(path), "").lstrip().startswith("["):
        yield from jsonl_records(path)
        return
    try:
        rows = json.loads("".join(lines(path)))
    except (ValueError, RecursionError) as cause:
        raise OutcomesError(f"{path}: malformed JSON ({cause}); fetch the file again") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise OutcomesError(f"{path}:item {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:item {number}", row


def import_samples(files: Iterable[SampleFile], options: SampleOptions) -> Outcomes:
    """Join the rows of sample files, wherever they come from."""
    return join(_observations(_one_run_each(files, options.latest), options))


def _one_run_each(files: Iterable[SampleFile], latest: bool) -> list[SampleFile]:
    chosen: dict[tuple[str, str], SampleFile] = {}
    for file in files:
        other = chosen.setdefault((file.model, file.task), file)
        if other is file:
            continue
        if not latest or file.stamp == other.stamp:
            raise OutcomesError(
                f"{file.name}: {file.model!r} has the task {file.task!r} in {other.name} too; "
                "keep one, name the model with --model, or take the last run with --latest"
            )
        chosen[file.model, file.task] = max(file, other, key=lambda run: run.stamp)
    return list(chosen.values())


class _Settled:
    """What the files of a task settled on: another choice by another model would make its column incomparable."""

    def __init__(self) -> None:
        self._choices: dict[tuple[str, str], tuple[str, str]] = {}  # (what, task): the choice, the first file's name

    def settle(self, file: SampleFile, what: str, choice: str) -> str:
        earlier, by = self._choices.setdefault((what, file.task), (choice, file.name))
        if earlier != choice:
            raise OutcomesError(
                f"{file.name}: {file.task!r} has the {what} {choice!r} here and {earlier!r} in {by}: not comparable; "
                f"import models that have the same, or name it with --{what}"
            )
        return choice


def _observations(files: Iterable[SampleFile], options: SampleOptions) -> Iterator[Observation]:
    settled = _Settled()
    ids_of: dict[tuple[str, str], dict[str, str]] = {}  # (task, text): its documents, and where each stands
    asked = {*options.metric, *options.filter_name, options.subset_from} - {"task"}
    for file in files:
        samples = [_sample(where, record, options) for where, record in file.records()]
        if not samples:
            raise OutcomesError(f"{file.name}: no rows; remove the file")
        filters = list(dict.fromkeys(sample.filter_name for sample in samples))
        kept = settled.settle(file, "filter", _choose(file, "filter", filters, filters, options.filter_name))
        samples = [sample for sample in samples if sample.filter_name == kept]
        metrics = samples[0].metrics
        plausible = [name for name, value in metrics.items() if _plausible(value)]
        metric = settled.settle(file, "metric", _choose(file, "metric", list(metrics), plausible, options.metric))
        by_text = options.join_by == "text" or not all(sample.doc_id for sample in samples)
        settled.settle(file, "join", "text" if by_text else "doc_id")
        if not by_text:
            _check_ids(file.task, samples, ids_of)
        asked -= {*filters, *metrics, *(options.subset_from for sample in samples if sample.subset)}
        for sample in samples:
            if metric not in sample.metrics:
                raise OutcomesError(f'{sample.where}: no "{metric}", which the first row has; evaluate again')
            yield Observation(
                sample.where,
                file.model,
                text_id(file.task, sample.query) if by_text else f"{file.task}/{sample.doc_id}",
                sample.query,
                dataset_of(file.task, options.dataset),
                sample.subset or file.task,
                score(sample.where, metric, sample.metrics[metric], "name another metric with --metric"),
                by_text,
                "" if by_text else sample.doc_hash,  # equal texts of two documents are no contradiction
            )
    if asked:
        raise OutcomesError(f"no file has {min(asked)!r}, which was asked for; mend its spelling, or leave it out")


def _check_ids(task: str, samples: Sequence[_Sample], ids_of: dict[tuple[str, str], dict[str, str]]) -> None:
    """Refuse a file that numbers the documents in another way: one text, no id in common with earlier files.

    The same id with two texts is seen in joining; this sees the case where the ids don't overlap.
    """
    own: dict[str, dict[str, str]] = {}
    for sample in samples:
        own.setdefault(sample.query, {})[sample.doc_id] = sample.where
    for text, ids in own.items():
        earlier = ids_of.setdefault((task, text), {})
        if earlier and not earlier.keys() & ids.keys():
            (doc_id, where), (other_id, other) = next(iter(ids.items())), next(iter(earlier.items()))
            raise OutcomesError(
                f"{where}: the text of document {doc_id!r} is that of document {other_id!r} at {other}; "
                "the ids differ between the files: join by text"
            )
        earlier.update({doc_id: where for doc_id, where in ids.items() if doc_id not in earlier})


def _choose(
    file: SampleFile, what: str, present: Sequence[str], plausible: Sequence[str], asked: Sequence[str]
) -> str:
    for name in asked:
        if name in present:
            return name
    if len(plausible) == 1:
        return plausible[0]
    if not plausible:
        raise OutcomesError(f"{file.name}: no {what} in [0, 1]; it has: {', '.join(present) or 'none'}")
    raise OutcomesError(
        f"{file.name}: several {what}s: {', '.join(plausible)}; say which means correct with --{what} NAME"
    )


def _plausible(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and 0.0 <= value <= 1.0


def _sample(where: str, record: Mapping[str, Any], options: SampleOptions) -> _Sample:
    doc = record.get("doc")
    if not isinstance(doc, Mapping):
        raise OutcomesError(f'{where}: no "doc" object; give samples files of lm-evaluation-harness 0.4 or later')
    doc_id = record.get("doc_id")
    subset = None if options.subset_from == "task" else doc.get(options.subset_from)
    names = record.get("metrics")
    if not isinstance(names, list):  # older versions don't list them
        names = [name for name in record if name not in _NOT_METRICS]
    return _Sample(
        where,
        "" if doc_id is None else str(doc_id),
        str(record.get("doc_hash") or ""),
        str(record.get("filter") or "none"),
        checked_query(where, query_of(where, doc, options.query_field)),
        "" if subset is None else str(subset).strip(),
        {name: record[name] for name in names if name in record},
    )


def query_of(where: str, doc: Mapping[str, Any], fields: Sequence[str] = ()) -> str:
    """The query of a document, by ``fields`` or by the module's rule; its parts are parted by a blank line.

    Raises:
        OutcomesError: a field is missing or holds no text, or no field is a question.
    """
    if fields:
        parts = [_text_or_options(doc.get(field)) for field in fields]
        for field, part in zip(fields, parts, strict=True):
            if not part:
                raise OutcomesError(
                    f'{where}: "{field}" of doc is no text and no list of texts; its fields are {", ".join(doc)}'
                )
        return "\n\n".join(part for part in parts if part)
    question = _first_text(doc, QUESTIONS)
    if not question:
        raise OutcomesError(
            f"{where}: no question in doc; its fields are {', '.join(doc)}: name one with --query-field"
        )
    options = next((text for name in OPTIONS if (text := _options(doc.get(name)))), "")
    return "\n\n".join(part for part in (_first_text(doc, PASSAGES), question, options) if part)


def _first_text(doc: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((value for name in names if isinstance(value := doc.get(name), str) and value.strip()), "")


def _text_or_options(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() and text_list(value) is None else _options(value)


def _options(value: Any) -> str:
    texts = text_list(value.get("text") if isinstance(value, Mapping) else value)
    return "\n".join(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(texts or ()))
