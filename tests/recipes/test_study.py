"""The study's plain GRPO loop, its recorder and its predictions, on a model small enough for seconds."""

import csv
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from studied import base, one_thread

# isort: split
from study import grpo, report, score, task, train
from study.grid import QUICK, SAMPLES, Run
from study.grpo import Grpo, advantages, policy_loss, sample

TINY = replace(QUICK, steps=5, cuts=(4,), targets={4: (5,)}, seeds=(1,))
RUN = Run(2e-3, 1)

__all__ = ["base", "one_thread"]


@pytest.fixture(scope="module")
def questions(base):
    train_questions, test_questions = task.load_questions(base)
    return task.Questions(*(one[:64] for one in train_questions)), task.Questions(*(one[:16] for one in test_questions))


def test_samples_end_with_padding_and_follow_the_models_probabilities(base, questions):
    policy = task.load_model(base)
    with torch.no_grad():
        policy.model.embed_tokens.weight.zero_()  # uniform over the vocabulary
    responses = sample(policy, questions[0].prompts, torch.Generator().manual_seed(0))
    assert responses.shape == (64, SAMPLES, 4)
    ended = (responses == policy.config.eos_token_id).cumsum(-1)[..., :-1] > 0
    assert (responses[..., 1:][ended] == policy.config.pad_token_id).all()
    assert len(responses[..., 0].unique()) > 150  # of 259


def test_sampling_with_shared_beginnings_is_sampling(base, questions):
    """The cache of shared rows gives the same distribution as a plain forward pass over the whole response."""
    policy, generator = task.load_model(base).float(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.model.embed_tokens.weight.mul_(40)  # far from uniform: a wrong row of the cache would show
    prompts = questions[0].prompts
    responses = sample(policy, prompts, generator)
    rows = torch.cat([prompts.unsqueeze(1).expand(-1, SAMPLES, -1), responses], -1).flatten(0, 1)
    logits = policy(input_ids=rows[:, :-1], logits_to_keep=4).logits.log_softmax(-1)
    log_prob = logits.gather(-1, rows[:, 6:].unsqueeze(-1)).squeeze(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    alive = rows[:, 6:] != policy.config.pad_token_id
    assert -log_prob[alive].mean().item() == pytest.approx(entropy[alive].mean().item(), rel=0.1)


def test_loss_counts_equal_responses_as_often_as_they_were_sampled(base, questions):
    policy = task.load_model(base).float()
    prompts = questions[0].prompts[:2]
    responses = questions[0].answers[:2].unsqueeze(1).repeat(1, SAMPLES, 1)
    responses[0, 3:, 0] = responses[0, 0, 1]
    given = advantages(torch.tensor([[1.0] * 3 + [0.0] * 5, [1.0] * 8]))
    loss = policy_loss(policy, prompts, responses, given)
    rows = torch.cat([prompts.unsqueeze(1).expand(-1, SAMPLES, -1), responses], -1).flatten(0, 1)
    log_prob = policy(input_ids=rows[:, :-1], logits_to_keep=4).logits.log_softmax(-1)
    log_prob = log_prob.gather(-1, rows[:, 6:].unsqueeze(-1)).squeeze(-1)
    mask = rows[:, 6:] != policy.config.pad_token_id
    plain = -(given.flatten().unsqueeze(1) * log_prob * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-4)


def test_an_update_moves_the_master_weights_and_the_policy_follows_in_bfloat16(base, questions):
    training = Grpo(base, questions[0], 1e-3, seed=1)
    before = {name: tensor.detach().clone() for name, tensor in training.master.tensors.items()}
    for parameter in training.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.update()
    for name, parameter in training.policy.named_parameters():
        assert not torch.equal(before[name], training.master.tensors[name])
        assert torch.equal(parameter, training.master.tensors[name].to(torch.bfloat16))


def test_a_run_is_recorded_predicted_and_scored(base, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "PROMPTS", 8)
    for module in (train, score):
        monkeypatch.setattr(module, "load_questions", lambda _: questions)
    done = []
    for _ in range(2):  # the second time all is there already
        train.train_run(RUN, TINY, base, tmp_path, done.append)
        score.score_run(RUN, TINY, base, tmp_path, done.append)
    assert sum(done) == 2 * (train.planned_steps(TINY) + score.planned_scores(TINY))
    with (tmp_path / RUN.name / "predictions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == score.COLUMNS
    assert len(rows) == score.planned_scores(TINY)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert all(float(row["bits_equal_to_product"]) > 0.99 for row in rows if row["bits_equal_to_product"])


def test_tables_are_filled_in_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table runs -->\nold\n<!-- end -->\nafter\n")
    report.fill(page, {"runs": "new"})
    assert page.read_text() == "before\n<!-- table runs -->\nnew\n<!-- end -->\nafter\n"
