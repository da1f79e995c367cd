"""The plugin inside `import verl`: it costs next to nothing there, and whatever breaks in it, verl does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relex_verl.verl_plugin.registration import MADE_FOR

WARNING = f"was made for verl {MADE_FOR}"


def python(code: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it.

    Args:
        code: of Python.
        first: folder in which Python looks before all others.
    """
    path = os.pathsep.join(filter(None, [str(first or ""), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def metadata_of_verl(folder: Path, version: str) -> Path:
    """A folder that makes Python believe that verl is of this version."""
    distribution = folder / f"verl-{version or '0'}.dist-info"
    distribution.mkdir()
    line = f"Version: {version}\n" if version else ""
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: verl\n{line}")
    return folder


def test_importing_verl_loads_nothing_of_ours_but_the_hooks() -> None:
    loaded = python("import sys, verl; print(*[name for name in sys.modules if name.startswith('relex_verl')])").stdout
    assert sorted(loaded.split()[-3:]) == [
        "relex_verl",
        "relex_verl.verl_plugin",
        "relex_verl.verl_plugin.registration",
    ]
    assert loaded.count("relex_verl.") == 2


def test_importing_the_plugin_loads_no_library() -> None:
    code = "import sys, relex_verl.verl_plugin; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code).stdout.split()}
    assert not loaded & {"torch", "numpy", "matplotlib", "omegaconf", "hydra", "verl", "ray"}


@pytest.mark.parametrize(
    ("missing", "imported"),
    [
        ("relex_verl.verl_plugin.trainer", "verl.trainer.ppo.v1"),
        ("relex_verl.run.config", "hydra.core.config_store"),
    ],
)
def test_a_hook_that_fails_says_so_and_verl_imports(missing: str, imported: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import verl, {imported}; print('imported')"
    done = python(code)
    assert "imported" in done.stdout
    assert "relex-verl could not be loaded; +relex=... will not work" in done.stderr
    assert "Traceback" in done.stderr
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr


WARN_TWICE = "from relex_verl.verl_plugin.registration import warn_of_another_verl as warn; warn(); warn()"


@pytest.mark.parametrize(("version", "times"), [(MADE_FOR, 0), (f"{MADE_FOR}+ours", 0), ("0.10.0", 1), ("", 1)])
def test_another_verl_is_warned_of_once(tmp_path: Path, version: str, times: int) -> None:
    said = python(WARN_TWICE, metadata_of_verl(tmp_path, version)).stderr
    assert said.count(WARNING) == times
    assert (f"this is verl {version or '?'}:" in said) == bool(times)
    assert (f"Install verl=={MADE_FOR}" in said) == bool(times)


def test_a_verl_without_metadata_is_warned_of_and_raises_nothing() -> None:
    said = python(
        f"import sys, relex_verl.verl_plugin; {WARN_TWICE.replace(' warn();', ' sys.path.clear(); warn();', 1)}"
    )
    assert said.stderr.count(WARNING) == 1


def test_the_warning_comes_with_the_trainers_and_not_with_verl(tmp_path: Path) -> None:
    code = "import sys, verl; print('verl is there', file=sys.stderr, flush=True); import verl.trainer.ppo.v1"
    said = python(code, metadata_of_verl(tmp_path, "0.10.0")).stderr
    before, _, after = said.partition("verl is there")
    assert WARNING not in before
    assert after.count(WARNING) == 1
    assert "could not be loaded" not in after


def test_the_early_check_warns_the_user_of_relex(tmp_path: Path) -> None:
    code = """if True:
        from omegaconf import OmegaConf
        from relex_verl.verl_plugin.early_check import EarlyCheck
        EarlyCheck().on_job_start(OmegaConf.create({"relex": {"tcut": 40}}))
    """
    with pytest.raises(subprocess.CalledProcessError) as refused:
        python(code, metadata_of_verl(tmp_path, "0.10.0"))
    warned, _, refusal = refused.value.stderr.partition("relex-verl: ")
    assert WARNING in warned
    assert "did you mean relex.t_cut" in refusal


def test_with_verl_a_line_of_ours_is_there_once_also_when_the_root_logger_has_been_silenced() -> None:
    """In every process that RELEX has a part in, the ranks' among them, as vLLM's server module silences it."""
    code = """if True:
        import logging, verl, relex_verl.run.rank
        logger = logging.getLogger("relex_verl")
        logger.info("RELEX: before")
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.ERROR)
        logger.info("RELEX: after")
    """
    said = python(code).stderr
    assert (said.count("RELEX: before"), said.count("RELEX: after")) == (1, 1)
