"""Planning a build without a GPU: what is counted, what is estimated, and from where."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import fill, make_run
from hypothesis import given
from hypothesis import strategies as st

from calset import InputError, bundled
from calset.builder.cost import (
    ASSUMED,
    RATES,
    LengthHistory,
    Parameters,
    PlanReport,
    estimate,
    length_history,
    nearest,
    parameters,
)
from calset.builder.model.info import ModelInfo, inspect

NO_GPU = {"cpu": "a cpu", "cpus": 2, "gpus": []}


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return inspect(bundled.MODEL)


def plan(info: ModelInfo, **changes: Any) -> PlanReport:
    given: dict[str, Any] = {
        "n_problems": 100,
        "n_requested": 400,
        "n_existing": 100,
        "prompt_tokens": 5000,
        "max_tokens": 500,
        "hardware": NO_GPU,
    }
    return estimate(info, info.prompt_ids("What is 1 + 2?"), **{**given, **changes})


def test_the_first_prompt_is_shown_as_it_is_served(info: ModelInfo) -> None:
    report = plan(info)
    ids = info.prompt_ids("What is 1 + 2?")
    assert report.first_prompt_tokens == len(ids)
    assert tuple(info.tokenizer(report.first_prompt, add_special_tokens=False).input_ids) == ids
    assert "What is 1 + 2?" in report.first_prompt
    assert report.first_prompt != info.decode(ids)  # special tokens are visible
    assert report.lines()[-1] == report.first_prompt


def test_hours_and_tokens_follow_from_the_given_rate(info: ModelInfo) -> None:
    history = LengthHistory(n=50, mean=200.0, p25=100.0, p75=250.0, n_truncated=0, max_tokens=500)
    report = plan(info, tokens_per_second=1000.0, history=history, n_devices=4, gpu="H100")
    assert report.n_todo == 300
    assert report.completion_tokens.expected == 300 * 200
    assert report.wall_hours.expected == pytest.approx(60_000 / 1000 / 3600)
    assert report.device_hours.expected == pytest.approx(4 * 60_000 / 1000 / 3600)
    assert (report.rate_from, report.scaled) == ("given", False)


def test_nothing_left_to_do_costs_nothing(info: ModelInfo) -> None:
    report = plan(info, n_existing=400)
    assert (report.n_todo, report.completion_tokens.high, report.wall_hours.high) == (0, 0, 0)


def test_without_a_gpu_a_small_model_is_planned_for_the_cpu_and_a_named_gpu_wins(info: ModelInfo) -> None:
    here, there = plan(info), plan(info, gpu="H200", n_devices=2)
    assert (here.device, there.device, there.n_devices) == ("CPU", "H200", 2)
    assert "calset's tiny LRM" in here.rate_from
    assert there.scaled
    assert any("coarse" in warning for warning in there.warnings)
    two, one = plan(info, gpu="H200", n_devices=2), plan(info, gpu="H200", n_devices=1)
    assert two.wall_hours.expected == pytest.approx(one.wall_hours.expected / 2)
    assert two.device_hours.expected == pytest.approx(one.device_hours.expected)


def test_the_gpus_that_are_here_are_used(info: ModelInfo) -> None:
    report = plan(info, hardware={"gpus": ["NVIDIA H100 80GB HBM3"] * 8})
    assert (report.device, report.n_devices) == ("H100", 8)
    with pytest.raises(InputError, match="tokens-per-second"):
        plan(info, hardware={"gpus": ["NVIDIA GeForce RTX 4090"]})
    assert plan(info, hardware={"gpus": ["NVIDIA GeForce RTX 4090"]}, tokens_per_second=10.0).n_devices == 1


def test_lengths_are_assumed_by_family_and_cut_at_the_limit(info: ModelInfo) -> None:
    thinking = plan(info, max_tokens=100_000)
    assert thinking.tokens_per_trace == ASSUMED[True]
    plain = replace(info, reasoning=replace(info.reasoning, name="none"))
    assert plan(plain, max_tokens=100_000).tokens_per_trace == ASSUMED[False]
    assert plan(info, max_tokens=500).tokens_per_trace.high == 500


def test_earlier_traces_that_were_cut_make_a_warning(info: ModelInfo) -> None:
    history = LengthHistory(n=10, mean=90.0, p25=80.0, p75=100.0, n_truncated=4, max_tokens=100)
    assert any("40%" in warning for warning in plan(info, history=history, max_tokens=500).warnings)
    assert not any("cut" in warning for warning in plan(info, history=history, max_tokens=100).warnings)


def test_history_is_of_the_generation_key_or_else_of_the_model(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 10), ("truncated", 30)], [("correct", 20), ("incorrect", 40)]])
    run = make_run()
    want = LengthHistory(n=4, mean=25.0, p25=17.5, p75=32.5, n_truncated=1, max_tokens=64)
    assert length_history(catalog, model=run.model, generation_key=run.generation_key) == want
    assert length_history(catalog, model=run.model, generation_key="another") == want
    assert length_history(catalog, model="another", generation_key="another") is None
    assert length_history(type(catalog)(tmp_path / "none.duckdb"), model=run.model) is None


def test_parameters_are_counted_from_headers_and_from_the_config(info: ModelInfo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    real = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(bundled.MODEL).parameters())
    assert parameters(info) == Parameters(real, real, 16, "safetensors headers")
    shutil.copytree(bundled.MODEL, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    hub = replace(info, folder=tmp_path / "m", location=str(tmp_path / "m"))
    assert parameters(hub) == Parameters(real, real, 16, "config")


def test_experts_that_a_token_does_not_visit_are_not_active(info: ModelInfo, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = parameters(replace(info, folder=tmp_path, location=str(tmp_path)))
    assert found is not None
    routed = 2 * 8 * 3 * 16 * 8  # layers, experts, matrices of hidden x intermediate
    assert found.total - found.active == routed * 6 // 8


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 64}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4"},
            8,
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "quanto", "weights": "int4", "activations": None}, 4),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 4}}},
            },
            8,
        ),
    ],
)
def test_the_bits_of_quantised_weights_are_read_from_their_settings(info, tmp_path, settings, bits) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                quantization_config=settings).save_pretrained(tmp_path)  # fmt: skip
    found = parameters(replace(info, folder=tmp_path, location=str(tmp_path)))
    assert found is not None
    assert found.bits == bits


def test_weights_that_do_not_fit_are_said(info: ModelInfo, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    big = replace(info, folder=tmp_path, location=str(tmp_path))
    report = plan(big, gpu="H100", n_devices=1)
    assert "Llama 3.1 70B" in report.rate_from
    assert any("at least 2 x H100" in warning for warning in report.warnings)
    assert not any("needed" in warning for warning in plan(big, gpu="H100", n_devices=4).warnings)
    assert plan(big).device == "H100"  # too large for a CPU


SIZES = st.floats(1e6, 1e12)


@given(SIZES, st.sampled_from([4, 8, 16]))
def test_the_row_is_the_nearest_of_the_same_bits(active: float, bits: int) -> None:
    rows = [row for row in RATES if row.device == "H100"]
    row = nearest(rows, Parameters(int(active), int(active), bits, "test"))
    same = [other for other in rows if other.bits == bits] or rows

    def distance(n: float) -> float:
        return max(n / active, active / n)

    assert distance(row.n_active) == pytest.approx(min(distance(other.n_active) for other in same), rel=1e-5)


def test_every_row_is_cited() -> None:
    assert all("http" in row.citation or row.is_cpu for row in RATES)


@pytest.mark.parametrize(
    "bad",
    [{"n_existing": 401}, {"prompt_tokens": -1}, {"max_tokens": 0}, {"tokens_per_second": 0.0}, {"n_devices": 0},
     {"tokens_per_second": float("inf")}, {"gpu": "TPU"}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(info: ModelInfo, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        plan(info, **bad)


def test_too_long_prompts_and_a_full_disk_are_said(info: ModelInfo) -> None:
    report = plan(info, n_too_long=3, disk_free_bytes=1_000_000)
    assert any("3 prompts" in warning for warning in report.warnings)
    assert any("are free" in warning for warning in report.warnings)
    assert report.share_of_disk is not None
    assert report.share_of_disk > 1


def test_the_report_is_json(info: ModelInfo) -> None:
    record = json.loads(json.dumps(plan(info).as_dict()))
    assert record["completion_tokens"]["low"] <= record["completion_tokens"]["expected"]
    assert record["n_todo"] == 300
