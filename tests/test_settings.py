"""Settings: made from the public keyword parameters, checked at once, each bad value one line that names it."""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.engines import Sampling
from calset.builder.generate import build
from calset.builder.settings import MAX_SAMPLES, BuildOptions, BuildSettings
from calset.errors import InputError


def defaults_of(settings: type) -> dict[str, Any]:
    return {each.name: each.default for each in fields(settings) if each.init}


def keywords_of(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {each.name: MISSING if each.default is each.empty else each.default for each in found}


def test_a_builds_settings_are_its_keyword_parameters_with_their_defaults() -> None:
    keywords = keywords_of(build)
    assert {name: keywords.pop(name) for name in ("catalog", "progress")} == {"catalog": None, "progress": None}
    assert keywords == defaults_of(BuildSettings)
    assert BuildOptions.__annotations__.keys() == keywords.keys() - {"model", "problems"}


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


def test_settings_cannot_be_changed() -> None:
    settings = BuildSettings("org/model", "gsm8k")
    with pytest.raises(FrozenInstanceError):
        settings.samples = 5  # type: ignore[misc]


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
