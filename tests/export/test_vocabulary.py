"""Tests of export/vocabulary.py: where ids agree and where they can't, on small tokenizers of both kinds."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from arllm.export.conformance import TEXTS
from arllm.export.vocabulary import BYTES, Vocabulary
from arllm.runtime.errors import ExportError
from arllm.train.backbones import train_bpe
from arllm.train.gemma_gguf import BYTE, CONTROL, USER_DEFINED, build_tokenizer

NORMAL = 1
KINDS = ("nano", "gemma")


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """``nano``: bytes as characters, a merge a piece; ``gemma``: bytes as a way out, all splits of a piece merge."""
    if kind == "nano":
        return train_bpe(TEXTS, vocab_size=700)
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, min_frequency=2, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=lambda piece: (len(piece) == 1, trained.token_to_id(piece)))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<unused1>"]
    marks = ["<h1>", "\n\n", "▁▁"]
    words = [piece for piece in pieces if piece not in marks]
    types = [CONTROL] * len(special) + [USER_DEFINED] * len(marks) + [BYTE] * 256 + [NORMAL] * len(words)
    return build_tokenizer([*special, *marks, *BYTES, *words], types)


@functools.cache
def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(tokenizer(kind), tokenizer(kind).get_vocab_size())


def encode(of: Tokenizer, text: str) -> list[int]:
    ids: list[int] = of.encode(text, add_special_tokens=False).ids
    return ids


WORDS = sorted({word for text in TEXTS for word in text[:2000].split(" ")})
FRAGMENTS = st.one_of(
    st.sampled_from(WORDS), st.sampled_from(["<h1>", "<unused1>", "\n", "\n\n", "  ", "é", "日", "ж", "🙂", "\x00"])
)
QUERIES = st.one_of(st.lists(FRAGMENTS, max_size=12).map(" ".join), st.text(max_size=20))


# --- where ids agree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_agree_renumbered_exactly_where_every_piece_is_kept(kind: str, data: st.DataObject) -> None:
    whole = vocabulary(kind)
    pieces = sorted(set(whole.built()) | set(whole.characters))
    share = data.draw(st.sampled_from([0.3, 0.8, 0.97]))
    rng = np.random.default_rng(data.draw(st.integers(0, 50)))
    ranked = [piece for piece in pieces if rng.random() < share]
    trimmed, old = whole.trimmed(whole.closed(whole.indispensable(), ranked))
    new = {i: at for at, i in enumerate(old.tolist())}
    for text in data.draw(st.lists(QUERIES, min_size=1, max_size=5)):
        ids = encode(tokenizer(kind), text)
        covered = all(i in new for i in ids)
        assert (encode(trimmed, text) == [new.get(i) for i in ids]) == covered


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_the_property_occur(kind: str) -> None:
    whole = vocabulary(kind)
    kept = whole.closed(whole.indispensable(), [*whole.characters, *whole.built()], len(whole) - 60)
    ids = {whole.ids[piece] for piece in kept}
    covered = [set(encode(tokenizer(kind), text)) <= ids for text in TEXTS]
    assert 3 < sum(covered) < len(covered) - 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_piece_are_what_the_tokenizer_builds_it_from(kind: str) -> None:
    """A piece has parts exactly where its text becomes this one id; it needs each: without one it is not reached."""
    whole = vocabulary(kind)
    for piece in [*whole.built(), *whole.characters]:
        parts = whole.parts(piece)
        assert parts[-1] == piece
        assert set(parts) <= whole.ids.keys()
        one_way = {(left + right): (left, right) for left, right in whole._ranks}
        if kind == "nano" and len(piece) > 1:
            assert set(one_way[piece]) <= set(parts)
    assert whole.parts("never a piece") == ()


def test_a_vocabulary_that_is_not_closed_breaks_text_that_it_seems_to_cover() -> None:
    whole = vocabulary("nano")
    piece = next(p for p in whole.built() if len(p) > 3)
    part = whole.parts(piece)[-2]
    kept = whole.closed([*whole.indispensable(), piece])
    text = piece.replace("Ġ", " ")
    assert len(encode(tokenizer("nano"), text)) == 1
    assert len(encode(whole.trimmed(kept)[0], text)) == 1
    assert len(encode(whole.trimmed(kept - {part})[0], text)) > 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30))
def test_the_least_vocabulary_still_holds_every_text(kind: str, text: str) -> None:
    """Nothing is lost and nothing is unknown."""
    whole = vocabulary(kind)
    trimmed, _ = whole.trimmed(whole.closed(whole.indispensable()))
    assert len(trimmed.get_vocab()) < 300
    if "▁" not in text:  # Gemma's own tokenizer reads it as a space
        assert trimmed.decode(encode(trimmed, text)) == text


# --- what is kept -------------------------------------------------------------------------------------------


def test_gemma_keeps_its_tokens_and_bytes_but_no_placeholders_and_no_character_by_right() -> None:
    kept = vocabulary("gemma").indispensable()
    assert kept == {"<pad>", "<eos>", "<bos>", "<unk>", "<h1>", "\n\n", "▁▁", *BYTES}


def test_without_bytes_every_character_is_kept() -> None:
    whole = vocabulary("nano")
    assert len(whole.characters) == 256
    assert whole.indispensable() == {"<pad>", "<bos>", "<eos>", *whole.characters}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [330, 400])
def test_a_limit_is_filled_in_order(kind: str, limit: int) -> None:
    whole = vocabulary(kind)
    needed = whole.closed(whole.indispensable())
    kept = whole.closed(needed, whole.built(), limit)
    first: set[str] = needed
    for count in range(1, len(whole)):
        more = whole.closed([*needed, *list(whole.built())[:count]])
        if len(more) > limit:
            break
        first = more
    assert first <= kept
    assert len(needed) < len(first) <= len(kept) == limit
    assert whole.closed(kept) == kept


def test_a_limit_below_what_any_text_needs_is_refused() -> None:
    whole = vocabulary("gemma")
    with pytest.raises(ExportError, match=r"a vocabulary of 100 pieces is too small: \d+ are needed for any text"):
        whole.closed(whole.indispensable(), (), 100)


def test_a_piece_without_merges_is_no_piece_of_text() -> None:
    tree = json.loads(tokenizer("nano").to_str())
    tree["model"]["vocab"]["stranded"] = len(tree["model"]["vocab"])
    stranded = Vocabulary(Tokenizer.from_str(json.dumps(tree)), 10_000)
    assert "stranded" not in stranded.closed(stranded.indispensable(), stranded.ids)
    with pytest.raises(ExportError, match="no merges lead to its piece 'stranded'"):
        stranded.closed(["stranded"])


# --- the tokenizer that is written --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_contiguous_in_the_former_order_and_a_reload_keeps_them(kind: str) -> None:
    whole = vocabulary(kind)
    trimmed, old = whole.trimmed(whole.closed(whole.indispensable(), whole.built(), 350))
    assert sorted(trimmed.get_vocab().values()) == list(range(350))
    assert np.all(np.diff(old) > 0)
    assert all(whole.pieces[i] == trimmed.id_to_token(at) for at, i in enumerate(old.tolist()))
    again = Tokenizer.from_str(trimmed.to_str())
    assert [encode(again, text) for text in TEXTS[:20]] == [encode(trimmed, text) for text in TEXTS[:20]]


def test_merges_keep_their_order_and_their_ways() -> None:
    whole = vocabulary("gemma")
    trimmed, _ = whole.trimmed(whole.closed(whole.indispensable(), whole.built(), 400))
    kept = trimmed.get_vocab()
    before = json.loads(tokenizer("gemma").to_str())["model"]["merges"]
    after = json.loads(trimmed.to_str())["model"]["merges"]
    assert after == [pair for pair in before if {*pair, "".join(pair)} <= kept.keys()]
    assert len(after) > len({"".join(pair) for pair in after})  # some pieces have several splits


def test_added_tokens_and_the_template_are_renumbered() -> None:
    given = Tokenizer.from_str(tokenizer("gemma").to_str())
    template = processors.TemplateProcessing("<bos> $A <unused1>", None, [("<bos>", 2), ("<unused1>", 5)])
    given.post_processor = processors.Sequence([template])
    whole = Vocabulary(given, 10_000)
    trimmed, _ = whole.trimmed(whole.closed(whole.indispensable()))
    assert (trimmed.token_to_id("<unused0>"), trimmed.token_to_id("<unused1>")) == (None, 4)  # the template adds it
    assert trimmed.encode("<h1>").ids == [2, 5, 4]
    assert encode(trimmed, "<h1>") == [5]


def test_ids_beyond_the_token_table_are_dropped() -> None:
    given = Tokenizer.from_str(tokenizer("gemma").to_str())
    size = given.get_vocab_size()
    given.add_special_tokens(["<picture>"])
    assert encode(given, "<picture>") == [size]
    whole = Vocabulary(given, size)
    trimmed, old = whole.trimmed(whole.closed(whole.indispensable()))
    assert old.max() < size
    assert trimmed.decode(encode(trimmed, "<picture>")) == "<picture>"


def wordpiece(tree: dict[str, Any]) -> None:
    vocab = tree["model"]["vocab"]
    tree["model"] = {"type": "WordPiece", "unk_token": "<pad>", "continuing_subword_prefix": "##", "vocab": vocab}
    tree["model"]["max_input_chars_per_word"] = 100


def ignoring(tree: dict[str, Any]) -> None:
    tree["model"]["ignore_merges"] = True


def dropping(tree: dict[str, Any]) -> None:
    tree["model"]["dropout"] = 0.5


def bert(tree: dict[str, Any]) -> None:
    tree["post_processor"] = {"type": "BertProcessing", "sep": ["<eos>", 2], "cls": ["<bos>", 1]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wordpiece, "a WordPiece, not a plain BPE"),
        (ignoring, "a BPE with ignore_merges"),
        (dropping, "a BPE with dropout"),
        (bert, "post-processor BertProcessing is not known"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(change: Any, reason: str) -> None:
    tree = json.loads(tokenizer("nano").to_str())
    change(tree)
    with pytest.raises(ExportError, match=reason):
        Vocabulary(Tokenizer.from_str(json.dumps(tree)), 10_000)
