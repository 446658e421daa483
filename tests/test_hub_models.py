"""Models of the Hub, over HTTP from a Hub of our own: which commit is loaded, recorded and stayed at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ScriptedEngine
from local_hub import Client, LocalHub

from calset.builder.build import BuildReport
from calset.catalog.records import Run
from calset.errors import BuildWarning, InputError

SUMS = "gym:chain_sum?min_terms=2&max_terms=3&size=2&seed=3"
NAME = "org/lrm"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def built(model: str, path: Path, **options: Any) -> tuple[BuildReport, list[Run], list[str]]:
    """Runs in the client's process: a build's report, the catalog's runs, and what was warned of.

    A double stands for the engine unless another is named: it loads no weights.
    """
    import calset

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = {"samples": 1, "max_tokens": 12, "engine": ScriptedEngine(""), "graded": False, **options}
        report = calset.build(model, SUMS, catalog=path, **asked)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, BuildWarning)]
    return report, calset.Catalog(path).runs(), said


def planned(model: str, path: Path) -> Any:
    import calset

    return calset.dry_run(model, SUMS, samples=1, max_tokens=12, catalog=path)


def evaluated(model: str, path: Path) -> Any:
    import calset

    return calset.evaluate(model, SUMS, max_tokens=12, catalog=path, engine="transformers")


def judged(model: str, path: Path) -> Any:
    import calset

    return calset.judge(path, model, engine="transformers")


def imported(model: str, path: Path, file: Path) -> list[Run]:
    import calset

    calset.import_traces(model, str(file), catalog=path)
    return calset.Catalog(path).runs()


def source_to_prune(model: str) -> tuple[str, str, bytes]:
    from calset.pruning.model.checkpoint import open_source

    source = open_source(model)
    return source.name, source.revision, (source.folder / "model.safetensors").read_bytes()


@pytest.fixture
def moved(hub: LocalHub, tiny_model: Path, altered_model: Path) -> tuple[str, str]:
    """A model at a commit with the tag v1, and the commit with other weights that its branch is at now."""
    hub.repos.pop(("model", NAME), None)
    old = hub.commit(NAME, files_of(tiny_model), kind="model")
    hub.repos["model", NAME].tags["v1"] = old
    return old, hub.commit(NAME, files_of(altered_model), kind="model")


def test_a_build_goes_on_at_its_commit_when_the_branch_moves(
    hub: LocalHub, tiny_model: Path, altered_model: Path, tmp_path: Path
) -> None:
    hub.repos.pop(("model", NAME), None)
    old = hub.commit(NAME, files_of(tiny_model), kind="model")
    path = tmp_path / "c.duckdb"
    with hub.client(tmp_path / "home") as client:
        began, (run,), said = client(built, NAME, path)
        assert (began.n_new, began.model, began.model_revision, said) == (2, NAME, old, [])
        assert (run.model, run.model_revision, run.model_path) == (NAME, old, None)
        new = hub.commit(NAME, files_of(altered_model), kind="model")
        again, _, said = client(built, NAME, path)
        assert (again.n_new, again.n_existing, again.generation_key) == (0, 2, began.generation_key)
        (line,) = said
        assert old in line
        assert f"--model {NAME}@{new} takes" in line
        more, runs, _ = client(built, NAME, path, samples=2)
        assert (more.n_new, more.model_revision, {r.model_revision for r in runs}) == (2, old, {old})
        # By its commit: the same traces. By another: others.
        named, _, said = client(built, f"{NAME}@{old}", path, samples=2)
        assert (named.n_new, named.model, named.generation_key, said) == (0, NAME, began.generation_key, [])
        other, runs, said = client(built, f"{NAME}@{new}", path)
        assert (other.n_new, other.model, other.model_revision, said) == (2, NAME, new, [])
        assert runs[-1].generation_key != began.generation_key
        # Without a revision it still is what it began with.
        assert client(built, NAME, path, samples=2)[0].n_new == 0
    with hub.client(tmp_path / "home", offline=True) as client:
        hub.log.clear()
        report, _, said = client(built, NAME, path, samples=3)
        assert (report.n_new, report.model_revision, said) == (2, old, [])
        assert client(built, f"{NAME}@{new}", path)[0].n_new == 0
        assert hub.log == []


def test_a_branch_that_is_named_is_looked_up_and_what_was_built_is_pointed_to(
    hub: LocalHub, client: Client, moved: tuple[str, str], tmp_path: Path
) -> None:
    old, new = moved
    path = tmp_path / "c.duckdb"
    report, _, said = client(built, f"{NAME}@v1", path)
    assert (report.model, report.model_revision, report.n_new, said) == (NAME, old, 2, [])
    report, (_, run), (line,) = client(built, f"{NAME}@main", path)
    assert (report.n_new, run.model, run.model_revision) == (2, NAME, new)
    assert line == f"{NAME}@main is {new}; --model {NAME}@{old} goes on where {path} has it"
    assert client(built, f"{NAME}@main", path)[2] == []  # the catalog has it now


def test_a_download_draws_no_bar_into_a_pipe(
    hub: LocalHub, moved: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.log.clear()
    with hub.client(tmp_path / "home") as client:
        assert client(source_to_prune, NAME)[:2] == (NAME, moved[1])
    assert len(hub.asked(f"/resolve/{moved[1]}/")) > 1
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_an_engine_loads_the_weights_of_that_commit_and_no_others(
    hub: LocalHub, moved: tuple[str, str], tmp_path: Path
) -> None:
    for n, (name, commit) in enumerate({f"{NAME}@v1": moved[0], NAME: moved[1]}.items()):
        hub.log.clear()
        with hub.client(tmp_path / f"home{n}") as client:
            report, *_ = client(built, name, tmp_path / f"{n}.duckdb", engine="transformers")
        assert (report.n_new, report.model_revision) == (2, commit)
        asked = {request.split("/resolve/")[1] for request in hub.asked("/lrm/resolve/")}
        assert {request.split("/")[0] for request in asked} == {commit}
        assert f"{commit}/model.safetensors" in asked


@pytest.mark.slow
def test_every_command_takes_a_revision(
    hub: LocalHub, client: Client, moved: tuple[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    old, new = moved
    path, tagged = tmp_path / "c.duckdb", f"{NAME}@v1"
    assert client(planned, tagged, path).model_revision == old
    report = client(evaluated, tagged, path)
    assert (report.model, report.model_revision) == (NAME, old)
    report = client(judged, tagged, path)
    assert (report.judge, report.judge_revision) == (NAME, old)
    assert client(source_to_prune, tagged) == (NAME, old, (tiny_model / "model.safetensors").read_bytes())
    assert client(source_to_prune, NAME)[1] == new
    file = tmp_path / "traces.jsonl"
    row = {"problem": "1 + 1?", "answer": "2", "generations": ["<think>\n1 + 1 = 2\n</think>\n\nThe answer is 2."]}
    file.write_text(json.dumps(row) + "\n")
    runs = client(imported, NAME, path, file)  # beside what was evaluated
    assert {(run.model, run.model_revision) for run in runs} == {(NAME, old)}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (f"{NAME}@v9", rf"^{NAME} has no revision 'v9'; name a branch, a tag or a commit$"),
        (f"{NAME}@", rf"^no model folder {NAME}@; pass a folder or a Hub id such as"),
        ("org/nowhere@v1", r"^there is no folder org/nowhere@v1, and the Hub did not give org/nowhere at revision v1:"),
        ("lrm@v1", r"^no model folder lrm@v1"),
    ],
)
def test_a_revision_that_is_not_there_is_one_line(
    hub: LocalHub, client: Client, moved: tuple[str, str], tmp_path: Path, model: str, says: str
) -> None:
    for ask in (built, planned, evaluated):
        with pytest.raises(InputError, match=says) as caught:
            client(ask, model, tmp_path / "c.duckdb")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=says):
        client(source_to_prune, model)
    assert not (tmp_path / "c.duckdb").exists()


def test_the_command_line_says_where_a_model_stays_before_it_starts(
    hub: LocalHub, client: Client, moved: tuple[str, str], tmp_path: Path
) -> None:
    old, new = moved
    path = tmp_path / "c.duckdb"
    client(built, f"{NAME}@{old}", path)
    command = [sys.executable, "-m", "calset.cli", "build", "--model", NAME, "--problems", SUMS, "--samples", "1"]
    command += ["--max-tokens", "12", "--catalog", str(path), "--dry-run", "--json", "--progress", "none"]
    environment = {**os.environ, **hub.settings(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONWARNINGS"] = "ignore"  # as a process that has had vLLM hands it on
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = f"{NAME} stays at {old}, where {path} has it; --model {NAME}@{new} takes the Hub's newest"
    assert done.stderr == f"Warning: {said}\n"  # and no bar of the library's in a pipe
    assert json.loads(done.stdout)["model_revision"] == old


def refusal(model: str) -> str:
    from calset.builder.model.info import inspect

    try:
        return str(inspect(model))
    except InputError as error:
        return str(error)


def test_an_index_that_leads_out_of_the_repository_is_found_before_a_weight_is_fetched(
    hub: LocalHub, client: Client, tiny_model: Path
):
    files = files_of(tiny_model)
    files["model-1.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = b'{"weight_map": {"x": "../../part.safetensors"}}'
    hub.commit("org/led", files, kind="model")
    assert "does not name safetensors files beside it" in client(refusal, "org/led")
