"""Tests of reading outcomes (train/outcomes.py, train/records.py): the forms, the errors, the real files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import MissingExtraError, OutcomesError
from arllm.train.domains import assign_domains, difficulty, model_vectors
from arllm.train.outcomes import assign_splits, read_outcomes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAN = float("nan")


def row(query: str = "2 + 2?", model: str = "a", correct: Any = 1, **more: Any) -> dict[str, Any]:
    return {"query": query, "answer": "…", "model": model, "dataset": "sums", "correct": correct, **more}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_wide(folder: Path, queries: list[Any], labels: str) -> Path:
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "labels.csv").write_text(labels, encoding="utf-8")
    return folder


def query(query_id: str, **more: Any) -> dict[str, Any]:
    return {"query_id": query_id, "dataset": "sums", "query": f"text of {query_id}", **more}


# --- forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_wide_folder(tmp_path: Path, packed: bool) -> None:
    write_wide(
        tmp_path,
        [query("x", subset="easy", split="train"), query("y")],
        "query_id,b,a\ny,0.5,\nx,1,0\n",  # rows in another order than the queries
    )
    if packed:
        for name in ("queries.jsonl", "labels.csv"):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
            (tmp_path / name).unlink()
    found = read_outcomes(tmp_path)
    assert found.query_ids == ("x", "y")
    assert found.queries == ("text of x", "text of y")
    assert found.subsets == ("easy", "sums")
    assert found.splits == ("train", "")
    assert found.candidates == ("b", "a")
    assert found.correct.dtype == np.float32
    np.testing.assert_array_equal(found.correct, [[1, 0], [0.5, NAN]])
    for source in found.sources:
        data = Path(source.path).read_bytes()
        assert (source.sha256, source.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert len(found.sources) == 2


def test_wide_pair_of_paths_equals_the_folder(tmp_path: Path) -> None:
    write_wide(tmp_path, [query("x")], "query_id,a\nx,1\n")
    pair = read_outcomes(str(tmp_path / "queries.jsonl"), str(tmp_path / "labels.csv"))
    folder = read_outcomes(tmp_path)
    assert pair.query_ids == folder.query_ids
    assert pair.sources == folder.sources


LONG = [
    row("first, with\na \"quoted\" line", "m2", True, subset="s", split="train", query_id="q1"),
    row("second", "m1", 0.25, subset="", split="", query_id="q2"),
    row("first, with\na \"quoted\" line", "m1", False, subset="s", split="train", query_id="q1"),
]  # fmt: skip


def write_long(folder: Path, form: str) -> Path:
    path = folder / f"outcomes{form}"
    if form == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [{**r, "correct": float(r["correct"]), "subset": r["subset"] or None} for r in LONG]
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form.startswith(".jsonl"):
        write_jsonl(path, LONG)
    else:
        write_csv(folder / "outcomes.csv", LONG)
        if form == ".csv.gz":
            path.write_bytes(gzip.compress((folder / "outcomes.csv").read_bytes()))
    return path


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"])
def test_long_forms_agree(tmp_path: Path, form: str) -> None:
    found = read_outcomes(write_long(tmp_path, form))
    assert found.query_ids == ("q1", "q2")
    assert found.queries[0] == 'first, with\na "quoted" line'
    assert found.subsets == ("s", "sums")
    assert found.splits == ("train", "")
    assert found.candidates == ("m2", "m1")
    np.testing.assert_array_equal(found.correct, [[1, 0], [NAN, 0.25]])
    assert len(found.sources) == 1


def test_repeated_rows_are_averaged(tmp_path: Path) -> None:
    rows = [row(correct=1), row(correct=0), row(correct=0), row(correct=0.5), row(model="b", correct=1)]
    found = read_outcomes(write_jsonl(tmp_path / "o.jsonl", rows))
    np.testing.assert_array_equal(found.correct, [[0.375, 1]])


def test_query_id_defaults_to_the_hash_of_the_query(tmp_path: Path) -> None:
    found = read_outcomes(write_jsonl(tmp_path / "o.jsonl", [row("é"), row("f", query_id=7)]))
    assert found.query_ids == (hashlib.sha256("é".encode()).hexdigest()[:16], "7")


def test_csv_reads_words_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_bytes("\ufeffquery,model,dataset,correct\r\nx,a,d,TRUE\r\ny,a,d,false\r\nz,a,d,0.5\r\n".encode())
    np.testing.assert_array_equal(read_outcomes(path).correct[:, 0], [1, 0, 0.5])


def test_a_query_longer_than_the_field_limit_of_csv(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert read_outcomes(write_csv(tmp_path / "o.csv", [row(long)])).queries == (long,)


def test_unicode_line_separators_do_not_cut_a_query(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps(row("a\u2028b"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_outcomes(path).queries == ("a\u2028b",)


def test_ignore_unknown_leaves_out_rows_and_columns(tmp_path: Path) -> None:
    rows = [row("x", "a"), row("y", "stray"), row("x", "b", 0)]
    found = read_outcomes(write_jsonl(tmp_path / "o.jsonl", rows), candidates=["a", "b"], ignore_unknown=True)
    assert (found.queries, found.candidates) == (("x",), ("a", "b"))
    write_wide(tmp_path, [query("x")], "query_id,stray,a\nx,1,0\n")
    found = read_outcomes(tmp_path, candidates={"a"}, ignore_unknown=True)
    assert found.candidates == ("a",)
    np.testing.assert_array_equal(found.correct, [[0]])


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "o.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"arllm\[eval\]"):
        read_outcomes(path)


def test_reading_imports_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, arllm.train.outcomes, arllm.train.domains, arllm.train.pools;"
        "print(sorted({'torch', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"query": "x",', "malformed JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ({k: v for k, v in row().items() if k != "query"}, 'no "query"'),
        ({k: v for k, v in row().items() if k != "model"}, 'no "model"'),
        ({k: v for k, v in row().items() if k != "dataset"}, 'no "dataset"'),
        ({k: v for k, v in row().items() if k != "correct"}, "correct is empty"),
        (row(query=["x"]), '"query" must be a string'),
        (row(query=""), '"query" is empty'),
        (row(query=" \n"), '"query" is empty'),
        (row(query="\ud800"), "surrogate"),
        (row(model=3), '"model" must be a string'),
        (row(query_id=True), '"query_id" must be a string'),
        (row(correct=None), "correct is empty; leave the row out"),
        (row(correct=NAN), "correct is NaN; leave the row out where the model was not evaluated"),
        (row(correct=float("inf")), "correct is inf"),
        (row(correct=1.5), "correct is 1.5"),
        (row(correct=-1), "correct is -1"),
        (row(correct=10**400), "scale it to [0, 1]"),
        (row(correct="yes"), "not 'yes'"),
        (row(split="dev"), "unknown split 'dev'"),
        (row(dataset="other"), 'another "dataset" than at'),
        (row(subset="other"), 'another "subset" than at'),
        (row(split="test"), 'another "split" than at'),
    ],
)
def test_bad_jsonl_row(tmp_path: Path, bad: Any, says: str) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [row(), "", bad])
    with pytest.raises(OutcomesError) as caught:
        read_outcomes(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert says in str(caught.value)


def test_one_id_with_two_texts_names_both_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [row("x", query_id="q"), row("y", "b", query_id="q")])
    with pytest.raises(OutcomesError) as caught:
        read_outcomes(path)
    assert str(caught.value).startswith(f"{path}:2: query id 'q' has another \"query\" than at {path}:1")


def test_unknown_model_names_the_model_and_what_mends_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [row("x", "a"), row("x", "stray")])
    with pytest.raises(OutcomesError) as caught:
        read_outcomes(path, candidates=["a"])
    message = str(caught.value)
    assert message.startswith(f"{path}:2: model 'stray'")
    assert "add it to the pool, or pass --ignore-unknown" in message
    write_wide(tmp_path, [query("x")], "query_id,a,stray\nx,1,0\n")
    with pytest.raises(OutcomesError, match=r"labels\.csv:1: model 'stray'.*--ignore-unknown"):
        read_outcomes(tmp_path, candidates=["a"])


def test_nothing_left_of_the_pool(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [row()])
    with pytest.raises(OutcomesError, match=r"o\.jsonl: no rows of a candidate of the pool"):
        read_outcomes(path, candidates=["z"], ignore_unknown=True)
    write_wide(tmp_path, [query("x")], "query_id,a\nx,1\n")
    with pytest.raises(OutcomesError, match=r"labels\.csv:1: no column of a candidate of the pool"):
        read_outcomes(tmp_path, candidates=["z"], ignore_unknown=True)


CSV_HEADER = "query,model,dataset,correct,split\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("query,model,dataset\nx,a,d\n", 1, 'no column "correct"'),
        ("query,model,dataset,correct,model\nx,a,d,1,a\n", 1, "column 'model' stands twice"),
        (CSV_HEADER + "x,a,d,1,\ny,a,d,1\n", 3, "4 fields where the first row has 5"),
        (CSV_HEADER + 'x,a,d,1,\n"two\nlines",a,d,1,\ny,a,d,2,\n', 5, "correct is 2.0"),
        (CSV_HEADER + 'x,a,d,1,\n"open,a,d,1,\ny,a,d,1,\n', 3, "malformed CSV"),
        (CSV_HEADER + "x,a,d,nan,\n", 2, "correct is NaN"),
        (CSV_HEADER + "x,a,d,,\n", 2, "correct is empty"),
        (CSV_HEADER + "x,a,d,maybe,\n", 2, "not 'maybe'"),
        (CSV_HEADER + ",a,d,1,\n", 2, '"query" is empty'),
        (CSV_HEADER + "x,,d,1,\n", 2, 'no "model"'),
        (CSV_HEADER + "x,a,d,1,dev\n", 2, "unknown split 'dev'"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = tmp_path / "o.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OutcomesError) as caught:
        read_outcomes(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert says in str(caught.value)


def test_bad_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "o.parquet"
    pq.write_table(pa.Table.from_pylist([row("x"), row("y", correct=None)]), path)
    with pytest.raises(OutcomesError, match=r"o\.parquet:row 2: correct is empty"):
        read_outcomes(path)
    pq.write_table(pa.table({"query": ["x"], "model": ["a"], "dataset": ["d"]}), path)
    with pytest.raises(OutcomesError, match=r'o\.parquet: no column "correct"'):
        read_outcomes(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(OutcomesError, match=r"o\.parquet: not readable as Parquet"):
        read_outcomes(path)


@pytest.mark.parametrize(
    ("queries", "labels", "at", "says"),
    [
        ([query("x"), query("x")], "query_id,a\nx,1\n", "queries.jsonl:2", "stands already"),
        ([query("x"), query("y")], "query_id,a\nx,1\n", "queries.jsonl:2", "has no row in"),
        (
            [query("x"), {"dataset": "d", "query": "y"}],
            "query_id,a\nx,1\n",
            "queries.jsonl:2",
            'no "query_id"',
        ),
        ([query("x", split="dev")], "query_id,a\nx,1\n", "queries.jsonl:1", "unknown split"),
        ([query("x")], "query_id,a\nx,1\ny,1\n", "labels.csv:3", "'y' is not in"),
        ([query("x")], "query_id,a\nx,1\nx,1\n", "labels.csv:3", "stands in an earlier row"),
        ([query("x")], "query_id,a,a\nx,1,1\n", "labels.csv:1", "column 'a' stands twice"),
        ([query("x")], "id,a\nx,1\n", "labels.csv:1", 'no column "query_id"'),
        ([query("x")], "query_id,\nx,1\n", "labels.csv:1", "column 2 has no name"),
        ([query("x")], "query_id\nx\n", "labels.csv:1", "no column of a candidate"),
        ([query("x")], "query_id,a\nx,1,0\n", "labels.csv:2", "3 fields"),
        ([query("x")], "query_id,a\nx,1.01\n", "labels.csv:2", "'a' is '1.01'"),
        ([query("x")], "query_id,a\nx,nan\n", "labels.csv:2", "'a' is 'nan'"),
        ([query("x")], "query_id,a\nx,inf\n", "labels.csv:2", "'a' is 'inf'"),
        ([query("x")], "query_id,a\nx,yes\n", "labels.csv:2", "a blank where not evaluated"),
        ([query("x")], "", "labels.csv", "the file is empty"),
        ([query("x")], "\n\n", "labels.csv", "no rows"),
        ([""], "query_id,a\nx,1\n", "queries.jsonl", "no rows"),
    ],
)
def test_bad_wide(tmp_path: Path, queries: list[Any], labels: str, at: str, says: str) -> None:
    with pytest.raises(OutcomesError) as caught:
        read_outcomes(write_wide(tmp_path, queries, labels))
    assert str(caught.value).startswith(f"{tmp_path / at}: ")
    assert says in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(OutcomesError, match=r"absent\.jsonl: no such file"):
        read_outcomes(tmp_path / "absent.jsonl")
    with pytest.raises(OutcomesError, match=r"no queries\.jsonl or queries\.jsonl\.gz in the folder"):
        read_outcomes(tmp_path)
    for name in ("empty.jsonl", "empty.csv", "empty.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(OutcomesError, match=rf"{name}: the file is empty"):
            read_outcomes(tmp_path / name)
    (tmp_path / "o.json").write_text("[]")
    with pytest.raises(OutcomesError, match=r"o\.json: unknown form"):
        read_outcomes(tmp_path / "o.json")
    (tmp_path / "header.csv").write_text(CSV_HEADER)
    with pytest.raises(OutcomesError, match=r"header\.csv: no rows"):
        read_outcomes(tmp_path / "header.csv")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b"\n" + b'{"query": "\xe9"}\n')
    with pytest.raises(OutcomesError, match=r"latin\.jsonl:2: not valid UTF-8"):
        read_outcomes(tmp_path / "latin.jsonl")


def test_both_packed_and_plain_is_ambiguous(tmp_path: Path) -> None:
    write_wide(tmp_path, [query("x")], "query_id,a\nx,1\n")
    (tmp_path / "labels.csv.gz").write_bytes(gzip.compress(b"query_id,a\nx,0\n"))
    with pytest.raises(OutcomesError, match=r"both labels\.csv and labels\.csv\.gz"):
        read_outcomes(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped"])
def test_broken_gzip(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "o.jsonl.gz"
    data = gzip.compress("".join(json.dumps(row(f"x{i}")) + "\n" for i in range(500)).encode())
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "no gzip": b"plain text",
            "flipped": data[:middle] + bytes(b ^ 0xFF for b in data[middle:]),
        }[damage]
    )
    with pytest.raises(OutcomesError, match=r"o\.jsonl\.gz:\d+: (broken gzip|malformed JSON|not valid UTF-8)"):
        read_outcomes(path)


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "shape", "fill", "splits"),
    [
        ("ollb2", (16558, 15), 1.0, {"train": 12456, "val": 1758, "test": 1803, "ood": 541}),
        ("zeroeval", (6179, 48), 0.934, {"train": 3957, "val": 553, "test": 1108, "ood": 561}),
    ],
)
def test_real_outcomes(folder: str, shape: tuple[int, int], fill: float, splits: dict[str, int]) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"no real outcomes at {DATA / folder}")
    found = read_outcomes(DATA / folder)
    assert found.correct.shape == shape
    assert np.isfinite(found.correct).mean() == pytest.approx(fill, abs=5e-4)
    assert Counter(found.splits) == splits
    assert assign_splits(found) is found
    hard = difficulty(found.correct)
    assert np.isfinite(hard).all()
    train = found.split("train")
    domains = assign_domains(train)
    vectors = model_vectors(train.correct, domains.index, len(domains.names), names=train.candidates)
    assert vectors.shape == (shape[1], len(domains.names))
    assert ((vectors >= 0) & (vectors <= 1)).all()
