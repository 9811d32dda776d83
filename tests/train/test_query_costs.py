"""Tests of train/query_costs.py: alignment with outcomes, blanks, and messages that name the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.outcomes import Outcomes
from arllm.train.query_costs import read_query_costs

OUTCOMES = Outcomes(("a", "b"), ("qa", "qb"), ("d", "d"), ("d", "d"), ("test", "test"), ("x", "y"),
                    np.ones((2, 2), dtype=np.float32))  # fmt: skip


def test_rows_and_columns_are_matched_by_name(tmp_path: Path) -> None:
    path = tmp_path / "costs.csv"
    path.write_text("y,query_id,other,x\n4,b,9,3\n2,a,9,\n7,c,9,7\n", encoding="utf-8")
    np.testing.assert_array_equal(read_query_costs(path, OUTCOMES), [[np.nan, 2.0], [3.0, 4.0]])


def test_a_query_without_a_row_has_no_cost(tmp_path: Path) -> None:
    path = tmp_path / "costs.csv"
    path.write_text("query_id,x,y\nb,3,4\n", encoding="utf-8")
    np.testing.assert_array_equal(read_query_costs(path, OUTCOMES), [[np.nan, np.nan], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query_id,x\na,1\n", r'costs\.csv:1: no column "y"'),
        ("query_id,x,y\na,1,-2\n", r"costs\.csv:2: 'y' is '-2'"),
        ("query_id,x,y\na,1,much\n", r"costs\.csv:2: 'y' is 'much'"),
        ("query_id,x,y\na,inf,1\n", r"costs\.csv:2: 'x' is 'inf'"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "costs.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OutcomesError, match=message):
        read_query_costs(path, OUTCOMES)
