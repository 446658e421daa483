"""The command line as a user meets it: real processes, one-line errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import pytest
import warm

from calset import bundled
from calset.cli import WARNINGS, main
from calset.errors import InputError
from calset.version import __version__

BIN = str(Path(sys.executable).parent)
PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=3&max_digits=2&size=6&seed=3"


def calset(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.calset(*arguments, cwd=cwd, CALSET_ENGINE="transformers")


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error that says these words; nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("calset: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalog of 18 traces and a subset ``all@1``."""
    folder = tmp_path_factory.mktemp("cli")
    done = calset("build", "--model", bundled.MODEL, "--problems", PROBLEMS, "--samples", "3", "--max-tokens", "200",
                  "--json", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_new"] == 18
    done = calset("select", "all", "--recipe", "rac", "--tokens", "3000", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("start", [[shutil.which("calset", path=BIN)], [sys.executable, "-m", "calset.cli"]])
def test_the_installed_command_and_the_module_start_cold(start: list[str], tmp_path: Path) -> None:
    def cold(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert cold("--version").stdout == f"calset, version {__version__}\n"
    refused(cold("stats", "--catalog", "none.duckdb"), 2, "none.duckdb")


def test_help_and_what_asks_the_catalog_import_nothing_heavy(built: Path) -> None:
    code = """
        import contextlib, io, sys
        from calset.cli import cli, main
        for name in ["--version", *cli.commands]:
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.suppress(SystemExit):
                main([name, "--help"])
        print(*sys.modules)
        with contextlib.suppress(SystemExit):
            main(["query", "SELECT 1"])
        print(*sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=built, capture_output=True, text=True, check=True
    )
    helped, *_, asked = done.stdout.splitlines()
    assert not {"torch", "vllm", "transformers", "duckdb", "numpy", "pyarrow"} & set(helped.split())
    assert "duckdb" in asked.split()
    assert not {"torch", "vllm", "transformers", "pyarrow"} & set(asked.split())


@pytest.mark.parametrize("kind", [kind.__name__ for kind in WARNINGS])
def test_a_warning_of_calsets_own_is_one_line_without_code(kind: str, tmp_path: Path) -> None:
    code = f"""
        import contextlib, warnings
        from calset.cli import WARNINGS, main
        from calset.errors import {kind}
        with contextlib.suppress(SystemExit):
            main(["--version"])
        warnings.warn("look\\x1b[2J there", {kind})
    """
    done = warm.warm().run("python", "-c", textwrap.dedent(code), cwd=tmp_path)
    assert done.stderr == "Warning: look\N{REPLACEMENT CHARACTER}[2J there\n"


def test_a_finished_build_has_nothing_left_to_do(built: Path) -> None:
    done = calset("build", "--model", bundled.MODEL, "--problems", PROBLEMS, "--samples", "3", "--max-tokens", "200",
                  "--json", cwd=built)  # fmt: skip
    report = json.loads(done.stdout)
    assert (report["n_new"], report["n_existing"]) == (0, 18)


def test_stats_query_show_and_subsets_speak_json(built: Path) -> None:
    stats = json.loads(calset("stats", "--json", cwd=built).stdout)
    assert (stats["problems"], stats["traces"], stats["graded"]) == (6, 18, 18)
    rows = calset("query", "SELECT trace_id, n_tokens FROM trace ORDER BY trace_id", "--json", cwd=built).stdout
    listed = [json.loads(line) for line in rows.splitlines()]
    assert len(listed) == 18
    shown = json.loads(calset("show", listed[0]["trace_id"][:10], "--json", cwd=built).stdout)
    assert shown["trace_id"] == listed[0]["trace_id"]
    assert len(shown["completion_ids"]) == listed[0]["n_tokens"]
    assert len(shown["siblings"]) == 2
    subset = json.loads(calset("subsets", "--json", cwd=built).stdout)
    assert subset["ref"] == "all@1"
    assert subset["n_tokens"] <= 3000


def test_tables_are_tab_separated_where_nobody_looks(built: Path) -> None:
    lines = calset("query", "SELECT kind, count(*) AS n FROM trace GROUP BY 1", cwd=built).stdout.splitlines()
    assert lines == ["kind\tn", "build\t18"]


@pytest.mark.slow
def test_progress_can_be_json_or_silent(built: Path, tmp_path: Path) -> None:
    build = ("build", "--model", bundled.MODEL, "--problems", PROBLEMS, "--samples", "1", "--max-tokens", "60",
             "--limit", "2", "--catalog", tmp_path / "c.duckdb")  # fmt: skip
    events = [json.loads(line) for line in calset(*build, "--progress", "json", cwd=built).stderr.splitlines()]
    assert events[-1]["final"]
    assert events[-1]["done"] == 2
    assert calset(*build, "--progress", "none", cwd=built).stderr == ""


@pytest.mark.slow
def test_prune_verify_and_evaluate(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    done = calset("prune", bundled.MODEL, "--calibration", "all", "--method", "wanda", "--pattern", "2:4", "-o", out,
                  "--json", cwd=built)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["realised_sparsity"] == pytest.approx(0.5, abs=1e-3)
    verified = calset("verify", out, cwd=built)
    assert verified.returncode == 0, verified.stderr
    assert "bit-equal" in verified.stdout
    held_out = "gym:chain_sum?min_terms=2&max_terms=3&max_digits=2&size=4&seed=900000"
    done = calset("evaluate", out, "--problems", held_out, "--max-tokens", "100", "--json", cwd=built)
    report = json.loads(done.stdout)
    assert report["n_traces"] == report["n_problems"] == 4
    assert 0 <= report["accuracy"] <= 1
    done = calset("evaluate", out, "--problems", PROBLEMS, "--limit", "1", "--max-tokens", "60", "--json", cwd=built)
    assert "were in the subset" in json.loads(done.stdout)["warnings"][0]


def test_prune_says_what_it_calibrated_on_or_that_it_used_nothing(built: Path, tmp_path: Path) -> None:
    done = calset(
        "prune", bundled.MODEL, "--calibration", "all", "--method", "magnitude", "--sparsity", "0.5",
        "-o", tmp_path / "out", "--device", "cpu", cwd=built,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no calibration used" in done.stdout
    assert "calibrated on" not in done.stdout


@pytest.mark.slow
def test_a_dry_run_of_a_pruning_plans_and_writes_nothing(built: Path, tmp_path: Path) -> None:
    asked = ("prune", bundled.MODEL, "--calibration", "all", "--sparsity", "0.5", "-o", tmp_path / "out", "--dry-run")
    done = calset(*asked, "--include", "mlp", "--exclude", "layers.0", "--json", cwd=built)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["n_blocks"], plan["n_matrices"], plan["problems"]) == (6, 15, [])
    assert plan["device_bytes"] == sum(plan["device_parts"].values())
    assert "cpu memory" in calset(*asked, cwd=built).stdout
    refused(calset(*asked, "--include", "mlpp", cwd=built), 2, "'mlpp'")
    assert not list(tmp_path.iterdir())


def test_engine_options_are_named_values(tmp_path: Path) -> None:
    ask = ("build", "--model", bundled.MODEL, "--problems", "demo", "--engine", "transformers", "--engine-option")
    refused(calset(*ask, "tensor_parallel_size", cwd=tmp_path), 2, "NAME=VALUE")
    refused(calset(*ask, "tensor_parallel_size=2", cwd=tmp_path), 2, "no option 'tensor_parallel_size'")
    assert not any(tmp_path.iterdir())


def test_a_build_stopped_while_it_looks_at_problems_says_how_to_go_on(tmp_path: Path) -> None:
    spec = "gym:chain_sum?size=1000000000"
    read, write = os.pipe()
    build = warm.warm().start(
        "calset", "build", "--model", bundled.MODEL, "--problems", spec, "--engine", "transformers",
        "--progress", "json", cwd=tmp_path, streams=[0, write, write],
    )  # fmt: skip
    os.close(write)
    with open(read) as said:
        for line in said:
            if "checking problems" in line:
                break
        os.kill(build.pid, signal.SIGINT)
        last = said.read().strip().splitlines()[-1]
    assert build.wait(timeout=60) == 130
    assert last.startswith(
        "calset: stopped; what was saved stays; run the same command again to continue: calset build "
    )
    assert f"--problems '{spec}'" in last
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_evaluating_never_feeds_calibration(built: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "c.duckdb"
    shutil.copy(built / "calset.duckdb", catalog)
    done = calset("evaluate", bundled.MODEL, "--problems", PROBLEMS, "--samples", "2", "--max-tokens", "100",
                  "--catalog", catalog, cwd=built)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(calset("stats", "--json", "--catalog", catalog, cwd=built).stdout)["traces"] == 18
    again = calset("select", "all", "--recipe", "rac", "--tokens", "3000", "--catalog", catalog, "--json", cwd=built)
    assert json.loads(again.stdout)["version"] == 1  # the same content


# --- bad input: one line, exit code 2 (or 1 for a failure), nothing half-written ---------------------------------


def test_no_such_catalog(tmp_path: Path) -> None:
    refused(calset("stats", cwd=tmp_path), 2, "calset.duckdb", "--catalog")
    assert not list(tmp_path.iterdir())


def test_unknown_option_and_missing_option(tmp_path: Path) -> None:
    refused(calset("build", "--modle", "x", cwd=tmp_path), 2, "--modle")
    refused(calset("build", "--problems", "demo", cwd=tmp_path), 2, "--model")


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "1+1?", "solution": "2"}\n')
    done = calset("build", "--model", bundled.MODEL, "--problems", "q.jsonl", cwd=tmp_path)
    refused(done, 2, "question", "prompt", "solution")
    assert not (tmp_path / "calset.duckdb").exists()


@pytest.mark.parametrize("spec", ["gsm9k", "gym:chain_summ", "gym:chain_sum?terms=3", "nothing.jsonl"])
def test_unknown_problems(spec: str, tmp_path: Path) -> None:
    refused(calset("build", "--model", bundled.MODEL, "--problems", spec, cwd=tmp_path), 2)
    assert not (tmp_path / "calset.duckdb").exists()


def test_a_sampling_value_out_of_range_is_one_line(tmp_path: Path) -> None:
    asked = ("build", "--model", bundled.MODEL, "--problems", "demo")
    refused(calset(*asked, "--min-p", "-0.1", cwd=tmp_path), 2, "min_p must lie between 0 and 1")
    refused(calset(*asked, "--repetition-penalty", "0", cwd=tmp_path), 2, "repetition_penalty must be positive")


def test_a_librarys_parameter_is_named_as_the_commands_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(spec: str, **options: object) -> None:
        raise InputError("max_length= is for held_out=: see n_devices=, text=x, ?limit=5 and nothing=")

    monkeypatch.setattr("calset.builder.problems.open_problems", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["problems", "demo"])
    assert ended.value.code == 2
    said = "--max-length is for --held-out: see --devices, text=x, ?limit=5 and nothing="
    assert capsys.readouterr().err == f"calset: {said}\n"


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path: Path) -> None:
    asked = ("build", "--model", bundled.MODEL, "--problems", "demo", "--limit", "5", "--samples", "4", "--dry-run")
    done = calset(*asked, "--tokens-per-second", "100", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["n_problems"], plan["n_requested"], plan["n_todo"], plan["tokens_per_second"]) == (5, 20, 20, 100)
    assert not list(tmp_path.iterdir())
    refused(calset(*asked, "--engine", "ftp://x", cwd=tmp_path), 2, "ftp://x")
    refused(calset(*asked[:-1], "--devices", "8", cwd=tmp_path), 2, "--devices is for --dry-run")


def test_a_target_needs_a_need(tmp_path: Path) -> None:
    asked = ("build", "--model", bundled.MODEL, "--problems", "demo")
    refused(calset(*asked, "--target", "ssgr", cwd=tmp_path), 2, "need")
    refused(calset(*asked, "--need", "5", cwd=tmp_path), 2, "target")
    refused(calset(*asked, "--seed", str(10**26), cwd=tmp_path), 2, "--seed")
    assert not (tmp_path / "calset.duckdb").exists()


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    shutil.copytree(bundled.MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template*"))
    config = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("chat_template", None)
    config.write_text(json.dumps(settings))
    refused(calset("build", "--model", "model", "--problems", "demo", cwd=tmp_path), 2, "chat template")


def test_no_such_model(tmp_path: Path) -> None:
    refused(calset("build", "--model", "./nowhere", "--problems", "demo", cwd=tmp_path), 2, "nowhere")
    refused(calset("prune", "./nowhere", "--calibration", "x", "-o", "out", cwd=tmp_path), 2)


@pytest.mark.parametrize("bad", [("--sparsity", "1.2"), ("--sparsity", "0"), ("--pattern", "4:2"), ()])
def test_a_sparsity_or_pattern_that_makes_no_sense(built: Path, tmp_path: Path, bad: tuple[str, ...]) -> None:
    refused(calset("prune", bundled.MODEL, "--calibration", "all", "-o", tmp_path / "out", *bad, "--progress", "none",
                   cwd=built), 2)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_subset_of_another_tokenizer(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundled.MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "out"
    done = calset(
        "prune", other, "--calibration", "all", "--sparsity", "0.5", "-o", out, "--progress", "none", cwd=built
    )
    refused(done, 2, "tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_catalog_of_a_newer_schema(built: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.duckdb"
    shutil.copy(built / "calset.duckdb", newer)
    with duckdb.connect(str(newer)) as con:
        con.execute("INSERT INTO migrations VALUES (999, 'from the future', now(), '99.0', '9.9')")
        con.execute("UPDATE meta SET value = '999' WHERE key LIKE 'schema%'")
    refused(calset("stats", "--catalog", newer, cwd=tmp_path), 2, "newer", "999")


@pytest.mark.parametrize("sql", ["DROP TABLE traces", "SELECT 1; SELECT 2", "COPY traces TO 'x.csv'", "SELEC 1"])
def test_query_answers_only_a_select(built: Path, sql: str) -> None:
    refused(calset("query", sql, cwd=built), 2)
    assert not (built / "x.csv").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "a b", ""])
def test_a_subset_name_that_could_be_a_path(built: Path, name: str) -> None:
    refused(calset("select", name, "--recipe", "rac", cwd=built), 2, "name")


@pytest.mark.parametrize("band", ["0.2", "a..b", "0.8..0.2"])
def test_a_band_that_is_none(built: Path, band: str) -> None:
    refused(calset("select", "x", "--difficulty", band, cwd=built), 2, "difficulty")


def test_a_full_disk_leaves_no_half_model(built: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the weights do not fit, the catalog and report do."""
    code = """
        import resource, sys
        from calset.cli import WARNINGS, main
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_048_000, 2_048_000))
        main(sys.argv[1:])
    """
    command = ("prune", bundled.MODEL, "--calibration", "all", "--sparsity", "0.5", "-o", tmp_path / "out")
    done = warm.warm().run("python", "-c", textwrap.dedent(code), *command, "--progress", "none", cwd=built)
    refused(done, 1)
    assert not list(tmp_path.iterdir())


def test_control_sequences_in_problems_do_not_reach_the_terminal(tmp_path: Path) -> None:
    row = {"question": "1+1?\u001b]0;owned\u0007\u001b[2J\u009b2J\u202e", "answer": "2"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    for form in ((), ("--json",)):
        done = calset("problems", "q.jsonl", *form, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not set("\u001b\u0007\u009b\u202e") & set(done.stdout)
    assert json.loads(done.stdout)["problems"][0]["question"] == row["question"]


def test_compact_says_what_it_gained_and_keeps_the_catalog(built: Path, tmp_path: Path) -> None:
    shutil.copy(built / "calset.duckdb", tmp_path)
    asked = ("query", "SELECT trace_id, difficulty FROM trace ORDER BY 1", "--json")
    before = calset(*asked, cwd=tmp_path).stdout
    done = json.loads(calset("compact", "--json", cwd=tmp_path).stdout)
    assert done["rows"]["traces"] == len(before.splitlines()) > 0
    assert done["bytes_after"] == (tmp_path / "calset.duckdb").stat().st_size
    assert calset(*asked, cwd=tmp_path).stdout == before != ""
    refused(calset("compact", "--catalog", "none.duckdb", cwd=tmp_path), 2, "there is no catalog")
