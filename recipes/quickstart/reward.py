"""The reward: 1 for the right sum and nothing else, 0 otherwise."""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """verl's signature for `reward.custom_reward_function`."""
    return float(solution_str.strip() == ground_truth)
