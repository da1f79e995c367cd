"""The plugin inside `import verl`: it costs next to nothing there, and whatever breaks in it, verl does not."""

import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)


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
