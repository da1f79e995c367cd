"""The harder task, three-digit addition: its questions, and its base, the quickstart's taught some of it."""

import random
from pathlib import Path

import torch
from base_model import LEARNING_RATE, SEED, WARMUP_STEPS
from transformers import AutoTokenizer, Qwen2ForCausalLM

from study.task import Questions, greedy_correct, load_model, tokenized

FIRST, LAST = 100, 999
TRAINING_SIZE, TEST_SIZE = 60_000, 512
BATCH_SIZE, MAX_STEPS, SCORE_EVERY = 64, 1000, 10
TARGET_ACCURACY = 0.4


def split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """A part of all pairs of three-digit numbers, the same one each time: (train, test), disjoint."""
    numbers = LAST - FIRST + 1
    drawn = random.Random(SEED).sample(range(numbers**2), TEST_SIZE + TRAINING_SIZE)
    pairs = [(FIRST + one // numbers, FIRST + one % numbers) for one in drawn]
    return pairs[TEST_SIZE:], pairs[:TEST_SIZE]


def load_questions(base: Path) -> tuple[Questions, Questions]:
    """(train, test)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (tokenized(tokenizer, pairs) for pairs in split())
    return train, test


def pretrain(model: Qwen2ForCausalLM, train: Questions, test: Questions) -> None:
    """Train up to the target accuracy on the test questions, which are never trained on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    shuffle = torch.Generator().manual_seed(SEED)
    for step in range(1, MAX_STEPS + 1):
        rows = torch.randint(len(train.prompts), (BATCH_SIZE,), generator=shuffle)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        tokens = torch.cat([train.prompts[rows], train.answers[rows, :-1]], dim=1)
        logits = model(input_ids=tokens, logits_to_keep=train.answers.shape[1]).logits
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), train.wanted[rows]).backward()  # skips `IGNORED`
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % SCORE_EVERY == 0 and greedy_correct(model, test).float().mean() >= TARGET_ACCURACY:
            break


def build(folder: Path, start: Path) -> None:
    """Train `start` and save it in bfloat16 (half a minute); does nothing when it is there already."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model = load_model(start).float()
    AutoTokenizer.from_pretrained(start).save_pretrained(unfinished)
    pretrain(model, *load_questions(start))
    model.bfloat16().save_pretrained(unfinished)
    unfinished.rename(folder)
