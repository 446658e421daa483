"""calset doctor: each kind of damage is found and named with a remedy, a sound catalog has none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import duckdb
import pytest
import warm
from factories import START, fill, keep_as_pulled
from local_hub import TOKEN, LocalHub
from processes import holding, python

import calset
from calset.catalog.catalog import Catalog
from calset.catalog.maintenance import checks as module
from calset.catalog.maintenance.checks import Check, examine
from calset.catalog.select import select
from calset.catalog.store import migrations, schema
from calset.catalog.subsets.versions import load
from calset.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    filled = fill(
        tmp_path_factory.mktemp("sound") / "c.duckdb", [[("correct", 5), ("incorrect", 6)], [("truncated", 7)]]
    )
    select(filled, "all", "rac")
    return filled.path


@pytest.fixture
def catalog(sound: Path, tmp_path: Path) -> Catalog:
    return Catalog(shutil.copyfile(sound, tmp_path / "c.duckdb"))


def found(catalog: Catalog, **options: Any) -> dict[str, Check]:
    """The checks that are not ok, by name."""
    return {check.name: check for check in examine(catalog, **options) if check.state != "ok"}


def test_a_sound_catalog_has_nothing_wrong(catalog: Catalog) -> None:
    before = catalog.path.read_bytes()
    checks = examine(catalog, full=True)
    assert {check.state for check in checks} == {"ok"}
    assert [c.name for c in checks] == ["schema", "rows", "token ids", "subsets", "file", "disk", "leftovers"]
    assert catalog.path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "name", "state", "words"),
    [
        ("DELETE FROM trace_tokens WHERE rowid = 0", "rows", "problem", "1 traces without token ids"),
        ("DELETE FROM traces WHERE rowid = 0", "rows", "problem", "1 token ids without a trace, 1 grades without"),
        ("DELETE FROM runs", "rows", "problem", "3 traces without a run"),
        ("DELETE FROM problems WHERE rowid = 0", "rows", "problem", "2 traces without a problem"),
        ("DELETE FROM subsets", "rows", "problem", "3 samples without a subset"),
        ("DELETE FROM sources", "rows", "warning", "2 problems without a source"),
        ("INSERT INTO traces FROM traces LIMIT 1", "rows", "problem", "1 traces twice"),
        ("INSERT INTO grades SELECT * REPLACE (now()::TIMESTAMP AS graded_at) FROM grades LIMIT 2", "rows", "problem",
         "2 grades at one place"),
        ("UPDATE traces SET n_tokens = 4 WHERE n_tokens = 5", "token ids", "problem", "1 traces give other"),
        ("UPDATE traces SET answer_start = 99 WHERE n_tokens = 5", "token ids", "problem", "1 traces give other"),
        ("UPDATE subset_items SET input_ids = [1, 2] WHERE position = 0", "subsets", "problem", "all@1"),
        ("UPDATE subsets SET n_samples = 4", "subsets", "problem", "all@1 says 4 samples and holds 3"),
        ("DROP VIEW suspect_gold", "schema", "problem", "view suspect_gold missing"),
        ("CREATE OR REPLACE VIEW excluded AS SELECT 1 AS x", "schema", "problem", "view excluded changed"),
        ("ALTER TABLE prunings DROP COLUMN record", "schema", "problem", "column prunings.record missing"),
        ("ALTER TABLE traces ALTER seconds TYPE VARCHAR", "schema", "problem", "column traces.seconds"),
    ],
)  # fmt: skip
def test_damage_is_named_with_a_remedy(catalog: Catalog, damage: str, name: str, state: str, words: str) -> None:
    with catalog.transaction() as con:
        con.execute(damage)
    check = found(catalog)[name]
    assert (check.state, words in check.message) == (state, True), check
    assert check.remedy


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM published_rows WHERE position = 0", "1 pulled subsets with more or fewer published rows"),
        ("INSERT INTO published_rows FROM published_rows LIMIT 1", "1 published_rows twice"),
        ("DELETE FROM subsets", "3 published rows without a subset"),
    ],
)
def test_damage_of_a_pulled_subset_is_named_and_not_merged(
    catalog: Catalog, tmp_path: Path, damage: str, words: str
) -> None:
    pulled = keep_as_pulled(catalog, load(catalog, "all@1"), tmp_path / "pulled.duckdb")
    assert "rows" not in found(pulled)
    with pulled.transaction() as con:
        con.execute(damage)
    assert words in found(pulled)["rows"].message
    if "subset" in damage:
        assert sum(calset.merge(tmp_path / "new.duckdb", pulled).added.values()) == 0
    else:
        with pytest.raises(InputError, match="published"):
            calset.merge(tmp_path / "new.duckdb", pulled)


def test_parts_of_what_is_gone_are_left_behind_by_the_merge_that_is_advised(catalog: Catalog, tmp_path: Path) -> None:
    with catalog.transaction() as con:
        con.execute("DELETE FROM subsets")
        con.execute("DELETE FROM traces WHERE n_tokens = 5")
    check = found(catalog)["rows"]
    assert check.remedy == f"a copy without them: calset merge {catalog.path} --catalog NEW.duckdb"
    calset.merge(tmp_path / "new.duckdb", catalog)
    assert found(Catalog(tmp_path / "new.duckdb")) == {}
    assert Catalog(tmp_path / "new.duckdb").query("SELECT count(*) FROM trace").rows == [(2,)]


def test_a_changed_block_is_found_when_all_is_read(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 2000 + n) for n in range(50)] for _ in range(20)])
    with catalog.connect() as con:
        ((block,),) = con.execute(
            "SELECT max(block_id) FROM pragma_storage_info('trace_tokens') WHERE block_id >= 0"
        ).fetchall()
    raw = bytearray(catalog.path.read_bytes())
    at = 3 * 4096 + block * 262_144 + 64  # behind three headers, and the block's own checksum
    raw[at] ^= 0xFF
    catalog.path.write_bytes(raw)
    checks = {c.name: c for c in examine(catalog, full=True) if c.state == "problem"}
    assert any("checksum" in c.message.lower() or "corrupt" in c.message.lower() for c in checks.values()), checks
    assert all(c.remedy for c in checks.values())


def test_only_a_sample_of_a_large_catalog_is_counted_unless_all_is_asked_for(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLED_ROWS", 2)
    monkeypatch.setattr(module, "SAMPLED_PLACES", 2)
    said = {full: {c.name: c for c in examine(catalog, full=full)}["token ids"].message for full in (False, True)}
    assert "2 of 3 traces; --full" in said[False]
    assert "all 3 traces" in said[True]


def test_an_older_schema_is_a_warning_and_stays(catalog: Catalog) -> None:
    with catalog.transaction() as con:
        con.execute("DELETE FROM migrations WHERE number > 1")
    before = catalog.path.read_bytes()
    check = found(catalog)["schema"]
    assert (check.state, "schema 1" in check.message) == ("warning", True)
    assert catalog.path.read_bytes() == before


def test_a_newer_schema_a_folder_and_no_database_are_problems(catalog: Catalog, tmp_path: Path) -> None:
    with catalog.transaction() as con:
        con.execute("INSERT INTO migrations VALUES (99, 'later', ?, '9.9.9', '3.0')", [START])
    (tmp_path / "text.duckdb").write_text("no database" * 1000)
    duckdb.connect(str(tmp_path / "foreign.duckdb")).execute("CREATE TABLE t (a INT)")
    expected = {
        "c.duckdb": ("schema 99", "pip install -U calset"),
        "text.duckdb": ("not a calset catalog", "--catalog"),
        "foreign.duckdb": ("not a calset catalog", "--catalog"),
        ".": ("is a folder", "--catalog"),
    }
    for name, (message, remedy) in expected.items():
        check = found(Catalog(tmp_path / name))["catalog"]
        assert check.state == "problem"
        assert message in check.message
        assert remedy in str(check.remedy)


def test_a_missing_catalog_is_a_warning_and_none_is_made(tmp_path: Path) -> None:
    check = found(Catalog(tmp_path / "c.duckdb"))["catalog"]
    assert (check.state, check.remedy) == ("warning", "calset build makes one")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_named(catalog: Catalog) -> None:
    code = """
        import os, sys
        from calset.catalog.catalog import Catalog
        with Catalog(sys.argv[1]).transaction() as con:
            con.execute("INSERT INTO prunings VALUES ('p', now()::TIMESTAMP, '{}')")
            con.execute("COMMIT")
            os._exit(9)
    """
    assert python(code, catalog.path).wait() == 9
    draft = catalog.path.with_name(".c.duckdb.123-4.new")
    draft.write_text("")
    check = found(catalog)["leftovers"]
    assert check.state == "warning"
    assert ".c.duckdb.123-4.new" in check.message
    assert "c.duckdb.wal" in check.message
    draft.unlink()
    assert "leftovers" not in found(catalog)
    assert catalog.prunings()[0]["pruning_id"] == "p"


def test_a_lock_that_stays_names_its_holder(catalog: Catalog) -> None:
    with holding(catalog.path) as holder:
        check = found(Catalog(catalog.path, lock_timeout=0.2))["catalog"]
        assert f"locked by process {holder.pid}" in check.message
        assert f"kill {holder.pid}" in str(check.remedy)


def test_the_disk_is_told_by_what_is_free(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, state in (("LOW_DISK_BYTES", "warning"), ("FULL_DISK_BYTES", "problem")):
        monkeypatch.setattr(module, name, 2**60)
        assert found(catalog)["disk"].state == state


# -- the machine ----------------------------------------------------------------------------------------------------


def run_doctor(catalog: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return warm.calset("doctor", "--catalog", catalog, "--json", cwd=catalog.parent, **environment)


def look_at_hub() -> list[Check]:
    """Runs in the client's process."""
    from calset.diagnosis import hub

    return list(hub())


@pytest.mark.slow
def test_the_login_is_told_and_the_token_never_printed(tmp_path: Path) -> None:
    with LocalHub() as hub:
        for token, state, words in (
            (TOKEN, "ok", "logged in as tester"),
            ("hf_wrong", "problem", "refuses the stored token"),
            (None, "warning", "not logged in"),
        ):
            with hub.client(tmp_path / "home", token=token) as client:
                (check,) = client(look_at_hub)
            assert (check.state, words in check.message) == (state, True), check
            assert token is None or token not in repr(check)
        hub.fail("whoami", times=100)
        with hub.client(tmp_path / "home", token=TOKEN) as client:
            (check,) = client(look_at_hub)
        assert (check.state, "503" in check.message, TOKEN in repr(check)) == ("warning", True, False)
    with hub.client(tmp_path / "home", token=TOKEN) as client:  # nobody answers there any more
        (check,) = client(look_at_hub)
    assert (check.state, "cannot be reached" in check.message, TOKEN in repr(check)) == ("warning", True, False)


@pytest.mark.slow
def test_the_command_line_looks_at_the_machine(catalog: Catalog) -> None:
    done = run_doctor(catalog.path, {"HF_HUB_OFFLINE": "1"})
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True), done.stderr
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("packages", "transformers", "grading", "Hub", "schema", "rows"):
        assert checks[name]["state"] == "ok"
    assert "math-verify" in checks["packages"]["message"]


@pytest.mark.slow
def test_a_broken_engine_ends_it_with_1_and_the_rest_is_still_looked_at(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = run_doctor(catalog.path, environment)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert (done.returncode, report["ok"]) == (1, False)
    assert checks["vllm"]["state"] == "problem"
    assert "libcudart.so.13" in checks["vllm"]["message"]
    assert checks["transformers"]["state"] == checks["rows"]["state"] == "ok"


def test_a_version_that_calset_does_not_take_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from calset import diagnosis

    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["click>=99", "no-such-package", "rich>=13"])
    _, check = diagnosis.packages()
    assert check.state == "problem"
    assert "click is " in check.message
    assert "no-such-package is not installed" in check.message
    assert "'click>=99'" in str(check.remedy)
    assert callable(calset.doctor)


@pytest.mark.slow
def test_a_catalog_of_another_duckdb_is_sound_too(tmp_path: Path) -> None:
    other = ROOT / ".venv" / "duckdb-1.5"
    if not other.is_dir():
        pytest.skip("DuckDB 1.5 is not there")
    code = """
        import sys, duckdb
        from factories import fill
        from calset.catalog.maintenance.checks import examine
        assert duckdb.__version__.startswith("1.5")
        fill(sys.argv[1], [[("correct", 3)]])
        print([c.state for c in examine(sys.argv[2], full=True)])
    """
    theirs, ours = tmp_path / "theirs.duckdb", fill(tmp_path / "ours.duckdb", [[("correct", 3)]])
    path = os.pathsep.join(map(str, (other, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), theirs, ours.path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(["ok"] * 7), done.stderr
    assert {c.state for c in examine(theirs, full=True)} == {"ok"}
    assert len(schema.TABLES) > migrations.SCHEMA_VERSION
