"""Scores Hugging Face checkpoints: greedy answers to the run's validation set, judged by the run's reward function."""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from reward import compute_score
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def accuracy(checkpoint: Path, validation_file: Path) -> float:
    """Mean reward over the validation set.

    Weights are rounded to bfloat16, as verl rounds them when it hands them to its rollout, so that all
    checkpoints stand beside the run's own validation. The arithmetic is float32.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    table = pd.read_parquet(validation_file)
    questions = [
        tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
        for chat in table["prompt"]
    ]
    inputs = tokenizer(questions, return_tensors="pt", padding=True, add_special_tokens=False)
    outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = [
        compute_score(source, answer, truth["ground_truth"])
        for source, answer, truth in zip(table["data_source"], answers, table["reward_model"], strict=True)
    ]
    return sum(rewards) / len(rewards)


def main() -> None:
    """Print one JSON object a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--val", type=Path, required=True, help="the run's validation parquet file")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of Hugging Face checkpoints")
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoints:
        score = accuracy(checkpoint, arguments.val)
        print(json.dumps({"checkpoint": str(checkpoint), "accuracy": score}), flush=True)


if __name__ == "__main__":
    main()
