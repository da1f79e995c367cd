"""RELEX's lines are on standard error once, whatever other libraries do to the root logger."""

import logging
import os
import subprocess
import sys

import pytest

import relex_verl.run

VERLS = "logging.basicConfig(level=logging.WARNING)"
VLLMS = f"{VERLS}; logging.getLogger().setLevel('ERROR'); logging.getLogger().handlers[0].setLevel('ERROR')"
SAID = "logging.getLogger('relex_verl').{level}('RELEX: scoring')"


def said(*code: str, level: str | None = None) -> tuple[str, str]:
    """Standard error, and standard output, of a process that does this."""
    env = os.environ | ({} if level is None else {"RELEX_LOGGING_LEVEL": level})
    lines = "; ".join(["import logging, sys", *code])
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, check=True, env=env
    )
    return done.stderr, done.stdout


@pytest.mark.parametrize(
    "root",
    [
        "pass",
        VERLS,
        VLLMS,
        "logging.getLogger().setLevel('ERROR')",
        "logging.getLogger().addHandler(logging.NullHandler())",
        "logging.getLogger().addHandler(logging.FileHandler('/dev/null'))",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_line_is_on_standard_error_once(root: str, first: bool) -> None:
    """Whether the root logger is set up before RELEX is imported or after."""
    ours = "import relex_verl.run"
    error, output = said(*((root, ours) if first else (ours, root)), SAID.format(level="info"))
    assert error.count("RELEX: scoring") == 1
    assert output == ""


def test_a_console_of_the_users_own_is_not_doubled() -> None:
    error, output = said("logging.basicConfig(stream=sys.stdout)", "import relex_verl.run", SAID.format(level="info"))
    assert (error, output.count("RELEX: scoring")) == ("", 1)


@pytest.mark.parametrize(("level", "shown"), [("warning", ["warning", "error"]), ("DEBUG", ["debug", "info"])])
@pytest.mark.parametrize("root", ["pass", VERLS, VLLMS])
def test_the_level_is_the_environments(level: str, shown: list[str], root: str) -> None:
    calls = [SAID.format(level=one).replace("scoring", one) for one in ("debug", "info", "warning", "error")]
    error, _ = said("import relex_verl.run", root, *calls, level=level)
    assert all(error.count(f"RELEX: {one}") == 1 for one in shown)
    assert ("RELEX: info" in error) == ("info" in shown)


def test_it_is_configured_once_and_the_root_logger_hears_it_too(caplog: pytest.LogCaptureFixture) -> None:
    relex_verl.run.logs.configure()
    logger = logging.getLogger("relex_verl")
    assert len(logger.handlers) == 1
    logger.info("RELEX: scoring")
    assert caplog.messages == ["RELEX: scoring"]
