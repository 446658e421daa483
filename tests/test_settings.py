"""Settings: made from the public keyword parameters, checked at once, each bad value one line that names it."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import make_subset

import calset
from calset.builder.engines import Sampling
from calset.builder.settings import MAX_SAMPLES, BuildOptions, BuildSettings, GenerationOptions
from calset.catalog.filters import Filter
from calset.catalog.subsets.recipes import Recipe, RecipeOptions
from calset.errors import InputError, Stopped
from calset.pruning.blockwise.workfolder import PROGRESS, folder_of
from calset.pruning.settings import PruneOptions, PruneSettings


def defaults_of(settings: type) -> dict[str, Any]:
    return {each.name: each.default for each in fields(settings) if each.init}


def keywords_of(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {each.name: MISSING if each.default is each.empty else each.default for each in found}


def test_a_builds_settings_are_its_keyword_parameters_with_their_defaults() -> None:
    keywords = keywords_of(calset.build)
    assert {name: keywords.pop(name) for name in ("catalog", "progress")} == {"catalog": None, "progress": None}
    assert keywords == defaults_of(BuildSettings)
    assert BuildOptions.__annotations__.keys() == keywords.keys() - {"model", "problems"}
    shared = keywords_of(calset.evaluate).keys() - {"model", "problems", "samples", "catalog", "progress"}
    assert GenerationOptions.__annotations__.keys() == shared


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"problems": ()}, "no problems given"),
        ({"samples": 0}, "samples must be at least 1 and at most 1,000,000, not 0"),
        ({"seed": -(2**64)}, "seed must be a whole number of at most 63 bits"),
        ({"retry": ["wrong"]}, "retry takes truncated and error, not 'wrong'"),
        ({"kind": "test"}, "kind must be one of build, evaluate, not 'test'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"limit": -1}, "limit must be at least 1, not -1"),
        ({"graders": 0}, "graders must be at least 1, not 0"),
        ({"commit_size": 0}, "commit_size must be at least 1, not 0"),
        ({"commit_every_seconds": -1.0}, "commit_every_seconds must be at least 0 and finite, not -1.0"),
        ({"commit_every_seconds": math.nan}, "commit_every_seconds must be at least 0 and finite, not nan"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1, not 0"),
        ({"temperature": 3.0}, "temperature must lie between 0 and 2, not 3.0"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], not 0.0"),
        ({"top_k": -1}, "top_k must be 0 (off) or positive, not -1"),
        ({"engine": "sglang"}, "unknown engine 'sglang'"),
        ({"engine_options": {"model": "other"}}, "model is no engine option"),
        ({"need": 3}, "need is for an adaptive build"),
        ({"confidence": 0.9}, "confidence is for an adaptive build"),
        ({"target": "ssgr"}, "takes one of need (samples) and need_tokens, not neither"),
        ({"target": "ssgr", "need": 3, "graded": False}, "cannot run ungraded"),
        ({"target": "ssgr", "need": 3, "samples": 1001}, "takes 1 to 1000 samples a problem, not 1001"),
    ],
)
def test_a_bad_build_setting_is_one_line_that_names_it(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as refused:
        BuildSettings(**{"model": "org/model", "problems": "gsm8k", **options})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_prunings_settings_are_its_keyword_parameters_with_their_defaults() -> None:
    keywords = keywords_of(calset.prune)
    data = {name: keywords.pop(name) for name in ("calibration", "token_weights", "catalog", "progress")}
    assert data == {"calibration": MISSING, "token_weights": None, "catalog": None, "progress": None}
    assert keywords == defaults_of(PruneSettings)
    assert PruneOptions.__annotations__.keys() == keywords.keys() - {"model", "out"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "obs"}, "there is no pruning method 'obs'"),
        ({"sparsity": None}, "give either a sparsity (0.5) or a pattern (2:4)"),
        ({"pattern": "2:4"}, "give either a sparsity (0.5) or a pattern (2:4)"),
        ({"sparsity": 1.0}, "sparsity is the share of zeros, between 0 and 1, not 1.0"),
        ({"sparsity": None, "pattern": "4:2"}, "pattern 4:2 keeps 4 of every 2 weights"),
        ({"sparsity": None, "pattern": "half"}, "a pattern is N:M"),
        ({"sparsity": None, "pattern": "2:4", "allocation": "owl"}, "--allocation owl takes --sparsity instead"),
        ({"tokens": "some"}, "tokens must be one of all, completion, prompt, not 'some'"),
        ({"propagate": "both"}, "propagate must be one of pruned, dense, not 'both'"),
        ({"group": "column"}, "group must be one of row, block, matrix, not 'column'"),
        ({"hidden": "tape"}, "hidden must be one of device, host, disk, not 'tape'"),
        ({"damping": 0.0}, "damping is a positive share of the mean diagonal"),
        ({"damping": math.nan}, "damping is a positive share of the mean diagonal"),
        ({"block_size": 0}, "block_size must be a positive number of columns, not 0"),
        ({"batch_tokens": 0}, "batch_tokens must be positive, not 0"),
        ({"max_length": -1}, "max_length must be positive, not -1"),
        ({"include": ["("]}, "'(' is no regular expression"),
        ({"exclude": ["["]}, "'[' is no regular expression"),
        ({"method": "reap+dsnot"}, "reap drops experts: it has no mask"),
        ({"method": "depth", "sparsity": None}, "depth takes --sparsity, the share of the blocks that go"),
        ({"method": "depth", "sparsity": 2.0}, "sparsity must be between 0 and 1, not 2.0"),
        ({"method": "reap", "group": "row"}, "--group is about zeros within matrices, and reap drops whole experts"),
        ({"method": "depth", "exclude": ["q_proj"]}, "--exclude is about zeros within matrices"),
    ],
)
def test_a_bad_prune_setting_is_one_line_that_names_it(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as refused:
        PruneSettings("org/model", "out", **{"sparsity": 0.5, **options})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@given(
    st.sampled_from(["magnitude", "wanda", "sparsegpt", "sparsegpt+dsnot"]),
    st.floats(0, 1, exclude_min=True, exclude_max=True) | st.tuples(st.integers(1, 7), st.integers(8, 16)),
    st.sampled_from([None, "row", "matrix"]),
)
def test_a_selection_is_what_was_set_or_the_methods_own(method: str, how: Any, group: Any) -> None:
    share = {"pattern": f"{how[0]}:{how[1]}"} if isinstance(how, tuple) else {"sparsity": how}
    settings = PruneSettings("org/model", "out", method=method, group=group, **share)
    selection = settings.selection
    assert selection.group == (group or {"magnitude": "matrix", "wanda": "row"}.get(method, "block"))
    assert (selection.sparsity, selection.pattern and str(selection.pattern)) == (
        share.get("sparsity"),
        share.get("pattern"),
    )
    assert settings.uses_data == (method != "magnitude")


# What a work folder keeps of a run, and compares when the run is continued.
IDENTITY = {
    "method", "sparsity", "pattern", "tokens", "propagate", "group", "allocation", "token_weights", "damping",
    "block_size", "batch_tokens", "max_length", "include", "exclude", "allow_partial", "model revision", "calibration",
    "device", "threads", "kernel", "processes", "versions",
}  # fmt: skip


@pytest.mark.parametrize("method", ["wanda", "depth"])
def test_a_work_folder_keeps_what_decides_the_result_and_refuses_anything_else(tmp_path, llama, method: str) -> None:
    out = tmp_path / "out"

    def stop(event: Any) -> None:
        if event.phase in ("pruning", "measuring") and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        calset.prune(llama, make_subset(), out, method=method, sparsity=0.5, progress=stop)
    first = (folder_of(out) / PROGRESS).read_text().splitlines()[0]
    assert json.loads(first)["settings"].keys() == IDENTITY
    with pytest.raises(InputError, match="had tokens 'all', not 'completion'"):
        calset.prune(llama, make_subset(), out, method=method, sparsity=0.5, tokens="completion")
    report = calset.prune(llama, make_subset(), out, method=method, sparsity=0.5, hidden="disk", force=True)
    assert report.resumed_at == (1,)


def test_settings_cannot_be_changed() -> None:
    for settings in (BuildSettings("org/model", "gsm8k"), PruneSettings("org/model", "out", sparsity=0.5)):
        with pytest.raises(FrozenInstanceError):
            settings.model = "org/other"  # type: ignore[misc]


def test_help_lists_the_keywords_of_options() -> None:
    fields_of = {each.name for each in fields(Recipe)} - {"name", "kind"}
    assert RecipeOptions.__annotations__.keys() == fields_of
    assert keywords_of(calset.select).keys() >= fields_of
    assert (
        keywords_of(calset.dry_run).keys() - {"tokens_per_second", "gpu", "n_devices"}
        == keywords_of(calset.build).keys()
    )
    assert keywords_of(calset.prune).keys() - {"progress"} == keywords_of(calset.plan_pruning).keys()
    assert keywords_of(calset.Catalog.traces).keys() == {each.name for each in fields(Filter)} | {
        "self", "columns", "limit"
    }  # fmt: skip
    assert "length_quantiles: 'tuple[float, float] | None' = ..." in str(inspect.signature(calset.select))


RANGES = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 10**6),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 10, exclude_min=True),
}


@given(st.fixed_dictionaries({}, optional=RANGES), st.fixed_dictionaries(RANGES), st.integers(1, MAX_SAMPLES))
def test_sampling_is_the_models_own_but_for_what_is_set(own_values: dict, model: dict, samples: int) -> None:
    settings = BuildSettings("org/model", ["a.jsonl", "b.jsonl"], samples=samples, **own_values)
    assert settings.sampling(Sampling(**model)) == Sampling(**{**model, **own_values})
    assert settings.specs == ("a.jsonl", "b.jsonl")
