import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from relex_verl.maths.extrapolators import METHODS
from relex_verl.run.config import ConfigError, Plan, RelexConfig
from relex_verl.run.plan import following, recording
from relex_verl.trajectory.kinds import AUTO_ROWS, KINDS

NAN, INFINITY = float("nan"), float("inf")


def test_an_empty_node_is_the_defaults():
    assert RelexConfig.from_mapping({}) == RelexConfig()
    plan = RelexConfig().plan(500)
    assert (plan.t_cut, plan.targets) == (75, [500])


def test_a_node_of_hydra_is_read_like_a_dict():
    node = {"t_cut": 40, "targets": [60, 1.0], "methods": ["relex", "hold"], "rank": 2, "output_dir": "/somewhere"}
    config = RelexConfig.from_mapping(OmegaConf.create(node))
    assert config == RelexConfig.from_mapping(node)
    assert (config.t_cut, config.targets, config.methods, config.rank) == (40, [60, 1.0], ["relex", "hold"], 2)
    assert type(config.targets) is list
    assert type(config.methods) is list


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("tcut", 40, "did you mean relex.t_cut?"),
        ("target", [40], "did you mean relex.targets?"),
        ("method", ["relex"], "did you mean relex.methods?"),
        ("zzzzzz", 1, "the keys are t_cut, targets, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key, value, hint):
    with pytest.raises(ConfigError, match=re.escape(f"relex.{key}={value!r}: unknown key; {hint}")) as caught:
        RelexConfig.from_mapping({key: value})
    assert caught.value.key == f"relex.{key}"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("t_cut", [0, 0.0, -1, -0.1, NAN, "40", None, True, [40]]),
        ("record", ["all", None, True]),
        ("targets", [[], 60, "60", {"a": 60}, None, [0], [-5], [NAN], ["60"], [None], [True], [60, 0]]),
        ("trajectory", ["fp16", "", None, 32, "BF16"]),
        ("quantization", ["int2", None, 8]),
        ("observe_every", [0, -1, 1.5, "5", "Auto", None, True, NAN, INFINITY]),
        ("methods", [[], "relex", None, ["relx"], [None], ["relex", "RELEX"]]),
        ("rank", [0, -1, 1.5, "1", None, True, NAN, INFINITY]),
        ("fit_from", [-1, 1.5, "1", None, True, INFINITY]),
        ("on_error", ["ignore", None, True]),
        ("output_dir", ["", None, 7]),
        ("validate_targets", ["true", 1, None]),
        ("window", [0, -1, 1.5, "5", None, True, NAN]),
        ("max_jumps", [0, -1, 1.5, "1", True]),
        ("jump_optimizer", ["drop", None, True]),
        ("jump_confidence", [0.4, 1, 1.0, "0.8", None, True, NAN]),
        ("jump_kl_max", [0, -0.1, "0.1", True, NAN]),
        ("jump_undo", ["true", 1, None]),
        ("score_metric", ["accuracy", "", "val-core/math", "val-core/math/acc/best@4", "val-core/math/acc/mean@4x", 3]),
        ("max_candidates", [0, 1.5, "6", None, INFINITY]),
        ("search_prompts", [0, 7, 64.5, "all", INFINITY]),
        ("confidence", [0.4, 1, 1.0, "0.95", None, NAN]),
        ("validation_timeout_s", [0, -1, "60", None, NAN]),
        ("on_cut", ["jump!", None, False]),
        ("recut_every", [0, 1.5, "20", None, NAN]),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(key, values):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            RelexConfig.from_mapping({key: value})
        assert caught.value.key == f"relex.{key}", value
        assert str(caught.value).startswith(f"relex.{key}="), value


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("t_cut", [0.15, 1, 40, 40.0]),
        ("targets", [[1.0], [0.5, 60], (60, 100)]),
        ("trajectory", ["fp32", "bf16"]),
        ("observe_every", ["auto", 1, 5, 5.0]),
        ("methods", [["relex"], list(METHODS)]),
        ("on_error", ["disable", "raise"]),
        ("on_cut", ["advise", "stop"]),
        ("recut_every", ["auto", 20]),
        ("confidence", [0.5, 0.95]),
        ("score_metric", [None, "val-core/openai/gsm8k/acc/mean@1", "val-aux/math/reward/mean@8"]),
    ],
)
def test_a_value_that_can_work_is_kept(key, values):
    for value in values:
        kept = getattr(RelexConfig.from_mapping({key: value}), key)
        assert kept == (list(value) if isinstance(value, tuple) else value)


def test_a_run_is_not_stopped_without_scores():
    with pytest.raises(ConfigError, match=r"set relex\.validate_targets=true") as caught:
        RelexConfig.from_mapping({"on_cut": "stop", "validate_targets": False})
    assert caught.value.key == "relex.on_cut"


def test_a_whole_number_written_as_a_float_is_an_int_afterwards():
    assert type(RelexConfig.from_mapping({"rank": 2.0}).rank) is int


@pytest.mark.parametrize(
    ("given_t_cut", "total", "t_cut"),
    [(0.15, 100, 15), (0.15, 500, 75), (0.999, 100, 100), (40, 100, 40), (40.0, 100, 40), (100, 100, 100), (0.5, 7, 4)],
)
def test_the_cut_is_a_share_below_one_and_a_step_from_one_on(given_t_cut, total, t_cut):
    assert RelexConfig(t_cut=given_t_cut, targets=[total + 50], trajectory="bf16").plan(total).t_cut == t_cut


@pytest.mark.parametrize(
    ("targets", "steps"),
    [
        ([1.0], [200]),
        ([1], [200]),  # one is the whole run, not the first step
        ([0.5, 1.0], [100, 200]),
        ([300, 60, 0.5], [60, 100, 300]),  # in order; beyond the end of the run too
        ([100, 0.5, 100.0], [100]),  # each once
    ],
)
def test_targets_are_shares_up_to_one_and_steps_above(targets, steps):
    resolved = RelexConfig(t_cut=50, targets=targets).plan(200).targets
    assert resolved == steps
    assert all(type(step) is int for step in resolved)


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"t_cut": 101}, "relex.t_cut", "the run has 100"),
        ({"t_cut": INFINITY}, "relex.t_cut", "whole numbers"),
        ({"t_cut": 20.5}, "relex.t_cut", "whole numbers"),
        ({"t_cut": 1}, "relex.t_cut", "leaves 1 observed step"),
        ({"t_cut": 3, "observe_every": 1, "methods": ["relex", "poly"]}, "relex.t_cut", "need 4"),
        ({"t_cut": 20, "observe_every": 50}, "relex.t_cut", "leaves 1 observed step"),
        ({"t_cut": 20, "observe_every": 1, "fit_from": 20}, "relex.t_cut", "leaves 1 observed step"),
        ({"t_cut": 5, "observe_every": 1, "rank": 6}, "relex.rank", "at most 5"),
        ({"t_cut": 20, "targets": [20]}, "relex.targets", "not after the cut at 20"),
        ({"t_cut": 20, "targets": [60, 0.1]}, "relex.targets", "resolves to step 10"),
        ({"t_cut": 100}, "relex.targets", "not after the cut at 100"),
        ({"t_cut": 20, "targets": [60.5]}, "relex.targets", "whole numbers"),
        ({"t_cut": 20, "targets": [INFINITY]}, "relex.targets", "whole numbers"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_the_run(changes, key, says):
    config = RelexConfig.from_mapping(changes)
    with pytest.raises(ConfigError, match=says) as caught:
        config.plan(100)
    assert caught.value.key == key


def test_hold_alone_needs_one_row_only():
    assert RelexConfig(t_cut=1, methods=["hold"]).plan(100).t_cut == 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 320))
def test_rows_are_every_nth_step_and_always_the_cut(t_cut, every, first):
    plan = Plan(t_cut, [t_cut + 1], every)
    observed = [step for step in range(1, t_cut + 50) if plan.observes(step)]
    assert observed == sorted({*range(every, t_cut + 1, every), t_cut})
    assert plan.rows == len(observed)
    assert plan.rows_from(first) == sum(step >= first for step in observed)


def test_the_next_cut_is_as_far_again_and_rare_rows_are_thinned_once():
    config = RelexConfig(t_cut=32, targets=[50, 64, 100, 400])
    first = config.plan(500, KINDS["fp32-int8"])
    second = following(config, first, 32, 500, KINDS["fp32-int8"])
    third = following(config, second, 32, 500, KINDS["fp32-int8"])
    assert first == Plan(32, [50, 64, 100, 400], 2)
    assert second == Plan(64, [100, 400], 8)
    assert third == Plan(96, [100, 400], 8)
    assert following(config, Plan(32, [50], 1), 32, 500, KINDS["bf16"]) == Plan(64, [128], 1)


@pytest.mark.parametrize(("total", "t_cut"), [(72, None), (73, 72), (500, 72)])
def test_there_is_no_next_cut_at_the_end_of_the_run(total, t_cut):
    config = RelexConfig(t_cut=32, recut_every=40, observe_every=3)
    plan = following(config, Plan(32, [500], 3), 32, total, KINDS["fp32-int8"])
    assert plan == (None if t_cut is None else Plan(t_cut, [500], 3))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 2000))
def test_auto_takes_each_step_for_bf16_and_about_16_rows_for_fp32(t_cut):
    config = RelexConfig(t_cut=t_cut, targets=[t_cut + 1])
    rows = config.plan(2000, KINDS["fp32-int8"]).rows
    assert min(t_cut, AUTO_ROWS) * 0.6 <= rows <= AUTO_ROWS * 1.5
    assert config.plan(2000, KINDS["bf16"]).rows == t_cut
    assert RelexConfig(t_cut=t_cut, targets=[t_cut + 1], observe_every=1).plan(2000, KINDS["fp32-int8"]).rows == t_cut


def test_the_folder_is_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RelexConfig(output_dir="~/runs/relex").folder == tmp_path / "runs/relex"
    assert RelexConfig(output_dir="runs").folder == tmp_path / "runs"


def test_a_sketch_takes_each_step_from_the_burn_in_on_and_fits_polynomials_only():
    config = RelexConfig.from_mapping(
        {"trajectory": "sketch", "t_cut": 60, "fit_from": 11, "methods": ["relex", "poly"]}
    )
    plan = config.plan(400)
    assert (plan.observe_every, plan.first, plan.rows) == (1, 11, 50)
    assert [step for step in range(1, 62) if plan.observes(step)] == list(range(11, 61))
    later = following(config, plan, 60, 400, KINDS["sketch-4"])
    assert (later.t_cut, later.first, later.observe_every) == (120, 11, 1)
    assert RelexConfig.from_mapping({"t_cut": 60, "fit_from": 11}).plan(400).first == 1


@pytest.mark.parametrize(
    ("node", "key", "cure"),
    [
        ({"methods": ["two-point"]}, "relex.methods", "use relex, raw-ols, poly"),
        ({"methods": ["poly"], "sketch_size": 3}, "relex.methods", "use relex, raw-ols"),
        ({"rank": 5}, "relex.rank", "holds no more directions"),
        ({"sketch_size": 7}, "relex.sketch_size", "from 2 to 6"),
        ({"sketch_size": 1}, "relex.sketch_size", "from 2 to 6"),
    ],
)
def test_what_a_sketch_cannot_give_is_refused(node, key, cure):
    with pytest.raises(ConfigError, match=cure) as caught:
        RelexConfig.from_mapping({"trajectory": "sketch", **node})
    assert caught.value.key == key


def test_a_run_that_jumps_has_a_window_for_each_cut() -> None:
    config = RelexConfig.from_mapping({"on_cut": "jump", "t_cut": 30, "window": 20, "observe_every": 10})
    first = config.plan(100)
    assert first == Plan(30, [45], 10, 1, 0)
    second = following(config, first, 30, 100, config.kind)
    assert second == Plan(50, [60], 10, 31, 30)
    assert [step for step in range(100) if second.observes(step)] == [40, 50]
    third = following(config, second, 30, 70, config.kind)
    assert third is None  # the run ends there
    assert config.plan(100, KINDS["sketch-4"]).first == 1
    assert following(RelexConfig(on_cut="jump"), first, 30, 100, config.kind).t_cut == 60


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"window": 20}, "relex.window=20: only relex.on_cut=jump reads it, and relex.on_cut=advise"),
        ({"jump_kl_max": 0.1}, "relex.jump_kl_max=0.1: only relex.on_cut=jump reads it, and relex.on_cut=advise"),
        ({"jump_undo": False, "on_cut": "stop"}, "relex.jump_undo=False: only relex.on_cut=jump reads it"),
        ({"on_cut": "jump", "trajectory": "bf16"}, "relex.trajectory='bf16': a jump sets the float32 master weights"),
        ({"on_cut": "jump", "targets": [60]}, "relex.targets=[60]: leave it out with relex.on_cut=jump: horizons"),
        (
            {"on_cut": "jump", "recut_every": 5},
            "relex.recut_every=5: leave it out with relex.on_cut=jump: relex.window",
        ),
        (
            {"on_cut": "jump", "validate_targets": False},
            "relex.on_cut='jump': RELEX stops a run or jumps on validation",
        ),
    ],
)
def test_what_a_jump_needs_and_what_needs_a_jump(node, says) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        RelexConfig.from_mapping(node)


def test_a_window_too_short_for_the_methods_is_refused() -> None:
    config = RelexConfig.from_mapping({"on_cut": "jump", "t_cut": 30, "window": 2, "observe_every": 2})
    with pytest.raises(ConfigError, match=r"relex\.window=2: leaves 1 observed steps"):
        config.plan(100)


def test_a_run_is_recorded_to_its_last_step() -> None:
    config = RelexConfig.from_mapping({"record": "run", "t_cut": 45, "trajectory": "bf16"})
    rows = recording(config, 300, config.kind)
    assert (rows.observe_every, rows.rows_after(0), rows.rows_after(45), rows.rows_after(300)) == (1, 300, 255, 0)
    assert [step for step in range(302) if rows.observes(step)][-3:] == [298, 299, 300]
    fp32 = KINDS["fp32-int8"]  # as densely as up to the cut; without a cut as for the usual one
    for t_cut in (45, 0.15, None):
        config = RelexConfig.from_mapping({"record": "run", "t_cut": t_cut})
        assert recording(config, 300, fp32).observe_every == fp32.spacing(45) == 3
    rare = recording(RelexConfig.from_mapping({"record": "run", "observe_every": 7}), 30, fp32)
    assert [step for step in range(1, 40) if rare.observes(step)] == [7, 14, 21, 28, 30]
    assert recording(RelexConfig(), 300, fp32) is None


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"trajectory": "sketch"}, "relex.record='run': a sketch keeps no single row"),
        ({"record": "window", "t_cut": None}, "relex.t_cut=None: without a cut there is nothing to do but to record"),
        ({"t_cut": None, "on_cut": "jump"}, "relex.on_cut='jump': only a cut reads it, and relex.t_cut=null"),
        ({"t_cut": None, "targets": [60]}, "relex.targets=[60]: only a cut reads it"),
        ({"t_cut": None, "rank": 2}, "relex.rank=2: only a cut reads it"),
    ],
)
def test_what_cannot_be_recorded(node, says) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        RelexConfig.from_mapping({"record": "run", **node})
