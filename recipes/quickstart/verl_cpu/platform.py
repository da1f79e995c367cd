"""The platform ``cpu``: what verl asks of an accelerator, answered by a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class CpuDevice(str):
    """The string ``cpu`` that prints as the index 0.

    verl uses ``get_device_id()`` in two ways: as a device (``tensor.to(device_id)``, where torch would
    take an integer for an accelerator's index) and inside ``f"{name}:{device_id}"``.
    """

    def __new__(cls) -> "CpuDevice":
        return super().__new__(cls, "cpu")

    def __format__(self, spec: str) -> str:
        return "0"

    def __reduce__(self) -> tuple:
        return (CpuDevice, ())


def _build_device_module() -> Any:
    """`torch.cpu` plus the calls that only accelerators have: memory is not counted, caches do not exist."""
    module: Any = ModuleType("verl_cpu.device_module", "torch.cpu, with an accelerator's memory calls as no-ops")
    module.__dict__.update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")})

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    for name in ("empty_cache", "synchronize", "ipc_collect", "reset_peak_memory_stats", "set_device"):
        setattr(module, name, nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, zero)
    module.mem_get_info = lambda *args, **kwargs: (0, 0)
    module.current_device = lambda: CpuDevice()
    module.device_count = lambda: 1
    module.get_device_name = lambda *args, **kwargs: "CPU"
    module.is_available = lambda: True
    module.manual_seed = torch.manual_seed
    module.manual_seed_all = torch.manual_seed
    module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    return module


_DEVICE_MODULE = _build_device_module()


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """Every accelerator call is answered, none does anything."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Only VERL_PLATFORM=cpu chooses this platform: a machine with a GPU must not fall into it.
        return False

    def current_device(self) -> CpuDevice:
        return CpuDevice()

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        # verl counts nodes by the resources "GPU" and "NPU" only, so ranks take logical GPUs that
        # exist in Ray's books alone (ray_kwargs.ray_init.num_gpus).
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
