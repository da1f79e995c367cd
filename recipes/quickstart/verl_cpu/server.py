"""A generation server for tiny models: collects requests, decodes them in batches.

What a request gets back depends on the weights, its prompt and its seed alone: see `decoding.py`.
Requests are decoded together with others of the same prompt length, so that no padding enters the arithmetic.
"""

import asyncio
import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.replica import TokenOutput

from verl_cpu.decoding import BATCH_ROWS, Decoded, Sampling, decode


@dataclass
class Request:
    """One waiting request and the future that its caller awaits."""

    prompt_ids: list[int]
    sampling: Sampling
    done: asyncio.Future = field(repr=False)


class GenerationServer:
    """The Ray actor that verl's `LLMServerClient` talks to."""

    def __init__(self, model_path: str, dtype: str, max_tokens: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        # Weights are rounded to the dtype that verl would serve; the arithmetic is float64.
        self.weight_dtype = PrecisionType.to_dtype(dtype)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
        self.stop_ids = _stop_ids(model_path)
        self.max_tokens = max_tokens
        self.global_steps: int | None = None
        self.base: dict[str, torch.Tensor] = {}  # what verl sent last that was no adapter
        self.waiting: list[Request] = []
        self.running = asyncio.Event()
        self.running.set()
        self.arrived = asyncio.Event()
        self.decoder: asyncio.Task | None = None
        self.model_lock = asyncio.Lock()  # asynchronous modes send new weights at any time

    async def ready(self) -> bool:
        return True

    async def load_weights(
        self,
        named_tensors: dict[str, torch.Tensor],
        global_steps: int | None,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        state = {
            name.replace(".base_layer", ""): tensor.to(self.weight_dtype).double()
            for name, tensor in named_tensors.items()
        }
        if adapter is not None:
            state = self._adapted(state, adapter["lora_alpha"] / adapter["r"])
        async with self.model_lock:
            missing, unexpected = self.model.load_state_dict(state, strict=False)
            self.global_steps = global_steps
        # A tied output layer has no tensor of its own in some exporters.
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"weights do not fit the model: missing {missing}, unexpected {unexpected}")
        if adapter is None:
            self.base = state

    def _adapted(self, tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        """The base's weights with an adapter added; nothing is left of the one before."""
        state = dict(self.base)
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
                state[layer] = state[layer] + scale * tensors[name.replace("lora_A", "lora_B")] @ tensor
        return state

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        await self.running.wait()
        loop = asyncio.get_running_loop()
        request = Request(list(prompt_ids), self._sampling(request_id, sampling_params), loop.create_future())
        self.waiting.append(request)
        self.arrived.set()
        if self.decoder is None:
            self.decoder = asyncio.create_task(self._decode_forever())
        return await request.done

    def _sampling(self, request_id: str, params: dict[str, Any]) -> Sampling:
        if params.get("top_p", 1.0) < 1.0 or params.get("top_k", -1) > 0:
            raise NotImplementedError("the cpu rollout samples from the whole distribution: set top_p=1 and top_k=-1")
        seed = params.get("seed")
        if seed is None:  # only the seeded agent loop gives one; without it a run is not repeatable
            seed = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")
        limit = params.get("max_tokens", params.get("max_new_tokens", self.max_tokens))
        max_tokens = min(limit, self.max_tokens)
        return Sampling(
            temperature=float(params.get("temperature", 1.0)),
            uniforms=np.random.default_rng(seed).random(max_tokens),
        )

    async def _decode_forever(self) -> None:
        while True:
            await self.arrived.wait()
            await self._gather_burst()
            batch = self._take_batch()
            if not batch:
                self.arrived.clear()
                continue
            prompts = [request.prompt_ids for request in batch]
            samplings = [request.sampling for request in batch]
            try:
                async with self.model_lock:
                    version = self.global_steps
                    decoded = await asyncio.to_thread(decode, self.model, prompts, samplings, self.stop_ids)
            except Exception as error:  # goes to the callers; the server lives on
                for request in batch:
                    if not request.done.done():
                        request.done.set_exception(error)
                continue
            for request, result in zip(batch, decoded, strict=True):
                if not request.done.done():  # a caller may have given up
                    request.done.set_result(_token_output(result, version))

    async def _gather_burst(self) -> None:
        """Wait while requests keep coming: full batches are cheaper, and never change a result."""
        seen = -1
        while len(self.waiting) != seen and len(self.waiting) < BATCH_ROWS:
            seen = len(self.waiting)
            await asyncio.sleep(0.005)

    def _take_batch(self) -> list[Request]:
        if not self.waiting:
            return []
        length = len(self.waiting[0].prompt_ids)
        batch = [request for request in self.waiting if len(request.prompt_ids) == length][:BATCH_ROWS]
        taken = set(map(id, batch))
        self.waiting = [request for request in self.waiting if id(request) not in taken]
        return batch

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Send back what waits, untouched, and hold what comes until `resume_generation`."""
        self.running.clear()
        aborted, self.waiting = self.waiting, []
        for request in aborted:
            request.done.set_result(
                TokenOutput(
                    token_ids=[],
                    log_probs=[],
                    stop_reason="aborted",
                    extra_fields={"global_steps": self.global_steps},
                )
            )

    async def resume_generation(self) -> None:
        self.running.set()

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    sleep = wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    start_profile = stop_profile = _nothing


def _token_output(result: Decoded, global_steps: int | None) -> TokenOutput:
    return TokenOutput(
        token_ids=result.token_ids,
        log_probs=result.log_probs,
        stop_reason="completed",
        extra_fields={"global_steps": global_steps},
    )


def _stop_ids(model_path: str) -> set[int]:
    eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}
