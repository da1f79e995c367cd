"""Logits Extrapolation: two checkpoints decode together, and their logits are extrapolated at every token.

Wang et al. 2026, "Not All Steps are Informative: On the Linearity of LLMs' RLVR Training",
https://arxiv.org/abs/2601.04537, code https://github.com/Miaow-Lab/RLVR-Linearity:

    z = z_first + a (z_last - z_first),   a = (target - first) / (last - first),   then / temperature,   then top-p.

No weights change and no checkpoint is written: both models stay in memory and run for every token.
"""

from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from relex_verl.offline.baselines.weight_extrapolation import two_point_factor

__all__ = ["LogitsExtrapolation", "generate_extrapolated"]


class LogitsExtrapolation(LogitsProcessor):
    """For `last_model.generate(..., logits_processor=[...])`: runs the first model beside it, with its own KV cache.

    The temperature and top-p of the authors come after the combination, so `generate`'s own must be off (temperature 1,
    top_p 1, top_k 0); `generate_extrapolated` sees to that. When a sequence is not the continuation of the one before
    (another prompt, beams that were reordered), the cache is dropped and built again: right in any case, and slow under
    beam search.
    """

    def __init__(
        self,
        first_model: PreTrainedModel,
        factor: float,
        temperature: float = 1.0,
        top_p: float = 1.0,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            first_model: the checkpoint at `first`.
            factor: a, see `weight_extrapolation.two_point_factor`.
            temperature: divides the combined logits; has no say in greedy decoding.
            top_p: keep the smallest set of tokens with at least this probability, after the temperature.
            attention_mask: (B, S) of the prompt when it is padded (on the left); None if every token counts.

        Raises:
            ValueError: temperature or top_p out of range.
        """
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p has to be above 0 and at most 1, got {top_p}")
        self.model, self.factor = first_model, factor
        self.prompt_mask = attention_mask
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))] if temperature != 1.0 else [])
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))
        self._cache: Any = None
        self._seen: torch.Tensor | None = None  # (B, S) the tokens in the cache

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The combined scores.

        Args:
            input_ids: (B, S) prompt and continuation so far.
            scores: (B, V) the last model's logits of the next token.

        Returns:
            (B, V) float32.
        """
        first_BV = self._first_logits(input_ids).to(scores.device, torch.float32)
        combined_BV = first_BV + self.factor * (scores.float() - first_BV)
        return cast(torch.FloatTensor, self.warpers(input_ids, cast(torch.FloatTensor, combined_BV)))

    def _first_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids_BS = input_ids.to(self.model.device)
        known = self._known(ids_BS)
        mask_BS = self._mask(ids_BS)
        positions_BS = (mask_BS.cumsum(dim=-1) - 1).clamp_min(0)
        out = self.model(
            input_ids=ids_BS[:, known:],
            attention_mask=mask_BS,
            position_ids=positions_BS[:, known:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache, self._seen = out.past_key_values, ids_BS
        return cast(torch.Tensor, out.logits[:, -1])

    def _known(self, ids_BS: torch.Tensor) -> int:
        """How many leading tokens the cache holds; it is dropped if they are others."""
        if self._seen is not None and self._seen.shape[0] == ids_BS.shape[0] and self._seen.shape[1] < ids_BS.shape[1]:
            length = self._seen.shape[1]
            if torch.equal(self._seen, ids_BS[:, :length]):
                return length
        self._cache = self._seen = None
        return 0

    def _mask(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """(B, S): the prompt's mask, repeated for several samples a prompt, and 1 for all that was generated."""
        mask_BS = torch.ones_like(ids_BS)
        if self.prompt_mask is not None:
            prompts, length = self.prompt_mask.shape
            if len(ids_BS) % prompts or length > ids_BS.shape[1]:
                raise ValueError(f"the attention mask is of {prompts} prompts of {length} tokens, not of this batch")
            repeated = self.prompt_mask.repeat_interleave(len(ids_BS) // prompts, dim=0)
            mask_BS[:, :length] = repeated.to(mask_BS)
        return mask_BS


def generate_extrapolated(
    first_model: PreTrainedModel,
    last_model: PreTrainedModel,
    input_ids: torch.Tensor,
    steps: tuple[float, float, float],
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    **options: Any,
) -> torch.Tensor:
    """`generate` with extrapolated logits; the defaults are the authors' (they draw k = 8 samples a prompt).

    Nothing of the models' own generation settings is used but the special tokens.

    Args:
        first_model: the checkpoint at step `first`.
        last_model: the checkpoint at step `last`, of the same vocabulary.
        input_ids: (B, S) prompts.
        steps: (first, last, target), real training steps.
        attention_mask: (B, S); None if nothing is padded.
        temperature: after the combination.
        top_p: after the temperature.
        options: fields of GenerationConfig, e.g. max_new_tokens, do_sample (True by default), num_return_sequences. Those
            that would warp the logits once more are refused.

    Returns:
        (B * num_return_sequences, S + new) prompts and continuations.

    Raises:
        ValueError: vocabularies that differ, `last` not after `first`, or an option that warps logits.
    """
    doubled = sorted({"top_k", "min_p", "typical_p", "repetition_penalty"} & set(options))
    if doubled:
        raise ValueError(f"{', '.join(doubled)} would warp the logits besides the temperature and top-p of this method")
    vocabularies = [model.get_output_embeddings().weight.shape[0] for model in (first_model, last_model)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(f"the checkpoints' vocabularies differ: {vocabularies[0]} and {vocabularies[1]} tokens")
    own = last_model.generation_config
    special = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")} if own else {}
    neutral: dict[str, Any] = {**special, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **options}
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    processor = LogitsExtrapolation(first_model, two_point_factor(*steps), temperature, top_p, mask)
    # `generate` fills whatever a configuration leaves open from the model's own: put ours in its place meanwhile.
    last_model.generation_config = GenerationConfig(**neutral)
    try:
        generated = cast(Any, last_model).generate(
            input_ids, attention_mask=mask, logits_processor=LogitsProcessorList([processor])
        )
    finally:
        last_model.generation_config = own
    return cast(torch.Tensor, generated)
