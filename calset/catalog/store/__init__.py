"""The DuckDB file: connections, schema, migrations, values. Must not know what a question or a subset is."""
