"""The documents: every command in them is one that the command line takes, every file and page they name is there."""

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from outrider.cluster.cli.main import app
from outrider.configs.loader import load_config, load_training, preset_names, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIG, RECIPE = preset_names(), recipe_names()


def commands(page: Path) -> list[str]:
    """Lines of fenced blocks that begin with `outrider`, without comments; a backslash goes on in the next line."""
    blocks = re.findall(r"^```(?:sh|console|bash)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?outrider ", line)]


CASES = [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", CASES)
def test_the_command_line_takes_it(line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    words = [word.strip("[]") if word.startswith("[") and word.endswith("]") else word for word in words]
    command, context = get_command(app), click.Context(get_command(app), info_name="outrider")
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    # Unknown options, wrong choices and missing arguments end here.
    parsed = command.make_context(command.name, words, parent=context.parent).params
    config, overrides = parsed.get("config"), parsed.get("overrides") or ()
    if config in CONFIG and command.name != "train":
        load_config(config, overrides)
    if config in RECIPE and command.name == "train":
        load_training(config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target
