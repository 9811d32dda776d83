"""Outcomes from the Open LLM Leaderboard's published details, of both generations, from files or from the hub.

The second generation (``open-llm-leaderboard/ORG__NAME-details``) has the harness's own rows: JSONL, or one JSON
array in the older ones. The first (``open-llm-leaderboard-old/details_ORG__NAME``) has Parquet without ids: the
query is its ``example`` (``query`` in the oldest), which is the question without the few-shot prompt, and rows are
joined by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arllm.runtime.errors import MissingExtraError, OutcomesError
from arllm.train.import_harness import (
    OPTIONS,
    JoinBy,
    SampleFile,
    SampleOptions,
    find_files,
    import_samples,
    is_samples_file,
    model_of,
    sample_records,
    task_and_stamp,
)
from arllm.train.importers import DatasetNames, Paths, each, parquet_columns
from arllm.train.outcomes import Outcomes
from arllm.train.records import Record, parquet_records

# Both generations are archived, so their benchmarks can be named here once and for all.
BENCHMARKS = {
    "leaderboard_bbh": "bbh",
    "leaderboard_gpqa": "gpqa",
    "leaderboard_ifeval": "ifeval",
    "leaderboard_math": "math_hard",
    "leaderboard_mmlu_pro": "mmlu_pro",
    "leaderboard_musr": "musr",
    "hendrycksTest": "mmlu",
    "truthfulqa_mc": "truthfulqa",
}
# The first generation's rows hold numbers beside its metrics (the right option's number, counts of tokens).
_OLD_METRICS = ("acc", "acc_norm", "mc1", "mc2", "em", "f1")
_HEAVY = frozenset(("arguments", "resps", "filtered_resps", "full_prompt", "input_tokens", "cont_tokens"))
_OLD_FILE = re.compile(r"details_harness\|(?P<task>[^|]+)\|\d+_(?P<stamp>[^|]+)\.parquet$")
_OLD_CONFIG = re.compile(r"harness_(?P<task>.+)_(?P<shots>\d+)$")
_REPO = re.compile(r"[\w.-]+/[\w.-]+$")


def import_leaderboard(
    sources: Paths,
    *,
    tasks: str | Sequence[str] | None = None,
    model: str | None = None,
    metric: str | Sequence[str] | None = None,
    filter_name: str | Sequence[str] | None = None,
    dataset: DatasetNames = BENCHMARKS,
    subset_from: str = "task",
    query_field: str | Sequence[str] | None = None,
    join_by: JoinBy = "doc_id",
    latest: bool = False,
) -> Outcomes:
    """Read details: files or folders, or, where there is no such path, models on the hub ("ORG/NAME").

    A name on the hub is a model, whose second-generation details are taken, or the id of a details dataset. Of a
    hub dataset the split "latest" of each task is read. The other arguments are those of
    :func:`arllm.train.import_harness.import_harness`.

    Args:
        tasks: read only the tasks that begin with one of these ("leaderboard_bbh"); MMLU-Pro alone is 400 MB
            a model.

    Raises:
        OutcomesError: as there; also where the hub has no such dataset or refuses it.
        MissingExtraError: the hub without ``datasets``, Parquet without pyarrow.
    """
    options = SampleOptions(each(metric), each(filter_name), dataset, subset_from, each(query_field), join_by, latest)
    prefixes = each(tasks)
    names = (sources,) if isinstance(sources, (str, Path)) else sources

    def files() -> Iterator[SampleFile]:
        for source in names:
            if isinstance(source, str) and not Path(source).exists() and _REPO.match(source):
                yield from _hub_files(source, model, prefixes)
            else:
                yield from _local_files(Path(source), model)

    wanted = [file for file in files() if not prefixes or file.task.startswith(prefixes)]
    if not wanted:
        raise OutcomesError(f"no task begins with {' or '.join(prefixes)}; leave --tasks out to read all")
    return import_samples(wanted, options)


def _local_files(source: Path, model: str | None) -> Iterator[SampleFile]:
    for path in find_files([source], lambda name: is_samples_file(name) or bool(_OLD_FILE.match(name))):
        task, stamp = task_and_stamp(path)
        if old := _OLD_FILE.match(path.name):
            task, stamp = _old_task(old["task"]), old["stamp"]
        yield SampleFile(str(path), model or _model_of(path), task, stamp, _rows_of(path))


def _model_of(path: Path) -> str:
    """The first generation keeps a model's files in a folder for each time, below one named after the model."""
    for folder in path.resolve().parents:
        if folder.name.startswith("details_"):
            return _model_in(folder.name)
    return model_of(path)


def _old_task(name: str) -> str:
    """The file's "arc:challenge" and the config's "arc_challenge" are one task."""
    return re.sub(r"[:-]", "_", name)


def _model_in(details: str) -> str:
    return details.removeprefix("details_").removesuffix("-details").replace("__", "/")


def _rows_of(path: Path) -> Callable[[], Iterable[Record]]:
    def rows() -> Iterator[Record]:
        if not path.name.lower().endswith(".parquet"):
            yield from sample_records(path)
            return
        columns = [name for name in parquet_columns(path) if name not in _HEAVY]
        for where, record in parquet_records(path, columns, ()):
            yield where, _as_harness(record)

    return rows


def _as_harness(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of the first generation in the harness's later layout; one of the second as it is."""
    if "doc" in record:
        return record
    metrics = record.get("metrics")
    values = metrics if isinstance(metrics, Mapping) else record
    present = {name: values[name] for name in _OLD_METRICS if values.get(name) is not None}
    text = record.get("example") or record.get("query")
    # Its choices were scored one by one and never shown to the model, or they stand in the text already.
    doc = {name: value for name, value in record.items() if name not in OPTIONS} | {"question": text}
    return {"doc": doc, "metrics": list(present), **present}


def _hub_files(source: str, model: str | None, prefixes: tuple[str, ...]) -> Iterator[SampleFile]:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingExtraError("datasets", "hub", f"{source}: no such file; reading it from the hub") from None
    name = source.split("/")[1]
    is_details = name.startswith("details_") or name.endswith("-details")
    repo = source if is_details else f"open-llm-leaderboard/{source.replace('/', '__')}-details"
    details_model = _model_in(repo.split("/")[1])
    configs = _from_hub(repo, lambda: datasets.get_dataset_config_names(repo))
    for task, config in _tasks_of(configs, details_model).items():
        if not prefixes or task.startswith(prefixes):

            def rows(config: str = config) -> Iterator[Record]:
                table = _from_hub(repo, lambda: datasets.load_dataset(repo, config, split="latest"))
                for number, record in enumerate(table, 1):
                    yield f"{repo}/{config}:row {number}", _as_harness(record)

            yield SampleFile(f"{repo}/{config}", model or details_model, task, "", rows)


def _tasks_of(configs: Sequence[str], model: str) -> dict[str, str]:
    """The task of each config, without the groups: a group's name begins the names of its members."""
    tasks = {}
    prefix = model.replace("/", "__") + "__"
    old = [parts for config in configs if (parts := _OLD_CONFIG.match(config))]
    # Of several numbers of shots the leaderboard's own is the largest; fewer were tried before it opened.
    for parts in sorted(old, key=lambda parts: int(parts["shots"])):
        tasks[parts["task"]] = parts.string
    tasks |= {config.removeprefix(prefix): config for config in configs if config.startswith(prefix)}
    return {
        task: config for task, config in tasks.items() if not any(other.startswith(f"{task}_") for other in tasks)
    }


def _from_hub(repo: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as cause:  # `datasets` raises errors of half a dozen libraries
        raise OutcomesError(
            f"{repo}: not readable from the hub ({type(cause).__name__}: {cause}); check the name, and accept the "
            "dataset's conditions on its page if it has any"
        ) from None
