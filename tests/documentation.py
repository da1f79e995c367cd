"""The pages that users read, and the commands that they promise."""

import re
from pathlib import Path

import relex_verl

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(relex_verl.__file__).parent
README = ROOT / "README.md"
DOCS = sorted((PACKAGE / "docs").glob("*.md"))
PAGES = [README, *DOCS, PACKAGE / "CHANGELOG.md", ROOT / ".github/CONTRIBUTING.md"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line of the README's and the docs' `bash` blocks, once, the README's first."""
    text = "".join(block for page in (README, *DOCS) for block in blocks(page, "bash"))
    lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(re.sub(r"\s+", " ", line) for line in lines if line))


def is_run(command: str) -> bool:
    """Whether tests/integration/test_quickstart.py runs it: the quickstart, and what is made of its trajectory."""
    return command.startswith(("bash recipes/quickstart/run.sh", ".venv/bin/relex-verl "))
