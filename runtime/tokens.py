"""Text → token ids: repair, byte cut, tokenization, token cut. Training and the runtime share this code.

Knows nothing about sessions or networks. Long text is cut to its head and tail, first by bytes, so that the
tokenizer never sees megabytes, then by tokens; what was cut is counted in :class:`Truncation`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from arllm.runtime.errors import BundleSchemaError, QueryError

BYTES_PER_TOKEN = 16  # of the byte budget: several times what a token of real text covers (about 4)


@dataclass(frozen=True)
class TokenSpec:
    """How a query becomes ids: ``prefix_ids + tokens(prompt + text) + suffix_ids``, at most ``max_tokens`` long.

    ``head_share`` of the tokens that a long text keeps come from its head, the rest from its tail.
    """

    max_tokens: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int
    prompt: str = ""
    head_share: float = 0.5

    def __post_init__(self) -> None:
        if self.max_tokens < len(self.prefix_ids) + len(self.suffix_ids) + 2:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room for the query")
        if not 0.0 < self.head_share < 1.0:
            raise ValueError(f"head_share must lie between 0 and 1, not {self.head_share}")

    @property
    def max_bytes(self) -> int:
        return self.max_tokens * BYTES_PER_TOKEN

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenSpec:
        try:
            return cls(
                max_tokens=int(data["max_tokens"]),
                prefix_ids=tuple(int(i) for i in data["prefix_ids"]),
                suffix_ids=tuple(int(i) for i in data["suffix_ids"]),
                pad_id=int(data["pad_id"]),
                prompt=str(data["prompt"]),
                head_share=float(data["head_share"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleSchemaError(f"tokens: unusable entry ({error!r})") from None


@dataclass(frozen=True)
class Truncation:
    """What was cut from a query. All counts are 0 for a query that fits.

    ``tokens_dropped`` counts the tokens of what the byte cut left; ``bytes_dropped`` what it took away.
    """

    bytes_total: int
    bytes_dropped: int = 0
    tokens_dropped: int = 0

    @property
    def truncated(self) -> bool:
        return self.bytes_dropped > 0 or self.tokens_dropped > 0


class TextTokenizer:
    """A tokenizer with its :class:`TokenSpec`. Thread-safe: encoding changes no state."""

    def __init__(self, tokenizer: Tokenizer, spec: TokenSpec) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.spec = spec
        room = spec.max_tokens - len(spec.prefix_ids) - len(spec.suffix_ids)
        self._room = room
        self._head = min(room - 1, max(1, round(room * spec.head_share)))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], spec: TokenSpec) -> TextTokenizer:
        """Raises BundleSchemaError: the file is not one that this version of tokenizers can read."""
        try:
            return cls(Tokenizer.from_file(os.fspath(path)), spec)
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleSchemaError(f"{os.fspath(path)}: not a usable tokenizer: {error}") from None

    def encode(self, text: str) -> tuple[NDArray[np.int64], Truncation]:
        """The ids of a query, (L,) int64 with L <= max_tokens, and what was cut.

        Empty text is a query too: its ids are the prompt, the prefix and the suffix alone. A lone surrogate
        becomes U+FFFD; NULs are text.

        Raises:
            QueryError: ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise QueryError(f"a query must be a string, not {type(text).__name__}")
        try:
            data = text.encode()
        except UnicodeEncodeError:  # lone surrogates, as JSON's "\ud800" gives them; pairs are joined
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            data = text.encode()
        spec = self.spec
        bytes_dropped = 0
        if len(data) <= spec.max_bytes:
            head, tail = self._ids(spec.prompt + text), []
        else:
            # "ignore" drops the character that a cut halves.
            head_bytes = int(spec.max_bytes * spec.head_share)
            tail_bytes = spec.max_bytes - head_bytes
            first = data[:head_bytes].decode(errors="ignore")
            last = data[-tail_bytes:].decode(errors="ignore")
            bytes_dropped = len(data) - len(first.encode()) - len(last.encode())
            head, tail = self._ids(spec.prompt + first), self._ids(last)
        total = len(head) + len(tail)
        tokens_dropped = max(0, total - self._room)
        if tokens_dropped:
            ids = head + tail
            kept = ids[: self._head] + ids[total - (self._room - self._head) :]
        else:
            kept = head + tail
        ids = [*spec.prefix_ids, *kept, *spec.suffix_ids] or [spec.pad_id]  # a graph needs one token at least
        return np.array(ids, dtype=np.int64), Truncation(len(data), bytes_dropped, tokens_dropped)

    def _ids(self, text: str) -> list[int]:
        # A batch of one: unlike `encode` it lets go of Python's lock, so that other callers run meanwhile.
        ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids
