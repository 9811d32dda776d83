"""Tests of runtime/devices.py: what a driver says is taken over, and no driver means no device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from arllm.runtime import devices
from arllm.runtime.devices import CudaDevice, cuda_devices, read_devices


class FakeDriver:
    """As the driver API answers: results go through pointers, 0 is success."""

    def __init__(self, *cards: tuple[str, int, int], initialised: int = 0) -> None:
        self.cards, self.initialised = cards, initialised

    def cuInit(self, flags: int) -> int:
        return self.initialised

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, handle: ctypes.c_int) -> int:
        card = self.cards[handle.value]
        name.value = card[0].encode()[: length - 1]
        return 999 if card[0] == "broken" else 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, handle: ctypes.c_int) -> int:
        number._obj.value = self.cards[handle.value][{75: 1, 76: 2}[attribute]]
        return 0


@pytest.fixture
def _ask_anew() -> Iterator[None]:
    cuda_devices.cache_clear()
    yield
    cuda_devices.cache_clear()


def test_names_and_capabilities_in_the_drivers_order() -> None:
    driver: Any = FakeDriver(("NVIDIA H100", 9, 0), ("broken", 1, 0), ("Tesla T4", 7, 5))
    assert read_devices(driver) == (CudaDevice("NVIDIA H100", (9, 0)), CudaDevice("Tesla T4", (7, 5)))


def test_a_driver_that_fails_shows_no_device() -> None:
    driver: Any = FakeDriver(("NVIDIA H100", 9, 0), initialised=100)  # CUDA_ERROR_NO_DEVICE
    assert read_devices(driver) == ()


@pytest.mark.usefixtures("_ask_anew")
def test_no_driver_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER", "no_such_driver.so")
    assert cuda_devices() == ()


@pytest.mark.usefixtures("_ask_anew")
def test_the_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str) -> FakeDriver:
        loaded.append(name)
        return FakeDriver(("NVIDIA H100", 9, 0))

    monkeypatch.setattr(devices.ctypes, "CDLL", load)
    assert cuda_devices() == cuda_devices() == (CudaDevice("NVIDIA H100", (9, 0)),)
    assert loaded == [devices.DRIVER]
