"""Tokenizers with fewer pieces: what a vocabulary must hold to stay whole, and the tokenizer.json of it alone.

Knows nothing about runs, networks or which pieces are worth keeping. Of byte pair encodings it uses one property.
Merges are applied one at a time, the lowest rank first, the leftmost of equals. Until a piece stands complete no
merge has crossed its borders; so what merges inside them is what merges where the piece is a text of its own, and
every piece has one fixed list of *parts*: its characters, and the pieces that stand between them and itself.

A kept vocabulary is *closed*: with a piece it holds all its parts. Then a text whose pieces are all kept never passed
through a dropped one. Each merge that fired is kept, was the first of more candidates and is the first of fewer: the
text falls into the same pieces. A text with a dropped piece can't. So **ids agree, remapped, exactly where every id
that the whole tokenizer gives is kept**; elsewhere a dropped piece falls apart into smaller ones, in the end into
bytes, and its neighbours may be cut otherwise too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from arllm.runtime.errors import ExportError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # what a character without a piece falls into
PLACEHOLDER = re.compile(r"<unused\d+>")  # reserved by Gemma, of no text
PLAIN_PROCESSORS = ("ByteLevel", "TemplateProcessing", "Sequence")


class Vocabulary:
    """The pieces of a tokenizer and how they are built. Ids are the tokenizer's own.

    ``rows`` are those of the token table: a tokenizer may hold ids beyond it, of pictures for one, which no network
    here can read; they are no pieces.

    Raises:
        ExportError: the tokenizer is not a plain BPE.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._tree: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self._tree["model"]
        odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
        if model["type"] != "BPE" or odd or model.get("ignore_merges"):
            what = f"a BPE with {(*odd, 'ignore_merges')[0]}" if model["type"] == "BPE" else f"a {model['type']}"
            raise ExportError(f"the vocabulary can't be trimmed: the tokenizer is {what}, not a plain BPE")
        for processor in _processors(self._tree["post_processor"]):
            if processor["type"] not in PLAIN_PROCESSORS:
                raise ExportError(
                    f"the vocabulary can't be trimmed: its post-processor {processor['type']} is not known here"
                )
        self.ids: dict[str, int] = {piece: i for piece, i in tokenizer.get_vocab().items() if i < rows}
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Id → piece, in the order of ids."""
        return {i: piece for piece, i in sorted(self.ids.items(), key=lambda entry: entry[1])}

    @cached_property
    def unbuilt(self) -> frozenset[str]:
        """Pieces that no merge has to build: added tokens, which are found in the text whole, bytes, and unknown."""
        added = {entry["content"] for entry in self._tree["added_tokens"]}
        return frozenset((added | {*BYTES, self._tree["model"]["unk_token"]}) & self.ids.keys())

    @cached_property
    def falls_into_bytes(self) -> bool:
        """Whether a character without a piece of its own becomes bytes; else it is lost, or one unknown."""
        return bool(self._tree["model"]["byte_fallback"]) and self.ids.keys() >= set(BYTES)

    @property
    def characters(self) -> list[str]:
        """Pieces of one character in the order of ids, which in Gemma is that of their frequency."""
        return [piece for piece in self.pieces.values() if len(piece) == 1 and piece not in self.unbuilt]

    def built(self) -> Iterator[str]:
        """The results of merges, in order of rank: the most frequent of the tokenizer's own training first."""
        return iter(dict.fromkeys(left + right for left, right in self._ranks))

    def parts(self, piece: str) -> tuple[str, ...]:
        """Every piece that stands on the way to this one, itself last; none where merges don't lead to it."""
        symbols = list(piece)
        found = list(symbols)
        while len(symbols) > 1:
            pairs = enumerate(pairwise(symbols))
            ranked = [(self._ranks[pair], i) for i, pair in pairs if pair in self._ranks]
            if not ranked:
                return ()
            at = min(ranked)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found.append(symbols[at])
        return tuple(found) if piece in self.ids else ()

    def indispensable(self) -> set[str]:
        """What is kept in any case.

        Added tokens but for reserved placeholders, what the post-processor adds, bytes, and the single characters
        unless bytes can stand for them.
        """
        named = {i for entry in _processors(self._tree["post_processor"]) for i in _template_ids(entry)}
        wanted = {piece for piece in self.unbuilt if not PLACEHOLDER.fullmatch(piece)}
        return wanted | {self.pieces[i] for i in named} | (set() if self.falls_into_bytes else set(self.characters))

    def closed(self, wanted: Iterable[str], ranked: Iterable[str] = (), limit: int | None = None) -> set[str]:
        """``wanted`` with all parts, then the ``ranked`` pieces, each with its parts, that fit into ``limit`` pieces.

        Raises:
            ExportError: the wanted pieces alone are more than ``limit``, or merges don't lead to one of them.
        """
        kept: set[str] = set()
        for piece in wanted:
            parts = self.parts(piece)
            if not parts and piece not in self.unbuilt:
                raise ExportError(f"the vocabulary can't be trimmed: no merges lead to its piece {piece!r}")
            kept.update(parts, (piece,))
        if limit is not None and len(kept) > limit:
            raise ExportError(f"a vocabulary of {limit} pieces is too small: {len(kept)} are needed for any text")
        for piece in ranked:
            if limit is not None and len(kept) == limit:
                break
            if piece in kept:
                continue
            missing = [part for part in self.parts(piece) if part not in kept]
            if limit is None or len(kept) + len(missing) <= limit:
                kept.update(missing)
        return kept

    def trimmed(self, kept: Iterable[str]) -> tuple[Tokenizer, NDArray[np.int64]]:
        """The tokenizer of these pieces alone, a closed set, and their former ids: new id → old id, ascending."""
        old = np.array(sorted(self.ids[piece] for piece in kept), dtype=np.int64)
        new = {self.pieces[i]: at for at, i in enumerate(old.tolist())}
        model, post_processor = self._tree["model"], self._tree["post_processor"]
        tree = {
            **self._tree,
            "truncation": None,  # both are the business of whoever encodes
            "padding": None,
            "added_tokens": [
                {**entry, "id": new[entry["content"]]}
                for entry in self._tree["added_tokens"]
                if entry["content"] in new
            ],
            "post_processor": post_processor and self._renumbered(post_processor, new),
            "model": {
                **model,
                "vocab": {piece: i for piece, i in new.items() if piece in model["vocab"]},
                "merges": [
                    pair for pair in model["merges"] if pair[0] in new and pair[1] in new and pair[0] + pair[1] in new
                ],
            },
        }
        tokenizer = Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))
        if tokenizer.get_vocab() != new:
            raise ExportError("the vocabulary can't be trimmed: tokenizers numbers the kept pieces in another way")
        return tokenizer, old

    def _renumbered(self, processor: dict[str, Any], new: dict[str, int]) -> dict[str, Any]:
        changed = dict(processor)
        if processor["type"] == "Sequence":
            changed["processors"] = [self._renumbered(each, new) for each in processor["processors"]]
        if processor["type"] == "TemplateProcessing":
            changed["special_tokens"] = {
                name: {**entry, "ids": [new[self.pieces[i]] for i in entry["ids"]]}
                for name, entry in processor["special_tokens"].items()
            }
        return changed


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A post-processor and those inside it."""
    if processor is not None:
        yield processor
        for inner in processor.get("processors", ()):
            yield from _processors(inner)


def _template_ids(processor: dict[str, Any]) -> Iterator[int]:
    for entry in processor.get("special_tokens", {}).values():
        yield from entry["ids"]
