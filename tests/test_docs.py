"""Every command and snippet of README, docs and CONTRIBUTING is run in order, each page in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import warm

from calset import bundled
from calset.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESUMING = {"catalog.md", "hub.md", "pruning.md", "selection.md"}  # the others build what they show
FENCE = re.compile(r"(?P<skip><!-- not run here[^>]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)


def snippets(page: Path) -> list[tuple[str, str]]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(m["language"], m["code"]) for m in found if m["language"] in ("bash", "python") and not m["skip"]]


@pytest.fixture(scope="module")
def demo_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog in which the pages that build ``demo`` in passing find their traces."""
    folder = tmp_path_factory.mktemp("docs")
    asked = ("--problems", "demo", "--limit", "40", "--samples", "3", "--max-tokens", "300", "--json")
    done = warm.calset("build", "--model", bundled.MODEL, *asked, cwd=folder, CALSET_ENGINE="transformers")
    assert json.loads(done.stdout)["n_new"] == 120
    return folder / "calset.duckdb"


def show(page: Path, folder: Path, shell_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Run what a page shows in a folder, with programs from ``shell_path`` and snippets of Python by ``python``."""
    environment = dict(os.environ, CALSET_ENGINE="transformers", PYTHONPATH=os.pathsep.join(map(str, (folder, ROOT))))
    environment["PATH"] = f"{shell_path}{os.pathsep}{environment['PATH']}"
    environment.pop("CALSET_CATALOG", None)
    for language, code in snippets(page):
        if language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        else:
            done = python("-c", code, cwd=folder, env=environment)
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, demo_catalog: Path, tmp_path: Path) -> None:
    if page.name in RESUMING:
        shutil.copy(demo_catalog, tmp_path)
    show(page, tmp_path, warm.warm().programs(), partial(warm.warm().run, "python"))


@pytest.mark.slow
def test_a_page_runs_in_interpreters_that_nothing_has_warmed(tmp_path: Path) -> None:
    def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)

    show(ROOT / "docs" / "import.md", tmp_path, Path(sys.executable).parent, python)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_is_documented(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert all(o.help or isinstance(o, click.Argument) or o.name in SELF_EXPLAINING for o in command.params)
    shown = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"calset {name}" in shown


SELF_EXPLAINING = {"seed", "out", "limit", "tokens", "propagate"}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
