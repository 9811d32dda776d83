"""What this machine computes on: its cores, and its CUDA devices, asked of the driver itself.

Neither torch nor a CUDA toolkit is needed for it, nor ONNX Runtime, which names the CUDA provider wherever
its package for GPUs is installed, a card or not.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of the driver API
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class CudaDevice:
    name: str  # as the maker has it: "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int]  # compute capability


@functools.lru_cache(maxsize=1)
def cuda_devices() -> tuple[CudaDevice, ...]:
    """The devices that the driver offers this process (``CUDA_VISIBLE_DEVICES`` counts); none without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    return read_devices(driver)


def read_devices(driver: ctypes.CDLL) -> tuple[CudaDevice, ...]:
    """What a loaded driver says; none where it can't be initialised."""
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        handle, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        numbers = ctypes.c_int(0), ctypes.c_int(0)
        results = [driver.cuDeviceGet(ctypes.byref(handle), index), driver.cuDeviceGetName(name, len(name), handle)]
        results += [
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle)
            for number, attribute in zip(numbers, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True)
        ]
        if not any(results):
            found.append(CudaDevice(name.value.decode("utf-8", "replace"), (numbers[0].value, numbers[1].value)))
    return tuple(found)
