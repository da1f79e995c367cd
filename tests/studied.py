"""What the tests of the study share: one thread, as it runs itself, and a small untrained base."""

import sys
from pathlib import Path

import pytest
import torch
from one_thread import one_thread

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "quickstart")]

from base_model import build_model, build_tokenizer  # noqa: E402

__all__ = ["base", "one_thread"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), build_tokenizer()
    build_model(tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
