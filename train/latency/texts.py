"""What a latency benchmark routes: generated texts of exact token counts, a mix of lengths, a file's queries.

Everything generated is the same on every machine. Free of torch; knows tokenizers, not sessions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from arllm.runtime.errors import OutcomesError
from arllm.train.records import Record, csv_table, jsonl_records, lines

if TYPE_CHECKING:
    from arllm.runtime.router import Router

TEXTS = 8  # different texts of a bucket
MIX = 64  # different texts of the generated mix
# Lengths of chat prompts, about 4 characters a token: a log-normal through these two.
MIX_MEDIAN, MIX_P90 = 40, 340
LONGEST = 4096  # tokens of the mix's longest text
ATTEMPTS = 400
QUERY_FIELDS = ("query", "text")

_PASSAGE = (
    "explain why the river freezes from above and not below when winter comes to a northern valley please compare "
    "two ways of sorting records on disk with limited memory what would change if gravity were half as strong write "
    "short polite reply to customer whose parcel arrived broken for i in range(10): print(i * 7) return None if "
    "x^2 - 3x + 2 = 0 find both roots and check them step by step summarise this paragraph without losing its main "
    "argument 1984 2.75 50% SELECT name FROM users WHERE age > 30; translate into French: good evening, how are you? "
    "biochemistry photosynthesis jurisprudence Constantinople uncertainty electromagnetic thermodynamics asymptotic"
)
WORDS = tuple(_PASSAGE.split())
# Tried where a whole word is too long for the tokens that are left.
FILLERS = (" a", " I", " the", " of", ".", ",", "!", "?", "s", "x", "1", " 7", "\n", ")", "é", "漢")


def token_count(router: Router) -> Callable[[str], int]:
    """How many ids a text becomes, those of prompt, prefix and suffix included, before any cut by tokens."""

    def count(text: str) -> int:
        ids, cut = router.tokenize(text)
        return len(ids) + cut.tokens_dropped + (1_000_000 if cut.bytes_dropped else 0)

    return count


def exact_text(count: Callable[[str], int], tokens: int, seed: str) -> str | None:
    """A text that becomes exactly ``tokens`` ids; None where even the empty text becomes more, or none is found."""
    dice = random.Random(seed)
    text, take = "", tokens
    for _ in range(ATTEMPTS):
        missing = tokens - count(text)
        if missing <= 0:
            return text if missing == 0 else None
        take = max(1, min(take, missing // 2))
        longer = " ".join([*([text] if text else []), *dice.choices(WORDS, k=take)])
        if count(longer) <= tokens:
            text = longer
        elif take > 1:
            take //= 2
        else:
            fitting = [text + filler for filler in FILLERS if tokens - missing < count(text + filler) <= tokens]
            text = fitting[0] if fitting else text.rpartition(" ")[0]
    return None


def bucket_texts(router: Router, tokens: int, texts: int = TEXTS) -> list[str]:
    """Different texts of exactly ``tokens`` ids; empty where the bundle's budget or prompt allows none."""
    manifest = router.bundle.manifest
    if manifest.tokens is None or tokens > manifest.tokens.max_tokens:
        return []
    count = token_count(router)
    found = (exact_text(count, tokens, f"{tokens}/{i}") for i in range(texts))
    return [text for text in found if text is not None]


def mix_lengths(texts: int = MIX) -> list[int]:
    """Token counts of the generated mix, at the middles of ``texts`` equal shares of the log-normal, shuffled."""
    normal = NormalDist()
    spread = (MIX_P90 / MIX_MEDIAN) ** (1 / normal.inv_cdf(0.9))  # exp(sigma)
    lengths = [round(MIX_MEDIAN * spread ** normal.inv_cdf((i + 0.5) / texts)) for i in range(texts)]
    lengths = [min(LONGEST, length) for length in lengths]
    random.Random("mix").shuffle(lengths)
    return lengths


def mixed_texts(router: Router, texts: int = MIX, cut: bool = True) -> list[str]:
    """Texts of the lengths of :func:`mix_lengths`.

    Args:
        cut: some are longer than the bundle's budget, and cut as any long query is; else none is longer.
    """
    count = token_count(router)
    spec = router.bundle.manifest.tokens
    room = spec.max_tokens if spec is not None else 0
    shortest = count("") + 1
    found = []
    for i, length in enumerate(mix_lengths(texts)):
        wanted = max(shortest, length if cut else min(length, room))
        parts = [exact_text(count, max(shortest, min(room, wanted - start)), f"mix/{i}/{start}")
                 for start in range(0, wanted, room)]  # fmt: skip
        found.append("\n".join(part for part in parts if part))
    return found


def read_queries(path: str | Path) -> list[str]:
    """The queries of a file: .jsonl with `query` or `text`, .csv with such a column, or .txt, one a line; also .gz.

    Raises:
        OutcomesError: the file can't be read, a row has no query, or there is none; names the file and line.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl"):
        queries = list(_queries(jsonl_records(path)))
    elif name.endswith(".csv"):
        queries = list(_queries(csv_table(path)[1]))
    elif name.endswith(".txt"):
        queries = [line.rstrip("\r\n") for line in lines(path) if line.strip()]
    else:
        raise OutcomesError(f"{path}: unknown form; give .jsonl or .csv with query (or text), or .txt (also .gz)")
    if not queries:
        raise OutcomesError(f"{path}: no query in the file; give at least one")
    return queries


def _queries(records: Iterator[Record]) -> Iterator[str]:
    for where, record in records:
        value = next((record[field] for field in QUERY_FIELDS if field in record), None)
        if not isinstance(value, str):
            raise OutcomesError(f"{where}: no string {' or '.join(QUERY_FIELDS)}; put the query there")
        yield value
