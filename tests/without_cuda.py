"""Stand-ins for what Megatron and TorchTitan ask of CUDA before they build a model on a machine that has none.

Nothing of what is tested is replaced: modules, parallel groups, parameter mappings, loading and export are the packages'
own. Each function changes the process that calls it, for good, so call it in a process of its own only.
"""

import contextlib
import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class Stream:
    """A CUDA stream, of which there is one."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _: "Stream") -> None: ...


def import_megatron_bridge() -> None:
    """Megatron-Bridge imports `transformer_engine` for its adapters, without which it would not need it."""
    # First: what is imported while the stand-in is there would take Transformer Engine for installed.
    for name in ("extensions.transformer_engine", "optimizer", "models.gpt", "models.gpt.gpt_layer_specs"):
        importlib.import_module(f"megatron.core.{name}")
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    for module in (package, pytorch):
        module.__spec__ = ModuleSpec(module.__name__, None)
    vars(package)["pytorch"] = pytorch
    vars(pytorch).update({name: type(name, (torch.nn.Module,), {}) for name in ("Linear", "LayerNormLinear")})
    vars(pytorch)["ops"] = SimpleNamespace(Sequential=torch.nn.Sequential)
    sys.modules |= {module.__name__: module for module in (package, pytorch)}
    importlib.import_module("megatron.bridge")
    for module in (package, pytorch):
        del sys.modules[module.__name__]


def stay_on_the_host() -> None:
    """`torch.cuda` of a machine whose only device is the host."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream, cuda.current_stream = Stream, Stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    for moved in (torch.nn.Module, torch.Tensor):
        setattr(moved, "cuda", lambda self, *_: self)  # noqa: B010
    scatter = dist.scatter

    def scatter_copies(tensor: torch.Tensor, pieces: list[torch.Tensor] | None = None, *rest: Any, **named: Any) -> Any:
        """Moving columns to a device copies them; gloo sends views without their strides."""
        return scatter(tensor, pieces and [piece.contiguous() for piece in pieces], *rest, **named)

    dist.scatter = scatter_copies


def be_the_accelerator() -> None:
    """TorchTitan asks torch for its accelerator: the quickstart's stands in, with two more answers."""
    from verl.utils.device import get_torch_device

    device: Any = get_torch_device()
    device.get_device_properties = lambda *_: SimpleNamespace(total_memory=1 << 30)
    device.memory_stats = lambda *_: {}
    utils: Any = importlib.import_module("torch._utils")
    utils._get_available_device_type = lambda: "cpu"
    utils._get_device_module = lambda _: device
