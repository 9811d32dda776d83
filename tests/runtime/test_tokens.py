"""Tests of runtime/tokens.py: byte cut, token cut, exact counts, broken text; never too long, never raising."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from arllm.runtime.errors import BundleSchemaError, QueryError
from arllm.runtime.tokens import BYTES_PER_TOKEN, TextTokenizer, TokenSpec

BOS, EOS = 1, 2
REPLACEMENT = "�"


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: one token a byte, so that every count can be done by hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    assert tokenizer.get_vocab_size() == 259
    return tokenizer


TOKENIZER = byte_tokenizer()


def text_tokenizer(max_tokens: int, **spec: Any) -> TextTokenizer:
    chosen = {"prefix_ids": (BOS,), "suffix_ids": (EOS,), "pad_id": 0, **spec}
    return TextTokenizer(TOKENIZER, TokenSpec(max_tokens=max_tokens, **chosen))


def decode(ids: np.ndarray) -> str:
    return str(TOKENIZER.decode(ids.tolist()))  # special tokens are left out


def test_text_that_fits_is_whole() -> None:
    ids, cut = text_tokenizer(12).encode("0123456789")
    assert (ids[0], ids[-1], len(ids), ids.dtype) == (BOS, EOS, 12, np.int64)
    assert decode(ids) == "0123456789"
    assert (cut.bytes_total, cut.bytes_dropped, cut.tokens_dropped, cut.truncated) == (10, 0, 0, False)


@pytest.mark.parametrize(
    ("max_tokens", "share", "kept", "dropped"),
    [
        (11, 0.5, "0123" + "56789", 1),  # room for 9, and round(4.5) is 4
        (10, 0.5, "0123" + "6789", 2),
        (10, 0.75, "012345" + "89", 2),
        (10, 0.01, "0" + "3456789", 2),  # never without a head
        (10, 0.99, "0123456" + "9", 2),  # never without a tail
        (4, 0.5, "0" + "9", 8),
    ],
)
def test_head_and_tail_are_kept_and_counted(max_tokens: int, share: float, kept: str, dropped: int) -> None:
    ids, cut = text_tokenizer(max_tokens, head_share=share).encode("0123456789")
    assert len(ids) == max_tokens
    assert decode(ids) == kept
    assert (cut.bytes_total, cut.bytes_dropped, cut.tokens_dropped, cut.truncated) == (10, 0, dropped, True)


def test_bytes_are_cut_before_tokens() -> None:
    tokenizer = text_tokenizer(10)
    budget = 10 * BYTES_PER_TOKEN
    assert tokenizer.spec.max_bytes == budget
    exact = "a" * budget
    assert tokenizer.encode(exact)[1].bytes_dropped == 0
    ids, cut = tokenizer.encode("H" * (budget // 2) + "middle" + "T" * (budget // 2))
    assert decode(ids) == "HHHHTTTT"
    assert (cut.bytes_total, cut.bytes_dropped, cut.tokens_dropped) == (budget + 6, 6, budget - 8)


class Spy:
    """A tokenizer that remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.seen += texts
        return TOKENIZER.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("shift", range(4))
def test_the_tokenizer_sees_whole_characters_of_head_and_tail_only(shift: int) -> None:
    spy = Spy()
    spec = TokenSpec(max_tokens=10, prefix_ids=(), suffix_ids=(), pad_id=0)
    text = "x" * shift + "🙂" * 500 + "y" * shift
    TextTokenizer(spy, spec).encode(text)  # type: ignore[arg-type]
    head, tail = spy.seen
    assert text.startswith(head)
    assert text.endswith(tail)
    half = spec.max_bytes // 2
    assert half - 4 < len(head.encode()) <= half
    assert half - 4 < len(tail.encode()) <= half


@pytest.mark.parametrize("character", ["é", "日", "🙂"])
@pytest.mark.parametrize("shift", range(4))
def test_a_character_that_the_cut_halves_is_dropped_and_counted(character: str, shift: int) -> None:
    tokenizer = text_tokenizer(10)
    text = "x" * shift + character * 200 + "y" * shift
    ids, cut = tokenizer.encode(text)
    width = len(character.encode())
    half = tokenizer.spec.max_bytes // 2
    head = shift + (half - shift) // width * width  # what of each half is whole characters
    assert cut.bytes_total == 200 * width + 2 * shift
    assert cut.bytes_dropped == cut.bytes_total - 2 * head
    assert cut.tokens_dropped == 2 * head - 8  # one token a byte
    assert len(ids) == 10


def test_the_prompt_stands_before_the_text() -> None:
    assert decode(text_tokenizer(40, prompt="query: ").encode("hello")[0]) == "query: hello"
    ids, cut = text_tokenizer(20, prompt="query: ").encode("a" * 1000)
    assert decode(ids) == "query: aa" + "a" * 9
    assert cut.bytes_total == 1000


def test_ten_megabytes() -> None:
    ids, cut = text_tokenizer(64).encode("0123456789" * 1_000_000)
    assert len(ids) == 64
    assert decode(ids) == ("0123456789" * 4)[:31] + ("0123456789" * 4)[-31:]
    assert cut.bytes_total == 10_000_000
    assert cut.bytes_dropped == 10_000_000 - 64 * BYTES_PER_TOKEN
    assert cut.tokens_dropped == 64 * BYTES_PER_TOKEN - 62


def test_empty_text_is_prompt_prefix_and_suffix() -> None:
    ids, cut = text_tokenizer(10).encode("")
    assert ids.tolist() == [BOS, EOS]
    assert (cut.bytes_total, cut.truncated) == (0, False)
    assert decode(text_tokenizer(10, prompt="q").encode("")[0]) == "q"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a\x00b", "a\x00b"),
        ("\x00", "\x00"),
        ("a\ud800b", f"a{REPLACEMENT}b"),
        ("\udc00", REPLACEMENT),
        ("a\ud800", f"a{REPLACEMENT}"),
        ("\udc00\ud800", REPLACEMENT * 2),
        ("\ud83d\ude42", "🙂"),  # a pair is the character that it means
        ("\ud83d\ude42\ud800", f"🙂{REPLACEMENT}"),
        ("\ufeffa\ud800", f"\ufeffa{REPLACEMENT}"),  # a byte order mark is text
    ],
)
def test_odd_text_has_a_defined_reading(text: str, read: str) -> None:
    tokenizer = text_tokenizer(64)
    ids, cut = tokenizer.encode(text)
    assert ids.tolist() == tokenizer.encode(read)[0].tolist()
    assert decode(ids) == read
    assert cut.bytes_total == len(read.encode())


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"], 1.5, bytearray(b"x")])
def test_a_query_must_be_a_string(text: Any) -> None:
    with pytest.raises(QueryError, match=f"must be a string, not {type(text).__name__}") as caught:
        text_tokenizer(10).encode(text)
    assert isinstance(caught.value, ValueError)


@settings(deadline=None)
@given(
    st.text(st.characters(), max_size=400) | st.text(st.characters(categories=["Cs", "So", "Nd"]), max_size=400),
    st.integers(4, 40),
    st.floats(0.01, 0.99),
    st.integers(1, 40),
)
def test_any_text_gives_ids_that_fit(text: str, max_tokens: int, share: float, repeat: int) -> None:
    tokenizer = text_tokenizer(max_tokens, head_share=share)
    ids, cut = tokenizer.encode(text * repeat)
    assert 2 <= len(ids) <= max_tokens
    assert (ids[0], ids[-1]) == (BOS, EOS)
    # one token a byte: what is kept and what was dropped add up to the whole
    assert len(ids) - 2 + cut.tokens_dropped + cut.bytes_dropped == cut.bytes_total
    assert cut.truncated == (cut.bytes_total > max_tokens - 2)


def test_a_spec_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        TokenSpec(max_tokens=3, prefix_ids=(1,), suffix_ids=(2,), pad_id=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_head_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="head_share"):
        TokenSpec(max_tokens=8, prefix_ids=(), suffix_ids=(), pad_id=0, head_share=share)


def test_other_threads_run_while_a_text_is_tokenized() -> None:
    tokenizer, text = text_tokenizer(400_000), "a word and another " * 20_000
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    try:
        before = ticks
        tokenizer.encode(text)
        meanwhile = ticks - before
    finally:
        done.set()
        other.join()
    assert meanwhile > 10  # with the lock held throughout, one or two


def test_a_spec_round_trips() -> None:
    spec = TokenSpec(max_tokens=8, prefix_ids=(1, 5), suffix_ids=(2,), pad_id=0, prompt="q: ", head_share=0.25)
    assert TokenSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 2},
        {"max_tokens": "many"},
        {"max_tokens": float("inf")},
        {"max_tokens": None},
        {"prefix_ids": 1},
        {"suffix_ids": ["x"]},
        {"head_share": 1.0},
        {"pad_id": None},
    ],
)
def test_an_unusable_spec_is_a_schema_error(change: dict[str, Any]) -> None:
    spec = TokenSpec(max_tokens=8, prefix_ids=(1,), suffix_ids=(2,), pad_id=0)
    with pytest.raises(BundleSchemaError, match=r"^tokens: unusable"):
        TokenSpec.from_json({**spec.to_json(), **change})
    missing = spec.to_json()
    del missing[next(iter(change))]
    with pytest.raises(BundleSchemaError, match=next(iter(change))):
        TokenSpec.from_json(missing)


def test_a_file_that_is_no_tokenizer_is_a_schema_error(tmp_path: Path) -> None:
    spec = TokenSpec(max_tokens=8, prefix_ids=(1,), suffix_ids=(2,), pad_id=0)
    for name, content in (("bad.json", "{}"), ("empty.json", "")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(BundleSchemaError, match=name):
            TextTokenizer.from_file(tmp_path / name, spec)
    with pytest.raises(BundleSchemaError, match="absent"):
        TextTokenizer.from_file(tmp_path / "absent", spec)


def test_a_tokenizers_own_truncation_and_padding_are_off() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=30)
    spec = TokenSpec(max_tokens=20, prefix_ids=(), suffix_ids=(), pad_id=0)
    assert len(TextTokenizer(tokenizer, spec).encode("0123456789")[0]) == 10
