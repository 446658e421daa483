#!/usr/bin/env bash
# pyarrow 26.0.1: a row whose list is empty is lost when a Parquet file is written with very small pages.
#
# One row of an empty list and a missing text, written with data_page_size=1: the footer counts one row, iter_batches()
# gives none and no error, read_table() raises "expected length 0 but got length 1". With pages of the usual size all is
# well. A reader that streams batches has to compare what it got with the footer's number of rows.
#
# Output seen (November 2026):
#   footer 1 row, iter_batches 0 rows, read_table: Column 1 named text expected length 0 but got length 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1
"$work/venv/bin/python" - "$work/rows.parquet" <<'PY'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
rows = pa.table({"ids": pa.array([[]], pa.list_(pa.int32())), "text": pa.array([None], pa.string())})
pq.write_table(rows, path)
assert pq.read_table(path).num_rows == 1, "changed: pages of the usual size"
pq.write_table(rows, path, data_page_size=1)
counted = pq.read_metadata(path).num_rows
streamed = sum(batch.num_rows for batch in pq.ParquetFile(path).iter_batches())
try:
    said = f"{pq.read_table(path).num_rows} rows"
except pa.ArrowInvalid as error:
    said = str(error)
assert (counted, streamed) == (1, 0) and "expected length 0" in said, f"changed: {counted}, {streamed}, {said}"
print(f"footer {counted} row, iter_batches {streamed} rows, read_table: {said}")
PY
