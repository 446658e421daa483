"""A catalog from somebody else is data: nothing that its file defines is run, whichever command opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from factories import fill, keep_as_pulled, make_grade, make_problem, make_run, make_trace
from older_catalogs import as_first_schema

import calset
from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.checks import examine
from calset.catalog.select import select
from calset.catalog.store import schema
from calset.catalog.subsets.versions import load
from calset.cli import main
from calset.errors import CatalogError, InputError

MARKER = "marker-7f3a"  # what a file of the reader's holds, and no answer of calset's may
CONTENT = "(SELECT content FROM read_text('{marker}'))"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    filled = fill(tmp_path_factory.mktemp("sound") / "c.duckdb", [[("correct", 5), ("incorrect", 6)], [("correct", 7)]])
    select(filled, "all", "rac")
    return filled.path


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a catalog in it and, beside it, a file that only its reader should read."""
    shutil.copyfile(sound, tmp_path / "c.duckdb")
    (tmp_path / "marker.txt").write_text(MARKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CALSET_CATALOG", raising=False)
    return tmp_path


def tamper(folder: Path, *statements: str, storage: str = "v1.5.0") -> Catalog:
    """The catalog after its author has run some SQL in it."""
    path = folder / "c.duckdb"
    if storage != "v1.5.0":
        path.rename(folder / "was.duckdb")
        with duckdb.connect() as con:
            con.execute(
                f"ATTACH '{folder / 'was.duckdb'}' AS was; ATTACH '{path}' AS now (STORAGE_VERSION '{storage}')"
            )
            con.execute("COPY FROM DATABASE was TO now")
        (folder / "was.duckdb").unlink()
    with duckdb.connect(str(path), config={"storage_compatibility_version": storage}) as con:
        for statement in statements:
            con.execute(statement.replace("{marker}", str(folder / "marker.txt")))
    return Catalog(path)


def instead_of_table(name: str, select: str) -> tuple[str, ...]:
    """A view where the table was; the rows stay under another name."""
    return (f"CREATE TABLE hidden AS FROM {name}", f"DROP TABLE {name}", f"CREATE VIEW {name} AS {select}")


def with_column(table: str, column: str, definition: str) -> tuple[str, ...]:
    """A table of the same rows in which one column is defined in another way."""
    columns = ", ".join(f'"{n}" {definition if n == column else kind}' for n, kind in schema.TABLES[table].items())
    others = ", ".join(f'"{n}"' for n in schema.TABLES[table] if n != column)
    return (
        f"CREATE TABLE kept AS FROM {table}",
        f"DROP TABLE {table}",
        f"CREATE TABLE {table} ({columns})",
        f"INSERT INTO {table} ({others}) SELECT {others} FROM kept",
        "DROP TABLE kept",
    )


# What the author did -> what the refusal names.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a view for the table problems": (
        instead_of_table("problems", f"SELECT * REPLACE ({CONTENT} AS question) FROM hidden"),
        "a view problems where calset keeps a table",
    ),
    "a view for the table migrations": (
        instead_of_table("migrations", "FROM hidden"), "a view migrations where calset keeps a table",
    ),
    "a table for the view trace": (
        ("DROP VIEW trace", "CREATE TABLE trace (x INTEGER)"), "a table trace where calset has a view",
    ),
    "the macro count": (("CREATE MACRO count(x) AS 42",), "the macro count, which hides DuckDB's function"),
    "the macro sha256": (("CREATE MACRO sha256(x) AS 'mine'",), "the macro sha256"),
    "the macro +": (('CREATE MACRO "+"(a, b) AS 77',), "the macro '+'"),
    "the table macro duckdb_tables": (
        ("CREATE MACRO duckdb_tables() AS TABLE SELECT 1 AS mine",), "DROP MACRO TABLE \"duckdb_tables\" takes it out",
    ),
    "the type json": (("CREATE TYPE json AS INTEGER",), "the type json, which hides DuckDB's type"),
    "a generated column": (
        with_column("runs", "command", "VARCHAR GENERATED ALWAYS AS (lower(model))"),
        "the definition of the table runs",
    ),
    "a default": (with_column("grades", "detail", "VARCHAR DEFAULT ('x')"), "the definition of the table grades"),
    "a check": (with_column("grades", "detail", "VARCHAR CHECK (detail <> 'x')"), "the definition of the table grades"),
    "an index on an expression": (
        ("CREATE INDEX odd ON traces ((n_tokens + 1))",), "the index odd on an expression",
    ),
    "an index that refuses rows": (
        ("CREATE UNIQUE INDEX one ON subsets (name, version)",), 'the UNIQUE index one',
    ),
    "another type": (("ALTER TABLE traces ALTER seconds TYPE VARCHAR",), "column seconds is VARCHAR and not DOUBLE"),
    "a missing column": (("ALTER TABLE prunings DROP COLUMN record",), "a table prunings without the column record"),
    "a column more": (("ALTER TABLE problems ADD COLUMN mine INTEGER",), "a column mine in the table problems"),
}  # fmt: skip
if duckdb.__version__.startswith("2."):
    REFUSED["a trigger"] = (
        ("CREATE TRIGGER odd AFTER INSERT ON sources FOR EACH STATEMENT INSERT INTO meta VALUES ('a', 'b')",),
        'DROP TRIGGER "odd" ON "sources" takes it out',
    )

# View by view, what brings the marker where calset's own brings a question, a text or a verdict.
VIEWS = {
    "trace": f"SELECT * REPLACE ({CONTENT} AS question, {CONTENT} AS text) FROM ({schema.VIEWS['trace']})",
    "graded_traces": f"SELECT * REPLACE ({CONTENT} AS verdict) FROM ({schema.VIEWS['graded_traces']})",
    "newest_grades": f"SELECT * REPLACE ({CONTENT} AS verdict) FROM grades",
    "problem": f"SELECT * REPLACE ({CONTENT} AS question) FROM ({schema.VIEWS['problem']})",
}


def tamper_with_views(folder: Path) -> Catalog:
    return tamper(folder, *(f"CREATE OR REPLACE VIEW {view} AS {select}" for view, select in VIEWS.items()))


COMMANDS: dict[str, tuple[str, ...]] = {
    "stats": ("stats", "--json"),
    "query by filters": ("query", "--columns", "*", "--json"),
    "query in SQL": ("query", "SELECT t.question, t.text, p.question FROM trace t, problem p", "--json"),
    "show": ("show", "{trace}", "--json"),
    "select": ("select", "new", "--recipe", "rac", "--json"),
    "select where": ("select", "new", "--recipe", "rac", "--where", "question LIKE 'What%'", "--json"),
    "subsets": ("subsets", "--json"),
    "diff": ("diff", "all", "all@1", "--json"),
    "report": ("report", "all", "-o", "out/report.html"),
    "export": ("export", "all", "-o", "out/export"),
    "publish": ("publish", "all", "org/repo", "--dry-run"),
    "merge": ("merge", "c.duckdb", "--catalog", "out/new.duckdb", "--json"),
    "grade": ("grade", "--source", "demo", "--json"),
    "compact": ("compact", "--json"),
}


def run(
    folder: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str, list[bytes]]:
    """Exit code, both outputs, and the files that a command wrote beside the catalog."""
    (folder / "out").mkdir(exist_ok=True)
    trace = make_trace(make_problem(1), make_run()).trace_id
    arguments = [part.replace("{trace}", trace) for part in command]
    catalog = [] if "--catalog" in arguments else ["--catalog", "c.duckdb"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *catalog])
    shown = capsys.readouterr()
    written = [file.read_bytes() for file in sorted((folder / "out").rglob("*")) if file.is_file()]
    return int(ended.value.code or 0), shown.out, shown.err, written


def refusable(folder: Path, done: str) -> tuple[Catalog, str]:
    """A catalog after one of ``REFUSED``, and what is to be named."""
    statements, named = REFUSED[done]
    return tamper(folder, *statements, storage="v2.0.0" if "trigger" in done else "v1.5.0"), named


@pytest.mark.parametrize("done", ["a view for the table problems", "the macro count", "a column more"])
def test_what_would_be_run_is_refused_by_name_whatever_the_command(
    folder: Path, done: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, named = refusable(folder, done)
    for name, command in COMMANDS.items():
        code, out, err, written = run(folder, command, capsys)
        if (done, name) == ("a column more", "compact"):  # which names it in its own words, and leaves the file
            assert (code, "main.problems.mine" in err) == (1, True)
            continue
        assert (code, out, written) == (2, "", []), (name, err)
        assert err.count("\n") == 1, name
        assert named in err, (name, err)
        assert MARKER not in err, name


@pytest.mark.parametrize("done", REFUSED)
def test_what_would_be_run_is_refused_to_writers_and_to_the_user_too(folder: Path, done: str) -> None:
    catalog, named = refusable(folder, done)
    before = catalog.path.read_bytes()
    trace = make_trace(make_problem(0), make_run(), 50)
    uses: tuple[Callable[[], object], ...] = (
        lambda: catalog.record([trace], [make_grade(trace)]),
        lambda: catalog.connect().__enter__(),
        lambda: calset.stats(catalog),
        lambda: calset.merge(catalog, fill(folder / "other.duckdb", [[("correct", 3)]])),
    )
    for use in uses:
        with pytest.raises(InputError) as refused:
            use()
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)
    assert catalog.path.read_bytes() == before


def test_views_of_calsets_names_bring_nothing_into_any_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tamper_with_views(folder)
    for view in VIEWS:  # they would
        with duckdb.connect(str(folder / "c.duckdb"), read_only=True) as con:
            assert MARKER in str(con.execute(f"FROM {view}").fetchall())
    for name, command in COMMANDS.items():  # compact, which writes calset's own, comes last
        code, out, err, written = run(folder, command, capsys)
        assert code == 0, (name, err)
        assert MARKER not in out + err, name
        assert not [file for file in written if MARKER.encode() in file], name


def test_answers_over_a_changed_view_are_those_of_calsets_own(folder: Path, sound: Path) -> None:
    catalog = tamper_with_views(folder)
    for asked in ("FROM trace ORDER BY ALL", "FROM problem ORDER BY ALL", "FROM suspect_gold", "FROM judgement"):
        assert catalog.query(asked).rows == Catalog(sound).query(asked).rows
    with catalog.connect() as con:
        assert con.execute("SELECT DISTINCT question FROM trace ORDER BY 1").fetchall() == [
            ("What is 0 + 0?",), ("What is 1 + 1?",),
        ]  # fmt: skip
        assert calset.stats(catalog).traces == 3  # on the user's own database, which has no walls
    assert len(catalog.traces(columns=["question"]).fetchall()) == 3


def test_what_a_user_added_stays_usable_but_reads_no_file(folder: Path) -> None:
    catalog = tamper(
        folder,
        "CREATE MACRO twice(x) AS 2 * x",
        "CREATE VIEW right_ones AS FROM trace WHERE correct",
        "CREATE TABLE notes (note VARCHAR DEFAULT 'none')",
        "CREATE VIEW peek AS FROM read_text('{marker}')",
        "CREATE INDEX by_length ON traces (n_tokens)",
    )
    assert catalog.query("SELECT twice(count(*)) FROM right_ones").rows == [(4,)]
    assert catalog.query("SELECT count(*) FROM notes").rows == [(0,)]
    with pytest.raises(InputError, match=r"file system operations are disabled|Cannot access file"):
        catalog.query("FROM peek")
    trace = make_trace(make_problem(0), make_run(), 50)
    assert catalog.record([trace], [make_grade(trace)]).traces == 1
    assert calset.stats(catalog).traces == 4


def test_no_statement_of_a_transaction_reaches_another_file(folder: Path) -> None:
    catalog, secret = Catalog("c.duckdb"), folder / "marker.txt"
    for sql in (f"FROM read_text('{secret}')", "ATTACH 'other.duckdb'", "COPY meta TO 'meta.csv'"):
        with pytest.raises((CatalogError, InputError)), catalog.transaction() as con:
            con.execute(sql)
    assert sorted(p.name for p in folder.iterdir()) == ["c.duckdb", "marker.txt"]


def test_a_change_between_two_reads_of_one_process_is_noticed(folder: Path) -> None:
    catalog = Catalog("c.duckdb")
    assert catalog.query("SELECT count(*) FROM trace").rows == [(3,)]
    tamper(folder, "CREATE MACRO count(x) AS 42")
    with pytest.raises(InputError, match="the macro count"):
        catalog.query("SELECT 1")
    tamper(folder, "DROP MACRO count")
    assert catalog.query("SELECT count(*) FROM trace").rows == [(3,)]
    with catalog.transaction() as con:  # a user's own statements are looked at too
        con.execute("CREATE MACRO sum(x) AS 42")
    with pytest.raises(InputError, match="the macro sum"):
        catalog.add_run(make_run("b"))


# -- the other catalog of a merge -----------------------------------------------------------------------------------

STRANGERS = {
    "CREATE VIEW more AS FROM read_text('{marker}')": 'the view more, which is not calset\'s.*DROP VIEW "more"',
    "CREATE TABLE more (x INTEGER)": 'the table more, .*DROP TABLE "more"',
    "CREATE MACRO more(x) AS x": 'the macro more, .*DROP MACRO "more"',
    "CREATE MACRO more() AS TABLE SELECT 1 AS x": 'the macro more, .*DROP MACRO TABLE "more"',
    "CREATE SCHEMA more": 'the schema more, .*DROP SCHEMA "more" CASCADE takes it out',
    "CREATE TYPE more AS ENUM ('a')": 'the type more, .*DROP TYPE "more"',
    "CREATE SEQUENCE more": 'the sequence more, .*DROP SEQUENCE "more"',
    "CREATE INDEX more ON traces (n_tokens)": 'the index more, .*DROP INDEX "more"',
}


@pytest.mark.parametrize("added", STRANGERS)
def test_a_merge_refuses_by_name_what_calset_did_not_make(folder: Path, added: str) -> None:
    other = tamper(folder, added)
    before = other.path.read_bytes()
    with pytest.raises(InputError, match=STRANGERS[added]) as refused:
        calset.merge(folder / "new.duckdb", other)
    assert "\n" not in str(refused.value)
    assert other.path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["c.duckdb", "marker.txt"]


@pytest.mark.parametrize("name", ["prunings", "meta", "sources"])
def test_a_view_for_a_table_of_the_other_brings_no_file_and_writes_none(folder: Path, name: str) -> None:
    columns = ", ".join(f"content::{kind} AS {c}" for c, kind in schema.TABLES[name].items() if kind == "VARCHAR")
    tamper(folder, f"DROP TABLE {name}", f"CREATE VIEW {name} AS SELECT {columns} FROM read_text('{{marker}}')")
    with pytest.raises(InputError, match=f"a view {name} where calset keeps a table"):
        calset.merge(folder / "new.duckdb", folder / "c.duckdb")
    assert sorted(p.name for p in folder.iterdir()) == ["c.duckdb", "marker.txt"]


def test_an_older_catalog_is_merged_without_its_views_and_refused_with_more(folder: Path) -> None:
    as_first_schema(folder / "c.duckdb", folder / "older.duckdb")
    for sql in ("DROP VIEW problem", "CREATE VIEW problem AS SELECT content FROM read_text('marker.txt')"):
        with duckdb.connect("older.duckdb") as con:
            con.execute(sql)
    report = calset.merge(folder / "new.duckdb", folder / "older.duckdb")
    assert (report.upgraded_from, report.added["traces"]) == (1, 3)
    assert (
        Catalog("new.duckdb").query("FROM trace ORDER BY ALL").rows
        == Catalog("c.duckdb").query("FROM trace ORDER BY ALL").rows
    )
    for sql, named in (("CREATE VIEW more AS SELECT 1 AS x", "view more"), ("CREATE MACRO max(x) AS 0", "macro max")):
        with duckdb.connect("older.duckdb") as con:
            con.execute(sql)
        with pytest.raises(InputError, match=named):
            calset.merge(folder / "new.duckdb", folder / "older.duckdb")


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("CREATE MACRO max(x) AS 0", "the macro max"),
        ("ALTER TABLE runs ALTER command SET DEFAULT 'x'", "the definition of the table runs"),
    ],
)
def test_an_older_catalog_is_checked_before_it_is_upgraded(folder: Path, sql: str, named: str) -> None:
    as_first_schema(folder / "c.duckdb", folder / "older.duckdb")
    with duckdb.connect("older.duckdb") as con:
        con.execute(sql)
    before = (folder / "older.duckdb").read_bytes()
    with pytest.raises(InputError, match=named):
        calset.stats("older.duckdb")
    assert (folder / "older.duckdb").read_bytes() == before
    assert not list(folder.glob("*.bak"))


# -- doctor ---------------------------------------------------------------------------------------------------------


def problems(catalog: Catalog) -> list[str]:
    return [f"{c.message}; {c.remedy}" for c in examine(catalog) if (c.name, c.state) == ("schema", "problem")]


@pytest.mark.parametrize("done", [name for name in REFUSED if "column" not in name and name != "another type"])
def test_doctor_names_what_the_commands_refuse_and_runs_none_of_it(folder: Path, done: str) -> None:
    catalog, named = refusable(folder, done)
    (said,) = problems(catalog)
    assert named in said
    assert MARKER not in said


def test_doctor_names_each_of_several(folder: Path) -> None:
    said = problems(tamper(folder, "CREATE MACRO count(x) AS 42", "CREATE MACRO max(x) AS 42"))
    assert [line.split(",")[0] for line in sorted(said)] == [
        "the file holds the macro count",
        "the file holds the macro max",
    ]


def test_doctor_compares_what_the_views_select_and_compact_mends_them(folder: Path) -> None:
    catalog = tamper(
        folder,
        "CREATE OR REPLACE VIEW suspect_gold AS SELECT * FROM problem WHERE pass_rate = 0 AND majority_n >= 2",
        "CREATE OR REPLACE VIEW excluded AS SELECT c.problem_id, p.source, p.source_row, c.evaluation_source, "
        "c.evaluation_row, c.n, c.n_shared, c.share, c.evidence, p.question, p.answer, c.evaluation_revision, "
        "c.found_at FROM contaminations c JOIN problems p ON p.problem_id = c.problem_id",
        "DROP VIEW judgement",
    )
    (said,) = problems(catalog)
    assert "view judgement missing and view suspect_gold changed; " in said
    assert "calset compact --catalog" in said
    calset.compact(catalog)
    assert problems(catalog) == []
    assert json.dumps(catalog.query("FROM judgement").as_dicts()) == "[]"


@pytest.mark.parametrize(
    "value", ["repeat('[', 3000) || repeat(']', 3000)", "'{\"a\": ' || repeat('9', 5000) || '}'", "'[1]'"]
)
@pytest.mark.parametrize("command", ["show", "report", "publish"])
def test_json_that_calset_did_not_write_is_one_line(
    folder: Path, value: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(folder, f"UPDATE runs SET sampling = {value}", f"UPDATE problems SET metadata = {value}")
    code, _, said, _ = run(folder, COMMANDS[command], capsys)
    assert code == 2
    assert "that calset did not write" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("statement", "command"),
    [
        ("UPDATE subsets SET created_at = '290000-01-01'", "export"),
        ("UPDATE trace_tokens SET completion_ids = list_prepend(NULL, completion_ids)", "select"),
        ("UPDATE traces SET n_prompt_tokens = -1", "select"),
        ("UPDATE trace_tokens SET prompt_ids = NULL", "select"),
        ("UPDATE traces SET n_tokens = -5", "select"),
        ("DELETE FROM trace_tokens", "select"),
        ("DELETE FROM trace_tokens", "show"),
        ("UPDATE subset_items SET n_prompt_tokens = -1", "export"),
    ],
)
def test_rows_that_calset_did_not_write_are_one_line_or_harmless(
    folder: Path, statement: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(folder, statement)
    code, _, said, _ = run(folder, COMMANDS[command], capsys)
    assert code in (0, 1, 2)
    assert "Traceback" not in said
    assert not code or said.splitlines()[-1].startswith("calset: ")


@pytest.mark.parametrize("command", ["export", "diff", "report", "publish"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE published_rows SET messages = repeat('[', 3000) || repeat(']', 3000)",
        "UPDATE published_rows SET messages = '[1]'",
        "UPDATE published_rows SET messages = '{\"role\": 3}'",
        "UPDATE published_rows SET difficulty = 'NaN'",
        "UPDATE published_rows SET verdict = NULL, question = NULL, difficulty = -1e300",
        "UPDATE published_rows SET position = 0",
        "DELETE FROM published_rows WHERE position = 1",
        "UPDATE subsets SET origin = '{\"hub\": 3}'",
        "UPDATE subsets SET origin = '{\"hub\": {}}'",
        "UPDATE subsets SET origin = '{}'",
    ],
)
def test_published_rows_that_calset_did_not_write_are_one_line_or_harmless(
    folder: Path, statement: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = Catalog(folder / "c.duckdb")
    keep_as_pulled(catalog, load(catalog, "all@1"), folder / "pulled.duckdb").path.replace(catalog.path)
    tamper(folder, statement)
    code, out, said, _ = run(folder, COMMANDS[command], capsys)
    assert code in (0, 1, 2)
    assert "Traceback" not in said
    assert "nan" not in out.lower()
    assert not code or said.splitlines()[-1].startswith("calset: ")
    if "position" in statement:
        assert (code, "calset doctor" in said) == (1, True)
        if statement.startswith("DELETE"):
            assert any("published rows than samples" in c.message for c in examine(catalog))


def test_the_statement_that_takes_a_schema_out_is_said_whole(folder: Path) -> None:
    other = tamper(folder, "CREATE SCHEMA more", "CREATE TABLE more.t (x INTEGER)")
    with pytest.raises(InputError, match='DROP SCHEMA "more" CASCADE takes it out'):
        calset.merge(folder / "new.duckdb", other)
