#!/usr/bin/env bash
# Ray Data 2.60.0: a Parquet column of numpy arrays is a list or a struct, by whether the arrays happen to be of one length.
#
# Token ids as numpy arrays: if all rows of a block have the same length, the file holds lists; if not, structs of "data" and
# "shape". Other readers then find two types under one name, from file to file. Python lists (ids.tolist()) are always lists.
#
# Output seen (pyarrow 26.0.1, numpy 2.4.6, November 2026), the types as a reader without Ray sees them:
#   equal lengths: large_list; unequal lengths: struct; lists: list
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[data]==2.60.0" pyarrow==26.0.1 numpy==2.4.6
cat >"$work/write.py" <<'PY'
import sys

import numpy as np
import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
for name, lengths, made in (("equal", (3, 3), np.arange), ("unequal", (3, 2), np.arange), ("lists", (3, 2), range)):
    rows = ray.data.from_items([{"i": i} for i in range(2)], override_num_blocks=1)
    wanted = list if made is range else np.asarray
    rows.map(lambda row: {"ids": wanted(made(lengths[row["i"]]))}).write_parquet(f"{sys.argv[1]}/{name}")
PY
cat >"$work/read.py" <<'PY'
import glob
import sys

import pyarrow.parquet as pq

kinds = {}
for name in ("equal", "unequal", "lists"):
    (path,) = glob.glob(f"{sys.argv[1]}/{name}/*.parquet")
    kinds[name] = str(pq.read_schema(path).field("ids").type).split("<")[0].split("[")[0]
assert kinds["unequal"] == "struct" and kinds["equal"] != "struct" and kinds["lists"] == "list", f"changed: {kinds}"
print(f"equal lengths: {kinds['equal']}; unequal lengths: {kinds['unequal']}; lists: {kinds['lists']}")
PY
"$work/venv/bin/python" "$work/write.py" "$work" >"$work/log" 2>&1 || { tail -n 20 "$work/log"; exit 1; }
"$work/venv/bin/python" "$work/read.py" "$work"
