"""Catalogs of an older schema, made of present ones: the rows as that schema kept them, in a file of its own DDL."""

from __future__ import annotations

from pathlib import Path

import duckdb

FIRST = (Path(__file__).parent / "schema1.sql").read_text(encoding="utf-8")


def as_first_schema(current: Path, older: Path) -> None:
    """Write the rows of ``current`` to ``older`` as the first schema: its tables, views and numbering of grades."""
    with duckdb.connect(str(older), config={"storage_compatibility_version": "v1.5.0"}) as con:
        con.execute(FIRST)
        con.execute(f"ATTACH '{current}' AS now (READ_ONLY)")
        of_older = "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database()"
        tables = [name for (name,) in con.execute(of_older).fetchall()]
        assert len(tables) > 10
        for table in tables:
            where = "WHERE number = 1" if table == "migrations" else ""
            columns = ", ".join(r[0] for r in con.execute(f"DESCRIBE {table}").fetchall())
            con.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM now.{table} {where}")
        con.execute("""
            UPDATE grades SET seq = g.n FROM (
                SELECT trace_id, attempt, seq, row_number() OVER (PARTITION BY trace_id, attempt ORDER BY seq) - 1 AS n
                FROM now.grades
            ) g WHERE (g.trace_id, g.attempt, g.seq) = (grades.trace_id, grades.attempt, grades.seq)
        """)
