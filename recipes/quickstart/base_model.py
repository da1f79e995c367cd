"""Builds the base model: a Qwen2 of about 1M parameters that gets two-digit addition right a bit more than half the time."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from addition import question, split
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SEED = 7
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
MAX_STEPS = 1000
SCORE_EVERY = 5
TARGET_ACCURACY = 0.57

END_OF_TURN = "<|im_end|>"
PAD = "<|endoftext|>"
IGNORED = -100
# One turn is the text and nothing else; an answer ends with the end-of-turn token. Real chat markup
# would only make every prompt four times as long.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, plus Qwen's special tokens."""
    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    for special in (PAD, "<|im_start|>", END_OF_TURN):
        vocabulary[special] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END_OF_TURN, pad_token=PAD, unk_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def special_ids(tokenizer: Qwen2Tokenizer) -> tuple[int, int]:
    """(end of turn, padding)."""
    return tokenizer.encode(END_OF_TURN)[0], tokenizer.encode(PAD)[0]


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """An untrained model, the same on every machine."""
    torch.manual_seed(SEED)
    end, pad = special_ids(tokenizer)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,  # wide and shallow: learns the task, and is changed by a small learning rate, in few steps
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True)
    return model


def encode(tokenizer: Qwen2Tokenizer, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels): every question is six tokens long; only the answer is learned."""
    end, pad = special_ids(tokenizer)
    inputs, labels = [], []
    for left, right in pairs:
        prompt = tokenizer.encode(question(left, right), add_special_tokens=False)
        answer = [*tokenizer.encode(str(left + right), add_special_tokens=False), end]
        answer += [pad] * (4 - len(answer))
        inputs.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + [token if token != pad else IGNORED for token in answer])
    return torch.tensor(inputs), torch.tensor(labels)


@torch.inference_mode()
def accuracy(model: Qwen2ForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of questions whose every answer token is the likeliest one, which is greedy decoding's score."""
    predicted = model(input_ids=inputs).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    return ((predicted == wanted) | (wanted == IGNORED)).all(dim=1).float().mean().item()


def pretrain(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, report: Callable[[int, float], None] = lambda step, score: None
) -> None:
    """Train up to the target accuracy on the validation questions, which are never trained on."""
    train, validation = split()
    inputs, labels = encode(tokenizer, train)
    held_out = encode(tokenizer, validation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    shuffle = torch.Generator().manual_seed(SEED)
    for step in range(1, MAX_STEPS + 1):
        rows = torch.randint(len(inputs), (BATCH_SIZE,), generator=shuffle)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        model(input_ids=inputs[rows], labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % SCORE_EVERY == 0:
            score = accuracy(model, *held_out)
            report(step, score)
            if score >= TARGET_ACCURACY:
                break


def build(folder: Path, report: Callable[[int, float], None] = lambda step, score: None) -> None:
    """Train and save the base model in bfloat16; does nothing when it is there already."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, report)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")  # another run may be building it, too
    model.bfloat16().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # the other run was first; both models are the same
        shutil.rmtree(unfinished)


if __name__ == "__main__":
    build(Path(sys.argv[1]), lambda step, score: print(f"step {step}: accuracy {score:.3f}", flush=True))
