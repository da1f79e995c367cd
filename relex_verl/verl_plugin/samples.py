"""The samples that an engine was trained on last, and how likely its policy finds their tokens.

verl's own remote method for that, `compute_log_prob`, writes its answer beside the samples in the TransferQueue, where the
training reads it. So the engine is asked here, with the mini-batch as it was given to it, and nothing else sees the answer.
"""

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["LastSamples"]

# What a forward pass takes of a mini-batch: the tokens, which of them the policy drew, and how it is to be computed.
FIELDS = (
    "input_ids", "position_ids", "loss_mask", "response_mask", "multi_modal_inputs", "temperature", "pad_mode",
    "use_remove_padding", "use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "use_fused_kernels",
)  # fmt: skip


class LastSamples:
    """verl's FSDP engine as `protocol.Samples`."""

    def __init__(self, engine: Any) -> None:
        """Look on from now on: the engine's `train_batch` is shadowed on this one object."""
        self._engine, self._batch = engine, None
        train_batch = engine.train_batch

        def watched(data: Any, *args: Any, **kwargs: Any) -> Any:
            self._batch = data
            return train_batch(data, *args, **kwargs)

        engine.train_batch = watched

    def release(self) -> None:
        """Look away, and let go of them."""
        vars(self._engine).pop("train_batch", None)
        self._batch = None

    def keep(self, step: int, file: Path) -> None:
        """See `protocol.Samples`."""
        if self._batch is None:  # resumed at this very step, which kept its own
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        torch.save({"step": step, "batch": self._batch.select(*FIELDS, strict=False)}, temporary)
        os.replace(temporary, file)

    def log_probs(self, step: int, file: Path) -> torch.Tensor:
        """See `protocol.Samples`."""
        from verl.workers.utils.padding import response_from_nested

        batch = self._batch
        if batch is None:
            kept = torch.load(file, weights_only=False)  # this run's own
            if kept["step"] != step:
                raise ValueError(f"{file} has the samples of step {kept['step']}, not of {step}")
            batch = kept["batch"]
        data = batch.select(*FIELDS, strict=False)
        with self._engine.eval_mode():
            found = self._engine.infer_batch(data)["model_output"]["log_probs"]
        drawn = data["response_mask"]
        log_probs: torch.Tensor = response_from_nested(found.cpu(), drawn.cpu()).values()
        return log_probs[drawn.cpu().values().bool()].double()
