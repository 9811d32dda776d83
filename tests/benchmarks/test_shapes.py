"""Tests of tests/benchmarks/shapes.py and engines.py: what is compared is comparable. Nothing is timed."""

from __future__ import annotations

from pathlib import Path

import engines
import pytest
import shapes

from arllm.runtime.router import Router


@pytest.fixture(scope="module")
def nano() -> shapes.Nano:
    return shapes.shipped_nano()


def test_both_sides_of_nano_decide_over_the_same_candidates(nano: shapes.Nano) -> None:
    (folder, variant) = next(iter(nano.bundles.values()))
    exported = Router.load(folder, variant=variant, pool=nano.pool).route("What is 17 * 23?")
    eager = nano.torch_router().route("What is 17 * 23?")
    assert exported.candidates == eager.candidates
    assert len(set(eager.candidates)) == shapes.CANDIDATES
    assert exported.vector.shape == eager.vector.shape
    assert exported.domain_names == eager.domain_names


def test_texts_have_the_tokens_asked_for(nano: shapes.Nano) -> None:
    tokenizer = nano.run.text_tokenizer()
    for length in (16, 64, 200):
        for text in shapes.texts_of(tokenizer, length, 4, shapes.prompts()[0]):
            assert abs(len(tokenizer.encode(text)[0]) - length) <= 2  # a cut may tear a token apart


def test_without_the_shared_prompts_texts_are_made_up_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PROMPTS", Path("/nowhere/prompts.jsonl.gz"))
    texts, source = shapes.prompts(20)
    assert len(set(texts)) == 20
    assert source.startswith("SYNTHETIC")


def test_shares_are_of_the_median_run_of_each_node() -> None:
    def event(name: str, op: str, duration: float) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op}, "dur": duration}

    events = [event("a", "MatMul", d) for d in (30.0, 30.0, 9000.0)]  # preempted once
    events += [event("b", "Add", 5.0), event("c", "Add", 5.0), event("d", "If", 500.0)]
    events.append({"cat": "Session", "name": "model_run", "dur": 1e6})
    assert engines._shares(events) == {"MatMul": 0.75, "Add": 0.25}
