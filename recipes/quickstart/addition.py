"""The task: two-digit addition, written as text."""

import random

FIRST, LAST = 10, 99
VALIDATION_SIZE = 512
SPLIT_SEED = 20240


def question(left: int, right: int) -> str:
    """What the model is shown, for example ``12+34=``."""
    return f"{left}+{right}="


def split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All pairs of two-digit numbers, shuffled once and for all: (train, validation), disjoint."""
    pairs = [(left, right) for left in range(FIRST, LAST + 1) for right in range(FIRST, LAST + 1)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    return pairs[VALIDATION_SIZE:], pairs[:VALIDATION_SIZE]
