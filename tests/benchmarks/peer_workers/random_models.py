"""Randomly initialised encoders in the shape of published ones, with nano's tokenizer, saved as transformers folders.

No weights can be had offline, and latency does not depend on their values. The vocabulary is nano's 16,000: a query
reads as many rows as it has tokens, whatever the size of the table.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 16_000


def save_random(kind: str, tokenizer_file: str, folder: Path, max_length: int) -> Path:
    """The folder of a model of this kind: ``xlm-roberta-base``, ``longformer-base`` or ``minilm-l6``."""
    import torch
    import transformers

    if (folder / "finished").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    torch.manual_seed(0)
    if kind == "xlm-roberta-base":
        config = transformers.XLMRobertaConfig(
            **common, **base, max_position_embeddings=514, type_vocab_size=1, num_labels=3
        )
        model = transformers.XLMRobertaForSequenceClassification(config)
    elif kind == "longformer-base":
        config = transformers.LongformerConfig(
            **common, **base, max_position_embeddings=4098, type_vocab_size=1, attention_window=[512] * 12
        )
        model = transformers.LongformerModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, pad_token_id=0, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536, max_position_embeddings=512,
        )  # fmt: skip
        model = transformers.BertModel(config)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "finished").touch()
    return folder
