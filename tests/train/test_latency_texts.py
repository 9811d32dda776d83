"""Tests of train/latency/texts.py: exact token counts, the mix, and reading queries."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from arllm.runtime import Router
from arllm.runtime.errors import OutcomesError
from arllm.train.latency.texts import bucket_texts, exact_text, mix_lengths, mixed_texts, read_queries


@pytest.fixture(scope="module")
def nano() -> Router:
    return Router.load("nano")


@pytest.mark.parametrize("tokens", [3, 8, 16, 64, 256])
def test_a_bucket_s_texts_have_exactly_its_tokens_uncut(nano: Router, tokens: int) -> None:
    texts = bucket_texts(nano, tokens)
    assert len(texts) == 8
    assert len(set(texts)) > 1
    for text in texts:
        ids, cut = nano.tokenize(text)
        assert len(ids) == tokens
        assert not cut.truncated
    assert bucket_texts(nano, tokens) == texts  # the same on every machine, every time


def test_a_bucket_beyond_the_budget_or_below_the_affixes_is_empty(nano: Router) -> None:
    spec = nano.bundle.manifest.tokens
    assert spec is not None
    assert bucket_texts(nano, spec.max_tokens + 1) == []
    assert bucket_texts(nano, len(spec.prefix_ids) + len(spec.suffix_ids) - 1) == []


def test_a_bundle_without_an_encoder_has_no_texts(nano: Router) -> None:
    class Bare:
        bundle = replace(nano.bundle, manifest=replace(nano.bundle.manifest, tokens=None))

    assert bucket_texts(Bare(), 8) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_a_tokenizer_of_bytes_gives_exact_counts_too(tokens: int) -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    text = exact_text(count, tokens, "seed")
    assert text is not None
    assert count(text) == tokens == len(text.encode())


def test_a_count_that_no_text_has_is_none_and_ends() -> None:
    assert exact_text(lambda text: 2 * len(text.split()), 7, "seed") is None  # always even
    assert exact_text(lambda text: 5 + len(text), 4, "seed") is None  # a prompt of five tokens


def test_the_mix_has_the_lengths_of_chat() -> None:
    lengths = mix_lengths()
    ordered = sorted(lengths)
    assert lengths != ordered
    assert median(ordered) == pytest.approx(40, rel=0.05)
    assert ordered[57] == pytest.approx(340, rel=0.05)  # of 64
    assert max(ordered) <= 4096


def test_the_mix_is_of_those_lengths_cut_only_where_wanted(nano: Router) -> None:
    assert nano.bundle.manifest.tokens is not None
    budget = nano.bundle.manifest.tokens.max_tokens
    for text, length in zip(mixed_texts(nano, 16), mix_lengths(16), strict=True):
        ids, cut = nano.tokenize(text)
        assert cut.truncated == (length > budget)
        assert len(ids) == max(3, min(length, budget))  # the affixes and one token at least
    whole = [nano.tokenize(text) for text in mixed_texts(nano, 16, cut=False)]
    assert not any(cut.truncated for _, cut in whole)
    assert [len(ids) for ids, _ in whole] == [max(3, min(length, budget)) for length in mix_lengths(16)]


JSONL = '{"id": 1, "text": "one"}\n\n{"query": "two\\nlines", "text": "passed over"}\n'


@pytest.mark.parametrize(
    ("name", "content", "queries"),
    [
        ("q.jsonl", JSONL, ["one", "two\nlines"]),
        ("Q.JSONL.gz", JSONL, ["one", "two\nlines"]),
        ("q.csv", 'id,query\n1,one\n2,"two\nlines"\n', ["one", "two\nlines"]),
        ("q.csv.gz", "text,id\none,1\n", ["one"]),
        ("q.txt", "one\r\n\n  two \n", ["one", "  two "]),
        ("q.txt.gz", "one\n", ["one"]),
    ],
)
def test_queries_are_read(tmp_path: Path, name: str, content: str, queries: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert read_queries(path) == queries


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b"", "q.jsonl: no query in the file"),
        ("q.txt", b"\n \n", "q.txt: no query in the file"),
        ("q.csv", b"query\n", "q.csv: no query in the file"),
        ("q.jsonl", b'{"query": "a"}\n{"prompt": "b"}\n', "q.jsonl:2: no string query or text"),
        ("q.jsonl", b'{"query": 7}\n', "q.jsonl:1: no string query or text"),
        ("q.jsonl", b'{"query": "a"\n', "q.jsonl:1: malformed JSON"),
        ("q.csv", b"prompt\na\n", "q.csv:2: no string query or text"),
        ("q.txt", b"\xff\n", "q.txt:1: not valid UTF-8"),
        ("q.jsonl.gz", b"plain", "q.jsonl.gz:1: broken gzip"),
        ("q.md", b"a\n", "q.md: unknown form"),
    ],
)
def test_unusable_files_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutcomesError) as caught:
        read_queries(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutcomesError, match=r"q\.txt: no such file"):
        read_queries(tmp_path / "q.txt")


def test_the_shared_prompts_are_read(shared_data: Path) -> None:
    assert len(read_queries(shared_data / "prompts" / "chat_prompts.jsonl.gz")) == 1738
