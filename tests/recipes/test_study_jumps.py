"""The study of jumps: its arms on a model small enough for seconds, and its tables from records."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("transformers")
from studied import base, one_thread

# isort: split
from study import __main__ as command
from study import grpo, jumping, peers, task, three_digit, through_verl
from study.grpo import Batch, Grpo, advantages, policy_loss
from study.jump_report import below_table, jump_tables, loop_rows, loop_table, verl_rows
from study.jumping import QUICK, Arm, Jumper, JumpRun, QuestionScores, jump_run
from study.peers import Merged
from study.train import flat_weights

from relex_verl.maths.extrapolators import Prediction

TINY = replace(QUICK, steps=7, window=3, score_every=3)

__all__ = ["base", "one_thread"]


@pytest.fixture(scope="module")
def loaded(base):
    return tuple(one.part(slice(64)) for one in task.load_questions(base))


@pytest.fixture(autouse=True)
def questions(loaded, monkeypatch):
    monkeypatch.setattr(grpo, "PROMPTS", 8)
    monkeypatch.setitem(jumping.TASKS, "two-digit", lambda _: loaded)
    return loaded


def batch_of(training):
    """Right answers for half of the samples: a gradient there is."""
    rows = torch.arange(8)
    answers = training.train.answers[rows].unsqueeze(1).repeat(1, grpo.SAMPLES, 1)
    answers[:, ::2, 0] = answers[:, 1::2, 1]
    right = (answers == training.train.answers[rows].unsqueeze(1)).all(-1).float()
    return Batch(training.train.prompts[rows], answers, right)


def test_the_first_update_on_a_batch_is_the_plain_one_and_later_ones_are_clipped(base, questions):
    training = Grpo(base, questions[0], 1e-3, seed=1)
    batch = batch_of(training)
    policy_loss(training.policy, batch.prompts, batch.responses, advantages(batch.rewards)).backward()
    expected = torch.cat([one.grad.flatten().float() for one in training.policy.parameters()])
    training.policy.zero_grad()
    merged = Merged(training, batch)
    found = merged.update(training)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999
    assert found.norm() == pytest.approx(expected.norm().item(), rel=0.02)
    for _ in range(3):
        merged.update(training)
    # Sample by sample, as PPO writes it: most ratios are outside by now.
    rows = torch.cat([batch.prompts.unsqueeze(1).expand(-1, grpo.SAMPLES, -1), batch.responses], -1).flatten(0, 1)
    old_policy = task.load_model(base)
    mask = rows[:, 6:] != training.policy.config.pad_token_id

    def log_prob(policy):
        logits = policy(input_ids=rows[:, :-1], logits_to_keep=4).logits.float().log_softmax(-1)
        return logits.gather(-1, rows[:, 6:].unsqueeze(-1)).squeeze(-1)

    with torch.no_grad():
        old = log_prob(old_policy)
    ratio, given = (log_prob(training.policy) - old).exp(), advantages(batch.rewards).flatten().unsqueeze(1)
    gain = torch.minimum(ratio * given, ratio.clamp(0.8, 1.2) * given)
    (-(gain * mask).sum() / mask.sum()).backward()
    expected = torch.cat([one.grad.flatten().float() for one in training.policy.parameters()])
    training.policy.zero_grad()
    assert ((ratio - 1).abs() > 0.2)[mask].float().mean() > 0.3
    assert torch.nn.functional.cosine_similarity(merged.update(training), expected, dim=0) > 0.99


def test_sfpo_goes_back_and_gxpo_part_of_the_way(base, questions, monkeypatch):
    """By hand, update by update, from the same start on the same batch."""
    for step, updates, moved in (
        (peers.sfpo_step, 3, lambda start, end: start + 0.8 * (end - start)),
        (peers.gxpo_step, 2, lambda start, end: start + 0.5 * (end - start)),
    ):
        monkeypatch.setattr(peers, "GXPO_STEPS", 2)  # S_2 / S_2: no further than the two updates
        by_rule, by_hand = (Grpo(base, questions[0], 1e-4, seed=1) for _ in range(2))
        batch = batch_of(by_hand)
        monkeypatch.setattr(by_rule, "sampled", lambda batch=batch: batch)
        step(by_rule)
        merged, start = Merged(by_hand, batch), flat_weights(by_hand)
        for _ in range(updates):
            merged.update(by_hand)
        by_hand.set_master(moved(start, flat_weights(by_hand)))
        merged.update(by_hand)
        assert torch.equal(flat_weights(by_rule), flat_weights(by_hand))


def test_gates_close_for_good_by_the_z_score_and_the_passes_say_so():
    """Against a z-score by numpy, step by step: SFPO's with the newest value in its window, GXPO's without."""
    values = np.random.default_rng(0).normal(size=200)
    for name in ("sfpo", "gxpo"):
        rule, gate = peers.RULES[name], peers.RULES[name].gate()
        for step, value in enumerate(values, 1):
            if gate.closed is None:
                gate.watch(step, value)
        ends = range(peers.GATE_WINDOW + (not rule.counts_itself), len(values) + 1)
        windows = {end: values[end - 30 : end] if rule.counts_itself else values[end - 31 : end - 1] for end in ends}
        over = [end for end, one in windows.items() if values[end - 1] >= one.mean() + rule.threshold * one.std()]
        assert gate.closed == over[0] == len(gate.values)
    open_gate = peers.RULES["sfpo-open"].gate()
    for step, value in enumerate(values, 1):
        open_gate.watch(step, value)
    assert open_gate.closed is None
    known = {"arm": "sfpo", "learning_rate": 1.0, "seed": 1, "backward_passes_a_step": 4}
    record = {**known, "accuracy": {"30": 0.5, "50": 0.5}, "cost": {"30": 30, "50": 50}, "gate": {"closed": 40}}
    assert [row["backward_passes"] for row in loop_rows([record])] == [120, 4 * 40 + 10]


def test_the_entropy_is_the_mean_over_all_tokens_of_the_samples(base, questions):
    training = Grpo(base, questions[0], 1e-3, seed=1)
    batch = training.sampled()
    rows = torch.cat([batch.prompts.unsqueeze(1).expand(-1, grpo.SAMPLES, -1), batch.responses], -1).flatten(0, 1)
    with torch.no_grad():
        chances = training.policy(input_ids=rows[:, :-1]).logits.float()[:, 5:].softmax(-1)
    entropy = torch.distributions.Categorical(chances).entropy()
    expected = entropy[rows[:, 6:] != training.policy.config.pad_token_id].mean().item()
    assert Merged(training, batch).entropy() == pytest.approx(expected, rel=1e-3)


def test_a_jump_is_the_products_prediction_and_an_undone_one_leaves_no_trace(base, questions, monkeypatch):
    training = Grpo(base, questions[0], 1e-3, seed=1)
    jumper = Jumper(training, "keep", 3, questions[1])
    for _ in range(3):
        training.step()
        jumper.observe()
    assert len(jumper.deltas) == 3
    straight = jumper._predicted(jumper._rows(), Prediction("two-point", 6))
    assert torch.allclose(straight, jumper.start + 2 * jumper.deltas[-1], atol=1e-6)
    before, state = flat_weights(training), training.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    goodness = iter([False, True, False, False, False, False, False, False])  # observed, first candidate, the others
    monkeypatch.setattr(Jumper, "_score", lambda self: QuestionScores([next(goodness)] * 64))
    assert jumper.cut(3)["action"] == "jump"
    assert not torch.equal(flat_weights(training), before)
    training.step()
    jumper.observe()
    jumper.kept = (*jumper.kept[:2], QuestionScores([True] * 64), 3)
    monkeypatch.setattr(Jumper, "_score", lambda self: QuestionScores([False] * 64))
    assert jumper.cut(4) == {"step": 4, "action": "undo", "scores": 1}
    assert torch.equal(flat_weights(training), before)
    assert torch.equal(training.optimizer.state_dict()["state"][0]["exp_avg"], state)


def test_arms_run_are_skipped_when_done_and_make_tables(base, tmp_path):
    done = []
    for _ in range(2):
        for arm in (Arm("plain"), Arm("jump", jump="keep"), Arm("reground", jump="reground")):
            jump_run(JumpRun(arm, 1e-3, 1), TINY, base, tmp_path / "loop", done.append)
    assert sum(done) == 2 * 3 * TINY.steps
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "loop").glob("*/run.json")}
    jumped = found["lr0.001-seed1-jump"]
    assert [cut["step"] for cut in jumped["cuts"]] == [3, 6]
    scores = sum(cut["scores"] for cut in jumped["cuts"])
    assert jumped["cost"]["6"] == 6 + scores * 32 / (grid_samples())
    assert [cut["target"] for cut in found["lr0.001-seed1-reground"]["cuts"]] == [6, 9]
    assert {row["arm"] for row in loop_rows(found.values())} == {"plain", "ema", "bema", "jump", "reground"}
    tables = jump_tables(tmp_path, tmp_path / "results")
    assert list(tables) == ["jumps", "jumps_below"]
    assert (
        len(pd.read_csv(tmp_path / "results" / "jumps.csv")) == 3 * 3 + 2 * 2
    )  # the averages begin with the first step


def grid_samples():
    """Samples of a training step, as the costs count them."""
    return jumping.PROMPTS * jumping.SAMPLES


def test_what_verls_runs_cost_counts_every_score_before_the_step(tmp_path):
    cut = {"step": 20, "samples": 1536, "after": {"unseen": 0.7, "validation": 0.6}}
    known = {"learning_rate": 6e-7, "seed": 1, "samples_a_step": 128}
    score = {"unseen": 0.5, "validation": 0.4}
    jump = {**known, "jump": True, "accuracy": {"20": score, "25": score}, "cuts": [cut, {**cut, "after": None}]}
    rows = verl_rows([{**known, "jump": False, "accuracy": {"200": score}}, jump])
    found = [(row["arm"], row["step"], row["cost_in_steps"]) for row in rows]
    assert found == [("plain", 200, 200), ("jump", 20, 20), ("jump", 25, 49), ("jumped", 20, 44)]


def test_verls_runs_are_the_quickstarts_with_rate_and_seed(tmp_path):
    plain, jump = through_verl.queue()[:2]
    assert (plain.name, jump.name) == ("lr6e-07-seed1-plain", "lr6e-07-seed1-jump")
    options = through_verl.overrides(plain, Path("base"), tmp_path)
    assert not [option for option in options if "relex." in option or "+relex" in option]
    assert "trainer.total_training_steps=200" in options
    options = through_verl.overrides(jump, Path("base"), tmp_path)
    assert {"relex.on_cut=jump", "relex.t_cut=20", "+relex=default", "data.seed=1"} <= set(options)
    through_verl.write_data(tmp_path)
    sizes = [len(pd.read_parquet(tmp_path / f"{name}.parquet")) for name in ("train", "val")]
    assert sizes == [7588, 256]


def test_three_digit_questions_are_longer_and_train_by_the_same_loop(base, tmp_path, monkeypatch):
    monkeypatch.setattr(three_digit, "TRAINING_SIZE", 64)
    monkeypatch.setattr(three_digit, "TEST_SIZE", 32)
    monkeypatch.setattr(three_digit, "MAX_STEPS", 2)
    train, test = three_digit.load_questions(base)
    assert (train.prompts.shape, train.answers.shape, len(test.prompts)) == ((64, 8), (64, 5), 32)
    assert not set(map(tuple, train.prompts.tolist())) & set(map(tuple, test.prompts.tolist()))
    three_digit.build(tmp_path / "harder", base)
    three_digit.build(tmp_path / "harder", tmp_path / "not read again")
    three_digit_grid = replace(TINY, steps=3, task="three-digit")
    run = JumpRun(Arm("gxpo", "gxpo"), 1e-3, 1)
    jump_run(run, three_digit_grid, tmp_path / "harder", tmp_path / "jump" / "loop-three-digit", lambda _: None)
    assert three_digit_grid.has(tmp_path / "jump" / "loop-three-digit" / run.name / "run.json")
    assert not TINY.has(tmp_path / "jump" / "loop-three-digit" / run.name / "run.json")  # 7 steps
    assert "gxpo" in jump_tables(tmp_path / "jump", tmp_path / "results")["jumps_three_digit"]


def test_a_run_far_below_its_plain_twin_is_listed():
    known = {"learning_rate": 1.0, "cost": {"5": 5, "9": 9}, "backward_passes_a_step": 1}
    found = [
        {**known, "seed": 1, "arm": "plain", "accuracy": {"5": 0.5, "9": 0.6}},
        {**known, "seed": 1, "arm": "jump", "accuracy": {"5": 0.3, "9": 0.59}},  # 1.0 at the end: not far
        {**known, "seed": 1, "arm": "sfpo", "accuracy": {"5": 0.48}},  # ended earlier: with the plain one at that step
        {**known, "seed": 2, "arm": "sfpo", "accuracy": {"5": 0.1}},  # no twin
    ]
    runs = pd.DataFrame(loop_rows(found))
    table = below_table({"loop": runs})
    assert table.startswith("1 of 2 runs.")
    assert table.endswith("| loop | 1 | 1 | sfpo | 5 | 0.480 | 0.500 | -2.0 |")
    assert "| 1 | sfpo | 2 | 0.290 ± 0.269 | -2.0 | 5 steps | 5 |  |" in loop_table(runs, (5,))


def test_the_command_trains_what_is_asked_for_and_publishes_what_is_there(base, tmp_path, monkeypatch, capsys):
    arguments = ["study", "--jump", "--out", str(tmp_path), "--only", "lr6e-07-seed[12]-jump", "--dry-run"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [f"lr6e-07-seed{seed}-jump" for seed in (1, 2, 1, 2)]
    monkeypatch.setattr("sys.argv", [*arguments, "--task", "three-digit", "--steps", "50"])
    command.main()
    printed = capsys.readouterr().out
    assert "50 training steps" in printed
    assert "loop-three-digit" in printed
    page = tmp_path / "page" / "RESULTS.md"
    page.parent.mkdir()
    page.write_text("<!-- table jumps_below -->\n<!-- end -->\n")
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["study", "--jump", "--out", str(tmp_path), "--phase", "report", "--publish"])
    command.main()
    assert "None of 0 runs." in page.read_text()
