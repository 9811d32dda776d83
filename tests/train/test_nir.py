"""Tests of train/nir.py: published names, both shapes against the formula by hand, and loading published files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from arllm.runtime.errors import RunError
from arllm.train.nir import Nir, build_nir, load_published

# Name → shape, as the published checkpoints have them.
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "interaction": {  # 3 domains and difficulty; 3-wide model vectors
        "q_proj.0.weight": (32, 4),
        "q_proj.0.bias": (32,),
        "m_proj.0.weight": (32, 3),
        "m_proj.0.bias": (32,),
        "fc_layers.0.weight": (256, 129),
        "fc_layers.0.bias": (256,),
        "fc_layers.3.weight": (128, 256),
        "fc_layers.3.bias": (128,),
        "fc_layers.6.weight": (1, 128),
        "fc_layers.6.bias": (1,),
    },
    "ncf": {  # 4 domains and difficulty; 4-wide model vectors
        "q_proj_mlp.weight": (32, 5),
        "q_proj_mlp.bias": (32,),
        "m_proj_mlp.weight": (32, 4),
        "m_proj_mlp.bias": (32,),
        "q_proj_mf.weight": (32, 5),
        "q_proj_mf.bias": (32,),
        "m_proj_mf.weight": (32, 4),
        "m_proj_mf.bias": (32,),
        "fc_layers.0.weight": (256, 64),
        "fc_layers.0.bias": (256,),
        "fc_layers.1.weight": (128, 256),
        "fc_layers.1.bias": (128,),
        "output_layer.weight": (1, 160),
        "output_layer.bias": (1,),
    },
}
WIDTHS = {"interaction": (4, 3), "ncf": (5, 4)}
SHAPES = tuple(PUBLISHED)


def published_state(shape: str, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as published, made without the classes under test."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) * 0.2 for name, size in PUBLISHED[shape].items()}


def pairs(shape: str, count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    query_width, model_width = WIDTHS[shape]
    return torch.rand(count, query_width, generator=generator), torch.rand(count, model_width, generator=generator)


def by_hand(shape: str, state: dict[str, Tensor], q: Tensor, m: Tensor) -> NDArray[np.float64]:
    """The published formula in numpy, float64."""
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}

    def linear(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def relu(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(x, 0.0)

    query, model = q.numpy().astype(np.float64), m.numpy().astype(np.float64)
    if shape == "interaction":
        a, b = relu(linear("q_proj.0", query)), relu(linear("m_proj.0", model))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        x = np.concatenate([a, b, a * b, np.abs(a - b), cosine[:, None]], axis=1)
        x = relu(linear("fc_layers.3", relu(linear("fc_layers.0", x))))
        return linear("fc_layers.6", x)[:, 0]
    x = np.concatenate([relu(linear("q_proj_mlp", query)), relu(linear("m_proj_mlp", model))], axis=1)
    x = relu(linear("fc_layers.1", relu(linear("fc_layers.0", x))))
    product = linear("q_proj_mf", query) * linear("m_proj_mf", model)
    return linear("output_layer", np.concatenate([x, product], axis=1))[:, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_names_and_shapes_are_the_published_ones(shape: str) -> None:
    net = build_nir(shape, *WIDTHS[shape])
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == PUBLISHED[shape]
    assert (net.shape, net.query_width, net.model_width) == (shape, *WIDTHS[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_file_gives_the_published_formula(shape: str, tmp_path: Path) -> None:
    state = published_state(shape)
    torch.save(state, tmp_path / "nir.pth")
    net = load_published(tmp_path / "nir.pth")
    assert (net.shape, net.query_width, net.model_width) == (shape, *WIDTHS[shape])
    assert not net.training
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    q, m = pairs(shape)
    np.testing.assert_allclose(net(q, m).detach().numpy(), by_hand(shape, state, q, m), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_pairs_is_forward_on_repeated_rows(shape: str) -> None:
    torch.manual_seed(1)
    net = build_nir(shape, *WIDTHS[shape]).eval()
    q, m = pairs(shape)[0][:3], pairs(shape)[1]
    with torch.no_grad():
        grid = net.all_pairs(q, m)
        repeated = net(q.repeat_interleave(len(m), 0), m.repeat(len(q), 1)).reshape(len(q), len(m))
    assert grid.shape == (3, 7)
    torch.testing.assert_close(grid, repeated, rtol=0, atol=1e-6)
    assert grid.std() > 1e-4  # rows and columns do differ, else any mix-up would pass


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_acts_in_training_alone(shape: str) -> None:
    net = build_nir(shape, *WIDTHS[shape])
    q, m = pairs(shape)
    net.train()
    assert not torch.equal(net(q, m), net(q, m))
    net.eval()
    assert torch.equal(net(q, m), net(q, m))


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_widths_are_told_from_the_file(shape: str, tmp_path: Path) -> None:
    class_of: Any = type(build_nir(shape, 4, 3))
    small = class_of(6, 2, projection=8, hidden=(12, 5)).eval()
    torch.save(small.state_dict(), tmp_path / "small.pth")
    net = load_published(str(tmp_path / "small.pth"))
    q, m = torch.rand(4, 6), torch.rand(4, 2)
    assert torch.equal(net(q, m), small(q, m))


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    torch.save({k: v.half() for k, v in published_state("ncf").items()}, tmp_path / "half.pth")
    assert {p.dtype for p in load_published(tmp_path / "half.pth").parameters()} == {torch.float32}


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        load_published(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class _Trap:
    """Unpickling this creates a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "trap.pth", {"q_proj.0.weight": _Trap(str(tmp_path / "sprung"))}))
    assert "not a plain PyTorch state dict" in message
    assert not (tmp_path / "sprung").exists()


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    net: Nir = build_nir("interaction", 4, 3)
    assert "torch.save(net.state_dict(), path)" in refusal(saved(tmp_path / "module.pth", net))


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, torch.ones(2), {"a": 1}])
def test_other_contents_are_refused(content: Any, tmp_path: Path) -> None:
    assert "state dict of tensors" in refusal(saved(tmp_path / "other.pth", content))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_missing_key_is_refused(shape: str, tmp_path: Path) -> None:
    for name in PUBLISHED[shape]:
        state = published_state(shape)
        del state[name]
        assert "neither published NIR shape" in refusal(saved(tmp_path / "less.pth", state))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_wrong_shape_is_refused(shape: str, tmp_path: Path) -> None:
    for name, size in PUBLISHED[shape].items():
        for wrong in ((*size, 2), size[:-1], (size[0] + 1, *size[1:])):
            state = published_state(shape)
            state[name] = torch.zeros(wrong)
            assert "neither published NIR shape" in refusal(saved(tmp_path / "wrong.pth", state))


@pytest.mark.parametrize("state", [{}, {"conv.weight": torch.ones(2, 2)}, {"a": torch.ones(1), 1: torch.ones(1)}])
def test_unrelated_tensors_are_refused(state: dict[Any, Tensor], tmp_path: Path) -> None:
    assert "q_proj.0.weight" in refusal(saved(tmp_path / "unrelated.pth", state))


def test_an_extra_key_is_refused(tmp_path: Path) -> None:
    assert "extra.weight" in refusal(
        saved(tmp_path / "extra.pth", {**published_state("ncf"), "extra.weight": torch.ones(1)})
    )


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint\n")
    assert "not a plain PyTorch state dict" in refusal(tmp_path / "text.pth")
    (tmp_path / "empty.pth").touch()
    refusal(tmp_path / "empty.pth")
    whole = saved(tmp_path / "cut.pth", published_state("ncf")).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    refusal(tmp_path / "cut.pth")
    refusal(tmp_path)  # a folder


def test_an_unknown_shape_names_the_choices() -> None:
    with pytest.raises(RunError, match="interaction, ncf"):
        build_nir("transformer", 4, 3)
