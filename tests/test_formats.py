"""Reasoning formats, sampling defaults and template options on real tokenizers and model folders of each family.

The tokenizers are byte-level BPE with each family's special tokens, the templates short ones with the family's turns:
what decides a format is there, the vocabulary is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calset import bundled, ids
from calset.builder.model.families import FAMILIES
from calset.builder.model.info import ModelInfo, inspect
from calset.builder.model.reasoning import split
from calset.errors import InputError

CHATML = (
    "{%- if messages[0].role != 'system' %}{{ SYSTEM }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + SEP + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant' + SEP }}TAIL{%- endif %}"
)
HARMONY = """{{- '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\nReasoning: ' + (reasoning_effort | default('medium')) }}
{{- '\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
MISTRAL = """{{- '<s>' }}{%- if messages[0].role == 'system' %}
{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- else %}
{{- '[SYSTEM_PROMPT]First think: OPENyour thoughtsCLOSE then answer.[/SYSTEM_PROMPT]' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"""


def chatml(*, system: str = "", sep: str = "\n", tail: str = "") -> str:
    lines = f"<|im_start|>system{sep}{system}<|im_end|>\n" if system else ""
    text = CHATML.replace("SYSTEM", json.dumps(lines)).replace("SEP", json.dumps(sep))
    return text.replace("TAIL", tail)


QWEN_TAIL = (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Made:
    """A family as its checkpoints have it. ``special`` tokens vanish from decoded text, ``added`` ones do not."""

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    model_type: str = "qwen3"
    marks: tuple[str, str] = ("<think>", "</think>")
    opened: bool = False
    form: str = "think"


THINK = ("<think>", "</think>")
IM = ("<|im_end|>", "<|im_start|>")  # the end token first
MADE = {
    "qwen3": Made(chatml(tail=QWEN_TAIL), IM, THINK),
    "qwen3-thinking": Made(chatml(tail="{{ '<think>\n' }}"), IM, THINK, opened=True),
    "deepseek-r1": Made(
        "{{ '<\uff5cbegin\uff5c>' }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
        "{%- elif m.role == 'assistant' %}{{ '<\uff5cAssistant\uff5c>' + m.content + '<\uff5cend\uff5c>' }}{%- else %}"
        "{{ m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{%- endif %}",
        ("<\uff5cend\uff5c>", "<\uff5cbegin\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        THINK,
        model_type="qwen2",
        opened=True,
    ),
    "phi-4-reasoning": Made(
        chatml(system="You are Phi. Think in <think> and </think>.", sep="<|im_sep|>"),
        (*IM, "<|im_sep|>"),
        THINK,
        model_type="phi3",
    ),
    "magistral-2506": Made(
        MISTRAL.replace("OPEN", "<think>").replace("CLOSE", "</think>"),
        ("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        model_type="mistral",
    ),
    "magistral-2507": Made(
        MISTRAL.replace("OPEN", "[THINK]").replace("CLOSE", "[/THINK]"),
        ("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
        model_type="mistral",
        marks=("[THINK]", "[/THINK]"),
        form="mistral",
    ),
    "seed-oss": Made(
        chatml(), IM, ("<seed:think>", "</seed:think>"), "seed_oss", ("<seed:think>", "</seed:think>"), False, "seed"
    ),
    "gemma-4": Made(
        chatml(), (*IM, "<|channel>", "<channel|>"), (), "gemma4", ("<|channel>", "<channel|>"), False, "gemma"
    ),
    "cohere": Made(
        chatml(),
        (*IM, "<|START_THINKING|>", "<|END_THINKING|>"),
        (),
        "cohere2",
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        False,
        "cohere",
    ),
    "minimax": Made(
        chatml(), IM, ("<mm:think>", "</mm:think>"), "minimax", ("<mm:think>", "</mm:think>"), False, "minimax"
    ),
}
HARMONY_TOKENS = ("return", "start", "end", "message", "channel", "constrain", "call")
GPT_OSS = Made(HARMONY, tuple(f"<|{name}|>" for name in HARMONY_TOKENS), (), "gpt_oss", ("", ""), False, "harmony")


def make_tokenizer(made: Made) -> Any:
    """Byte-level BPE whose few merges straddle the ends of plain-text marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(">", "Ċ"), ("<", "/"), ("ĊĊ"[0], "<"), ("t", "h"), ("Ġ", "<")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(made.special))
    tokenizer.add_tokens(list(made.added))
    made_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=made.special[0])
    # The others are special too: decoding drops them, as the models' own tokenizers do.
    made_tokenizer.add_special_tokens({"additional_special_tokens": list(made.special[1:])})
    made_tokenizer.chat_template = made.template
    return made_tokenizer


def make_folder(folder: Path, made: Made, **generation: Any) -> Path:
    """The bundled model with another family's tokenizer, template and config type."""
    shutil.copytree(bundled.MODEL, folder, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*", "README*"))
    tokenizer = make_tokenizer(made)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if made.model_type != "qwen3":
        config = {"model_type": made.model_type, "max_position_embeddings": 2048, "architectures": ["X"]}
        if made.model_type == "gemma4":
            config["text_config"] = {"model_type": "gemma4_text", "max_position_embeddings": 2048}
    config |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id, **generation}))
    return folder


@pytest.fixture(scope="module")
def infos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelInfo]:
    folder = tmp_path_factory.mktemp("families")
    return {name: inspect(make_folder(folder / name, made)) for name, made in {**MADE, "gpt-oss": GPT_OSS}.items()}


# --- detection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MADE, "gpt-oss"])
def test_a_format_is_told_from_tokenizer_and_template(infos: dict[str, ModelInfo], name: str) -> None:
    made, form = {**MADE, "gpt-oss": GPT_OSS}[name], infos[name].reasoning
    assert (form.name, form.opened_by_template) == (made.form, made.opened)
    assert (form.open_id is not None) == (made.marks[0] in (*made.special, *made.added))
    assert (form.channels is not None) == (name == "gpt-oss")


def test_the_marks_of_the_template_go_before_those_that_only_the_tokenizer_knows() -> None:
    from calset.builder.model.reasoning import detect

    made = replace(MADE["magistral-2507"], added=THINK)  # a tokenizer that serves several models
    assert detect(make_tokenizer(made), made.template).name == "mistral"


def test_every_familys_prompt_is_the_one_that_transformers_makes(infos: dict[str, ModelInfo]) -> None:
    """Special tokens and all, also where a template adds a system prompt."""
    for info in infos.values():
        messages = [{"role": "user", "content": " <think>1 + 1?</think>\n"}]
        wanted = info.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert info.prompt_ids(messages[0]["content"]) == tuple(wanted)


def test_a_template_option_decides_whether_the_prompt_opens_the_thinking(tmp_path: Path) -> None:
    tail = "{%- if thinking %}{{ '<think>\n' }}{%- endif %}"
    folder = make_folder(tmp_path / "m", replace(MADE["qwen3"], template=chatml(tail=tail)))
    assert not inspect(folder).reasoning.opened_by_template
    on = inspect(folder, template_options={"thinking": True})
    assert on.reasoning.opened_by_template
    assert on.tokenizer.decode(on.prompt_ids("1+1?")).endswith("assistant\n<think>\n")


def test_disabled_thinking_gives_an_answer_without_marks(infos: dict[str, ModelInfo]) -> None:
    info = inspect(infos["qwen3"].folder, template_options={"enable_thinking": False})
    assert info.tokenizer.decode(info.prompt_ids("1+1?")).endswith("<think>\n\n</think>\n\n")
    answer = info.tokenizer.encode("It is 2.<|im_end|>", add_special_tokens=False)
    assert not info.reasoning.opened_by_template
    assert split(answer, info.reasoning, info.decode).response == "It is 2."


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "add_generation_prompt", "tools", "a b"])
def test_an_option_that_would_do_nothing_is_refused(infos: dict[str, ModelInfo], name: str) -> None:
    with pytest.raises(InputError, match="option"):
        inspect(infos["qwen3"].folder, template_options={name: False})


def test_template_options_are_part_of_a_traces_identity() -> None:
    facts: dict[str, Any] = {
        "model": "m", "revision": "r", "tokenizer_hash": "t", "chat_template_hash": "c", "system_prompt": None,
        "sampling": {"temperature": 1.0},
    }  # fmt: skip
    plain = ids.generation_key(**facts)
    keys = [ids.generation_key(**facts, template_options=o) for o in ({"a": 1}, {"a": 2}, {"b": 1})]
    assert len({plain, *keys}) == 4
    assert ids.generation_key(**facts, template_options={}) == plain == ids.generation_key(**facts)


# --- cutting ------------------------------------------------------------------------------------------------------

WORDS = st.text(alphabet="ab 7\n\\é😀<>/[]|", max_size=12).filter(
    lambda t: not any(mark in t for made in MADE.values() for mark in made.marks)
)
LAWS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("name", MADE)
@LAWS
@given(
    thoughts=st.lists(WORDS, min_size=1, max_size=3),
    between=WORDS,
    answer=WORDS,
    closed=st.booleans(),
    ended=st.booleans(),
)
def test_a_pair_of_marks_cuts_thinking_from_answer(
    infos: dict[str, ModelInfo],
    name: str,
    thoughts: list[str],
    between: str,
    answer: str,
    closed: bool,
    ended: bool,
) -> None:
    """Thoughts are marked by Q, text between them by Z, the answer by W; no other piece holds these letters."""
    info, made = infos[name], MADE[name]
    start, stop = made.marks
    pieces = []
    for i, thought in enumerate(thoughts):
        pieces += [] if made.opened and i == 0 else [start]
        pieces += [f"Q{thought}Q", stop, f"Z{between}Z"]
    pieces[-1] = f"W{answer}W"
    text = "".join(pieces if closed else pieces[:-2]) + (made.special[0] if ended else "")
    completion = info.tokenizer.encode(text, add_special_tokens=False)
    parts = split(completion, info.reasoning, info.decode)
    if not closed:
        assert (parts.answer_start, parts.response, parts.reasoning_end) == (-1, "", len(completion))
        return
    assert parts.response == f"W{answer}W"
    assert 0 <= parts.reasoning_start <= parts.reasoning_end <= parts.answer_start <= len(completion)
    first = info.tokenizer.decode(completion[: parts.reasoning_start])
    thinking = info.tokenizer.decode(completion[parts.reasoning_start : parts.reasoning_end])
    rest = info.tokenizer.decode(completion[parts.answer_start :])
    assert "Q" not in first
    assert thinking.count("Q") == 2 * len(thoughts)
    assert rest.count("W") == 2


@pytest.mark.parametrize("name", MADE)
def test_a_completion_without_marks_is_an_answer_unless_the_prompt_opened_the_thinking(
    infos: dict[str, ModelInfo], name: str
) -> None:
    info, made = infos[name], MADE[name]
    completion = info.tokenizer.encode(f"It is 7.{made.special[0]}", add_special_tokens=False)
    assert split(completion, info.reasoning, info.decode).response == ("" if made.opened else "It is 7.")


def test_a_loop_of_plain_text_marks_is_decoded_a_few_times_in_all(infos: dict[str, ModelInfo]) -> None:
    """A pruned model that repeats its marks 4,000 times: each mark must not cost a decoding of the whole."""
    decoded = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return info.decode(token_ids)

    info = infos["magistral-2506"]
    completion = info.tokenizer.encode("<think>x</think>y" * 4000, add_special_tokens=False)
    assert split(completion, info.reasoning, decode).response == "y"
    assert decoded < 100 * len(completion)


# --- harmony ------------------------------------------------------------------------------------------------------


def message(channel: str, text: str, header: str = "") -> str:
    return f"<|channel|>{channel}{header}<|message|>{text}"


def harmony(info: ModelInfo, text: str) -> tuple[Any, str, str]:
    """(parts, thinking, response) of a completion."""
    completion = info.tokenizer.encode(text, add_special_tokens=False)
    parts = split(completion, info.reasoning, info.decode)
    if parts.reasoning_start < 0:
        return parts, "", parts.response
    return parts, info.decode(completion[parts.reasoning_start : parts.reasoning_end]), parts.response


@pytest.mark.parametrize(
    ("text", "thinking", "response", "answered"),
    [
        ("<|channel|>analysis<|message|>2+2.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
         "2+2.", "4", True),
        ("<|channel|>final<|message|>4<|return|>", "", "4", True),
        ("<|channel|>final<|message|>4", "", "4", True),  # cut inside the answer: its finish reason says so
        ("<|channel|>analysis<|message|>it is \\boxed{4}", "it is \\boxed{4}", "", False),
        ("<|channel|>analysis<|message|>\\boxed{4}<|return|>", "\\boxed{4}", "", False),
        ("<|channel|>analysis<|message|>\\boxed{4}<|end|>", "\\boxed{4}", "", False),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fin", "a", "", False),
        ("<|channel|>ana", "", "", False),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f "
         "<|constrain|>json<|message|>{\"final\": 4}<|call|>", None, "", False),  # a tool call is no answer
        ("<|channel|>final<|message|>4<|end|><|start|>assistant<|channel|>analysis<|message|>or 5?", None, "", False),
        ("<|channel|>final<|constrain|>json<|message|>4<|return|>", "", "4", True),
        ("<|start|>assistant<|channel|>final<|message|>4<|end|>", "", "4", True),
        ("<|channel|>final<|message|>the final<|channel|> 4<|return|>", None, "", False),  # a header inside
        ("just 4<|return|>", "", "just 4", True),  # not a single channel: the model left its format
        ("", "", "", True),
        ("<|channel|>final<|message|>4<|end|>7", "", "4", True),  # text in no message
        ("<|channel|>final<|message|>4<|call|>7", "", "4", True),
        ("analysis<|message|>4<|return|>", "4", "", False),
    ],
)  # fmt: skip
def test_only_the_final_channel_is_an_answer(
    infos: dict[str, ModelInfo], text: str, thinking: str | None, response: str, answered: bool
) -> None:
    parts, thought, said = harmony(infos["gpt-oss"], text)
    assert said == response
    assert (parts.answer_start >= 0) == answered
    if thinking is not None:
        assert thought == thinking


@LAWS
@given(
    thoughts=st.lists(st.tuples(st.sampled_from(["analysis", "commentary"]), WORDS), max_size=4),
    answer=WORDS,
    cut=st.sampled_from(["", "in thought", "in header", "in answer"]),
)
def test_channels_cut_thinking_from_answer(
    infos: dict[str, ModelInfo], thoughts: list[tuple[str, str]], answer: str, cut: str
) -> None:
    info = infos["gpt-oss"]
    parts = [message(channel, f"Q{text}Q") for channel, text in thoughts]
    between = "<|end|><|start|>assistant"
    whole = between.join([*parts, message("final", f"W{answer}W")])
    text = {
        "": f"{whole}<|return|>",
        "in answer": whole,
        "in header": between.join([*parts, "<|channel|>fi"]),
        "in thought": between.join([*parts, message("analysis", "Q7")]),
    }[cut]
    completion = info.tokenizer.encode(text, add_special_tokens=False)
    cutting = split(completion, info.reasoning, info.decode)
    if cut in ("in header", "in thought"):
        assert (cutting.answer_start, cutting.response) == (-1, "")
        return
    assert cutting.response == f"W{answer}W"
    assert cutting.answer_start + len(info.tokenizer.encode(cutting.response)) + (cut == "") == len(completion)
    if not thoughts:
        assert (cutting.reasoning_start, cutting.reasoning_end) == (-1, -1)
        return
    assert 0 <= cutting.reasoning_start <= cutting.reasoning_end <= cutting.answer_start
    thinking = completion[cutting.reasoning_start : cutting.reasoning_end]
    assert info.decode(thinking).count("Q") == 2 * len(thoughts)


def test_a_prompt_that_ends_inside_a_message_is_seen(tmp_path: Path) -> None:
    for channel in ("analysis", "final"):
        tail = f"'<|start|>assistant<|channel|>{channel}<|message|>'"
        made = replace(GPT_OSS, template=HARMONY.replace("'<|start|>assistant' }}{%- endif", f"{tail} }}}}{{%- endif"))
        info = inspect(make_folder(tmp_path / channel, made))
        assert info.reasoning.prompt_channel == channel
        assert info.reasoning.opened_by_template == (channel == "analysis")
        parts, _, response = harmony(info, "4<|return|>")
        assert (response, parts.answer_start >= 0) == (("4", True) if channel == "final" else ("", False))


def test_a_harmony_trace_is_built_and_graded(tmp_path: Path, scripted_engine: Any) -> None:
    """Through build(): ids kept whole, marks in the text, a clean response, a verdict on the final channel only."""
    from calset import build
    from calset.catalog.catalog import Catalog

    info = inspect(make_folder(tmp_path / "m", GPT_OSS))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")
    said = message("analysis", "is it \\boxed{5}?") + "<|end|><|start|>assistant"
    for name, text, verdict in (
        ("whole", said + message("final", "\\boxed{4}") + "<|return|>", "correct"),
        ("cut", message("analysis", "it is \\boxed{4}"), "truncated"),
        ("ended", message("analysis", "it is \\boxed{4}") + "<|return|>", "no_answer"),
    ):
        token_ids = tuple(info.tokenizer.encode(text, add_special_tokens=False))
        reason = "length" if verdict == "truncated" else "stop"
        engine = scripted_engine(info.revision, token_ids=token_ids, finish_reason=reason)
        catalog = Catalog(tmp_path / f"{name}.duckdb")
        build(info.folder, str(tmp_path / "q.jsonl"), samples=1, engine=engine, catalog=catalog, graders=1)
        ((trace_id,),) = catalog.query("SELECT trace_id FROM trace").rows
        row = catalog.trace(trace_id)
        assert row["verdict"] == verdict
        assert row["response"] == ("\\boxed{4}" if verdict == "correct" else "")
        assert tuple(row["completion_ids"]) == token_ids
        assert row["text"].startswith("<|channel|>analysis<|message|>")
        assert row["run"]["reasoning_format"] == "harmony"


# --- sampling defaults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("qwen3", "qwen3"),
        ("qwen3-thinking", "qwen3"),
        ("deepseek-r1", "deepseek-r1"),
        ("phi-4-reasoning", "phi-4-reasoning"),
        ("magistral-2506", "magistral"),
        ("magistral-2507", "magistral"),
        ("gpt-oss", "gpt-oss"),
        ("seed-oss", None),
        ("cohere", None),
    ],
)
def test_what_generation_config_leaves_open_is_the_familys(
    infos: dict[str, ModelInfo], name: str, family: str | None
) -> None:
    info = infos[name]
    assert (info.family.name if info.family else None) == family
    recipe = next((dict(f.sampling) for f in FAMILIES if f.name == family), {})
    values = info.sampling.as_dict()
    assert {key: values[key] for key in recipe} == recipe
    assert {key for key, origin in info.sampling_from.items() if origin == f"family {family}"} == set(recipe)
    assert set(info.sampling_from) == set(values)


def test_generation_config_goes_before_the_family_field_by_field(tmp_path: Path) -> None:
    info = inspect(make_folder(tmp_path / "any-name", MADE["deepseek-r1"], temperature=0.9, top_k=7))
    assert (info.sampling.temperature, info.sampling.top_p, info.sampling.top_k) == (0.9, 0.95, 7)
    assert info.sampling_from == {
        "temperature": "generation_config",
        "top_p": "family deepseek-r1",
        "top_k": "generation_config",
        "min_p": "default",
        "repetition_penalty": "default",
    }


def test_a_qwen3_distilled_from_r1_is_deepseeks(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", replace(MADE["deepseek-r1"], model_type="qwen3"))
    info = inspect(folder)
    assert info.family is not None
    assert info.family.name == "deepseek-r1"


def test_another_architecture_with_a_familys_template_is_not_of_it(tmp_path: Path) -> None:
    assert inspect(make_folder(tmp_path / "m", replace(MADE["deepseek-r1"], model_type="seed_oss"))).family is None


def test_a_model_that_does_not_think_has_no_family(tmp_path: Path) -> None:
    info = inspect(make_folder(tmp_path / "m", replace(MADE["qwen3"], template=chatml(), added=())))
    assert info.family is None
    assert set(info.sampling_from.values()) == {"default"}


def test_a_system_prompt_that_the_template_adds_is_known(infos: dict[str, ModelInfo]) -> None:
    own = {name: info.template_system for name, info in infos.items()}
    assert own["qwen3"] is own["deepseek-r1"] is None
    assert own["phi-4-reasoning"] is not None
    assert own["phi-4-reasoning"] == "You are Phi. Think in <think> and </think>."
    assert own["magistral-2507"] is not None
    assert own["magistral-2507"].startswith("First think:")
    assert own["gpt-oss"] is not None
    assert own["gpt-oss"].startswith("You are ChatGPT.")


def test_what_a_sampler_should_know_is_said(infos: dict[str, ModelInfo], tiny_model: Path) -> None:
    assert inspect(tiny_model).remarks() == ()
    assert infos["seed-oss"].remarks("be brief") == ()
    (recipe,) = infos["deepseek-r1"].remarks()
    assert "temperature 0.6, top_p 0.95" in recipe
    assert "DeepSeek-R1" in recipe
    (left,) = infos["deepseek-r1"].remarks(given=["top_p"])
    assert "top_p" not in left
    assert infos["deepseek-r1"].remarks("be brief", ["temperature", "top_p"]) == (
        "deepseek-r1 is recommended to have no system prompt: put instructions into the question",
    )
    own = infos["phi-4-reasoning"].remarks()[-1]
    assert "You are Phi." in own
    assert not any("system prompt" in line for line in infos["phi-4-reasoning"].remarks("You are Phi."))
    assert "date" in infos["gpt-oss"].remarks()[-1]


def test_a_model_that_needs_its_system_prompt_says_so_where_the_template_adds_none(tmp_path: Path) -> None:
    made = replace(MADE["magistral-2507"], template=MADE["magistral-2507"].template.split("{%- else %}")[0] + (
        "{%- endif %}" + MADE["magistral-2507"].template.split("{%- endif %}", 1)[1]
    ))  # fmt: skip
    info = inspect(make_folder(tmp_path / "m", made))
    assert info.template_system is None
    assert "may not think" in info.remarks()[-1]
    assert not any("may not think" in line for line in info.remarks("First think, then answer."))


def test_a_template_that_writes_the_date_is_known(infos: dict[str, ModelInfo], tmp_path: Path) -> None:
    assert [name for name, info in infos.items() if info.template_reads_clock] == ["gpt-oss"]
    dated = "{{ date_string if date_string is defined else strftime_now('%Y') }}" + chatml()
    folder = make_folder(tmp_path / "m", replace(MADE["qwen3"], template=dated))
    assert inspect(folder).template_reads_clock
    fixed = inspect(folder, template_options={"date_string": "26 Jul 2024"})
    assert not fixed.template_reads_clock
    assert "26 Jul 2024" in fixed.tokenizer.decode(fixed.prompt_ids("1+1?"))
