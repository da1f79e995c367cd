"""Addition as token tensors, the quickstart's of two digits, and the score of a model on it."""

from pathlib import Path
from typing import NamedTuple

import torch
from addition import question, split
from base_model import END_OF_TURN, IGNORED, build
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM


class Questions(NamedTuple):
    """n questions.

    Attributes:
        prompts: (n, P), all of one length: six tokens of two-digit addition.
        answers: (n, A) with the end token, padded after it.
        wanted: (n, A), the answers with `IGNORED` for the padding.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    wanted: torch.Tensor

    def part(self, rows: slice) -> "Questions":
        """Some of them."""
        return Questions(*(one[rows] for one in self))


def tokenized(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]]) -> Questions:
    """Sums as the model is shown them, and as it should answer."""
    texts = [f"{question(left, right)}{left + right}{END_OF_TURN}" for left, right in pairs]
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    prompts, answers = tokens.split([length := len(question(*pairs[0])), tokens.shape[1] - length], dim=1)
    return Questions(prompts, answers, answers.masked_fill(answers == tokenizer.pad_token_id, IGNORED))


def load_questions(base: Path) -> tuple[Questions, Questions]:
    """(train, test): disjoint; the test questions are the quickstart's validation questions."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (tokenized(tokenizer, pairs) for pairs in split())
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
    tokens = torch.cat([questions.prompts, questions.answers[:, :-1]], dim=1)
    predicted = model(input_ids=tokens, logits_to_keep=questions.answers.shape[1]).logits.argmax(-1)
    return ((predicted == questions.wanted) | (questions.wanted == IGNORED)).all(dim=1)
