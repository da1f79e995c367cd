"""What the pages promise can be checked without running it: length, links, settings, and which commands are run."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from documentation import DOCS, PACKAGE, PAGES, README, ROOT, commands, is_run, prose
from test_architecture import FLOOR_OF
from typer.testing import CliRunner

from relex_verl.cli import COMMANDS, app
from relex_verl.maths.extrapolators import METHODS
from relex_verl.run.config import ConfigError, RelexConfig

RECIPES = sorted(ROOT.glob("recipes/*/README.md"))
MOST_WORDS, LONGEST_LINE = 700, 119


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= MOST_WORDS


def test_every_page_is_there() -> None:
    assert {page.stem for page in DOCS} == {
        "settings",
        "cost",
        "failure",
        "recording",
        "trust",
        "offline",
        "formats",
        "architecture",
    }
    assert [page for page in PAGES if not page.is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_long(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: "/".join(page.parts[-2:]))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# `relex.t_cut=0.15`, and more\n")
    page.write_text("# Here\n[a](other.md) [b](other.md#relext_cut015-and-more) [c](#here) [d](https://x.org)\n")
    assert broken_links(page) == []
    page.write_text("# Here\n[a](gone.md) [b](other.md#less) [c](#there)\n```\n[e](code.md)\n```\n")
    assert broken_links(page) == ["gone.md", "other.md#less", "#there"]


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s:]+)\)", README.read_text())}
    assert {page.resolve() for page in PAGES} - linked == {README.resolve()}


# ---------------------------------------------------------------- commands


def test_every_command_is_run_by_a_test() -> None:
    others = [command for command in commands() if not is_run(command)]
    assert others == ["bash tests/run.sh"]  # which runs this very test


def test_the_offline_page_names_every_command() -> None:
    known = set(COMMANDS)
    table = re.findall(r"^\| `([a-z]+)` \|", (PACKAGE / "docs/offline.md").read_text(), flags=re.MULTILINE)
    assert sorted(table) == sorted(known)
    for command in table:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


# ---------------------------------------------------------------- settings


def documented_settings() -> dict[str, object]:
    """key -> default, from the headings of the page."""
    headings = re.findall(r"^### `relex\.(\w+)=(.*)`$", (PACKAGE / "docs/settings.md").read_text(), flags=re.MULTILINE)
    assert len({key for key, _ in headings}) == len(headings)
    return {key: yaml.safe_load(default) for key, default in headings}


def test_the_settings_page_lists_every_key_with_its_default() -> None:
    assert documented_settings() == asdict(RelexConfig())


def test_the_readmes_settings_are_five_of_them() -> None:
    rows = re.findall(r"^\| `relex\.(\w+)` \| (\S+) \|", README.read_text(), flags=re.MULTILINE)
    documented = documented_settings()
    assert len(rows) == 5
    assert {key: yaml.safe_load(default) for key, default in rows} == {key: documented[key] for key, _ in rows}


def test_the_settings_page_lists_every_method() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (PACKAGE / "docs/settings.md").read_text(), flags=re.MULTILINE)
    assert [row for row in rows if row in METHODS] == list(METHODS)


@pytest.mark.parametrize(
    ("key", "values"), [("trajectory", ["fp32", "bf16", "sketch"]), ("on_cut", ["advise", "stop"])]
)
def test_the_settings_page_names_what_a_key_takes(key: str, values: list[str]) -> None:
    text = (PACKAGE / "docs/settings.md").read_text().split(f"### `relex.{key}=")[1].split("\n### ")[0]
    with pytest.raises(ConfigError) as refusal:
        RelexConfig.from_mapping({key: "nonsense"})
    for value in values:
        assert f"`{value}`" in text
        assert value in str(refusal.value)


# ---------------------------------------------------------------- for contributors


def test_the_architecture_page_draws_the_floors() -> None:
    table = (PACKAGE / "docs/architecture.md").read_text()
    rooms = re.findall(r"^\| (\d) \| `(\w+)/` \|", table, flags=re.MULTILINE)
    assert {room: int(floor) for floor, room in rooms} == FLOOR_OF


def test_the_hooks_run_what_every_commit_has_to_pass() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    assert repository["repo"] == "local"  # the versions of .venv, not of a mirror
    assert all(entry.startswith(".venv/bin/") for entry in entries.values())
    checked = re.findall(r"^\.venv/bin/(ruff format|ruff|mypy)", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert {one.replace(" ", "-") for one in checked} | {"shellcheck"} == set(entries)


@pytest.mark.parametrize("name", ["bug", "support"])
def test_an_issue_form_is_one(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
