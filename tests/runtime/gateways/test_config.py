"""Tests of gateways/config.py: files, overrides, and one clear error for every bad setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.errors import InputError
from arllm.runtime.gateways.config import GatewayConfig, read_settings


def test_json_and_toml_files_and_overrides(tmp_path: Path) -> None:
    settings = {"default_model": "m", "beta": 0.3, "beta_bounds": [0.2, 1], "names": {"a/b": "ab"}, "shadow": True}
    (tmp_path / "a.json").write_text(json.dumps(settings), encoding="utf-8")
    config = GatewayConfig.from_file(tmp_path / "a.json", beta=0.4)
    assert (config.beta, config.beta_bounds, config.shadow) == (0.4, (0.2, 1.0), True)
    assert (config.upstream("a/b"), config.upstream("c")) == ("ab", "c")
    if sys.version_info >= (3, 11):
        (tmp_path / "a.toml").write_text(
            'default_model = "m"\nbeta = 0.3\nbeta_bounds = [0.2, 1]\nshadow = true\n[names]\n"a/b" = "ab"\n',
            encoding="utf-8",
        )
        assert GatewayConfig.from_file(tmp_path / "a.toml", beta=0.4) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_model": ""}, "default_model: expected a name"),
        ({"bundle": 3}, "bundle: expected a name"),
        ({"pool": ""}, "pool: expected a name"),
        ({"beta": 2}, r"beta or beta_bounds: beta must lie in \[0, 1\]"),
        ({"beta": "0.5"}, "beta must be a number"),
        ({"beta_bounds": [0.9, 0.1]}, "beta_bounds: expected two numbers, the lower one first"),
        ({"beta_bounds": 0.5}, "beta_bounds: expected two numbers"),
        ({"beta_bounds": [0, 7]}, "beta must lie in"),
        ({"query_from": "assistant"}, "query_from: expected one of last-user, conversation, first-user"),
        ({"deadline_ms": 0}, "deadline_ms: expected a finite number > 0"),
        ({"deadline_ms": float("nan")}, "deadline_ms: expected"),
        ({"inline_ms": -1}, "inline_ms: expected a finite number >= 0"),
        ({"workers": 0}, "workers: expected a whole number of at least 1"),
        ({"max_queue": True}, "max_queue: expected a whole number"),
        ({"sticky_margin": "wide"}, "sticky_margin: expected"),
        ({"shadow": 1}, "shadow: expected true or false"),
        ({"names": {"a": 1}}, "names: expected a table"),
        ({"names": ["a"]}, "names: expected a table"),
        ({"client_candidates": "all"}, "client_candidates: expected a list"),
        ({"log_files": -1}, "log_files: expected a whole number of at least 0"),
        ({"betta": 1}, "unknown setting 'betta': there are default_model, bundle"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        GatewayConfig.from_mapping({"default_model": "m", **change}, "here")


def test_the_default_model_is_never_guessed() -> None:
    with pytest.raises(InputError, match="default_model is missing"):
        GatewayConfig.from_mapping({})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json: not valid JSON"),
        ("a.json", b"[]", "a.json: expected a table of settings, not list"),
        ("a.json", b"\xff", "a.json: not valid JSON"),
        ("a.toml", b"a = ", "a.toml: (not valid TOML|TOML is read from)"),
        ("a.json", None, "a.json: can't be read: No such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / name)
