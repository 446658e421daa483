"""Every command and snippet that README, docs and CONTRIBUTING show is run, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from calset.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<skip><!-- not run here[^>]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)


def snippets(page: Path) -> list[tuple[str, str]]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(m["language"], m["code"]) for m in found if m["language"] in ("bash", "python") and not m["skip"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    environment = dict(os.environ, CALSET_ENGINE="transformers", PYTHONPATH=str(tmp_path))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("CALSET_CATALOG", None)
    for language, code in snippets(page):
        runner = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*runner, code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"


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
