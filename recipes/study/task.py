"""The quickstart's addition task as token tensors, and the score of a model on it."""

from pathlib import Path
from typing import NamedTuple

import torch
from addition import split
from base_model import IGNORED, build, encode
from transformers import AutoTokenizer, Qwen2ForCausalLM

PROMPT_TOKENS, ANSWER_TOKENS = 6, 4


class Questions(NamedTuple):
    """n questions.

    Attributes:
        tokens: (n, 10), six of the question, then the answer with its end token, padded.
        labels: (n, 10), the answer's tokens, `IGNORED` elsewhere.
    """

    tokens: torch.Tensor
    labels: torch.Tensor

    @property
    def prompts(self) -> torch.Tensor:
        """(n, 6)."""
        return self.tokens[:, :PROMPT_TOKENS]

    @property
    def answers(self) -> torch.Tensor:
        """(n, 4), padded after the end token."""
        return self.tokens[:, PROMPT_TOKENS:]


def load_questions(base: Path) -> tuple[Questions, Questions]:
    """(train, test): disjoint; the test questions are the quickstart's validation questions."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (Questions(*encode(tokenizer, pairs)) for pairs in split())
    return train, test


def load_model(base: Path) -> Qwen2ForCausalLM:
    """The base model in bfloat16, as rollouts and predicted checkpoints have it."""
    build(base)
    return Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()


@torch.no_grad()
def greedy_correct(model: Qwen2ForCausalLM, questions: Questions) -> torch.Tensor:
    """Which questions greedy decoding answers right, (n,) bool.

    One forward pass with the true answer fed in: greedy decoding finds it exactly when each of its tokens is the
    likeliest one after those before it.
    """
    predicted = model(input_ids=questions.tokens[:, :-1], logits_to_keep=ANSWER_TOKENS).logits.argmax(-1)
    wanted = questions.labels[:, PROMPT_TOKENS:]
    return ((predicted == wanted) | (wanted == IGNORED)).all(dim=1)
