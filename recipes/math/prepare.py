"""Download the datasets of datasets.yaml and write them as the parquet files that verl reads.

python recipes/math/prepare.py --out ~/data/relex_math [--only math_train,math_500] [--holdout 500]
"""

import argparse
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

DATASETS = Path(__file__).with_name("datasets.yaml")
# The prompt of the paper's authors (their scripts/eval.py), as a chat.
SYSTEM = "You are a helpful assistant."
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def ground_truth(value: Any, boxed: bool) -> str:
    """The bare answer: the first of a list, out of its box, without dollar signs.

    Raises:
        ValueError: no box where one is expected, or an empty answer.
    """
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        value = next(iter(value), "")
    text = str(value).strip()
    if boxed:
        from verl.utils.reward_score.math_reward import last_boxed_only_string, remove_boxed

        box = last_boxed_only_string(text)
        if box is None:
            raise ValueError(f"no \\boxed{{}} in {text[:200]!r}")
        text = remove_boxed(box).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    if not text:
        raise ValueError("empty answer")
    return text


def verl_rows(records: Iterable[Mapping[str, Any]], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """verl's fields: a chat, the source (names the metric), the truth for the reward, and an index.

    Args:
        records: rows of the dataset.
        spec: its entry in datasets.yaml.
    """
    return [
        {
            "data_source": spec["data_source"],
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": record[spec["problem"]] + INSTRUCTION},
            ],
            "ability": "math",
            "reward_model": {
                "style": "rule",
                "ground_truth": ground_truth(record[spec["answer"]], spec.get("boxed", False)),
            },
            "extra_info": {"index": index, "split": spec["split"]},
        }
        for index, record in enumerate(records)
    ]


def hold_out(rows: list[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split `count` rows off, always the same ones; returns (kept, held out), both in order."""
    held = set(random.Random(0).sample(range(len(rows)), count))
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one parquet file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pd.DataFrame(rows).to_parquet(partial)
    partial.rename(path)
    print(f"{path}: {len(rows)} rows")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    specs = yaml.safe_load(DATASETS.read_text())
    parser = argparse.ArgumentParser(description="Write the recipe's datasets as parquet files for verl.")
    parser.add_argument("--out", type=Path, default=Path("~/data/relex_math"), help="folder (%(default)s)")
    parser.add_argument("--only", default=",".join(specs), help="names of datasets.yaml, by commas (all)")
    parser.add_argument(
        "--holdout", type=int, default=0, metavar="N", help="move N training problems to math_holdout.parquet"
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(specs)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(specs)}")

    from datasets import load_dataset

    folder = options.out.expanduser()
    for name in names:
        spec = specs[name]
        rows = verl_rows(load_dataset(spec["hub"], split=spec["split"]), spec)
        if len(rows) != spec["rows"]:
            print(f"{spec['hub']}: {len(rows)} rows, {spec['rows']} expected: not the paper's set?", file=sys.stderr)
        if name == "math_train" and options.holdout:
            rows, held = hold_out(rows, options.holdout)
            write(held, folder / "math_holdout.parquet")
        write(rows, folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
