"""Writes the training and validation prompts as the parquet files that verl reads."""

import sys
from pathlib import Path

import pandas as pd
from addition import question, split

DATA_SOURCE = "addition"


def rows(pairs: list[tuple[int, int]]) -> list[dict]:
    """verl's fields: a chat, the source (names the metric), the truth for the reward, and an index."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": question(left, right)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(left + right)},
            "extra_info": {"index": index},
        }
        for index, (left, right) in enumerate(pairs)
    ]


def files(folder: Path) -> tuple[Path, Path]:
    """Where `write` puts the training and the validation prompts."""
    return folder / "train.parquet", folder / "val.parquet"


def write(folder: Path) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = files(folder)
    for path, pairs in zip(paths, split(), strict=True):
        pd.DataFrame(rows(pairs)).to_parquet(path)
    return paths


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
