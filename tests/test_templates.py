"""A chat template is somebody else's program: it renders as transformers has it, and it cannot go on for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from processes import python

from calset import bundled
from calset.builder.build import dry_run
from calset.builder.importing.importer import import_traces
from calset.builder.model import templates
from calset.builder.model.info import ModelInfo, inspect
from calset.catalog.catalog import Catalog
from calset.errors import InputError

# Some seconds of one core: without a deadline the tests fail, but end.
LONG = "{% for a in range(99999) %}{% for b in range(500) %}{% endfor %}{% endfor %}"
WHEN_ASKED = "{% if 'PUZZLE' in messages[-1]['content'] %}" + LONG + "{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 0.4)


def model_with(folder: Path, before: str) -> Path:
    """The bundled model, whose template runs ``before`` first."""
    shutil.copytree(bundled.MODEL, folder)
    template = folder / "chat_template.jinja"
    template.write_text(before + template.read_text())
    return folder


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return inspect(bundled.MODEL)


@given(question=st.text(max_size=60), system=st.none() | st.text(max_size=20))
@fewer(3)
def test_a_prompt_is_the_one_that_transformers_makes(info: ModelInfo, question: str, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    wanted = info.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert info.prompt_ids(question, system) == tuple(wanted)


def test_prompts_of_several_threads_are_their_own(info: ModelInfo) -> None:
    questions = [f"question {i}" for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(info.prompt_ids, questions))
    assert found == info.prompts(questions)
    assert all(question in info.decode(ids) for question, ids in zip(questions, found, strict=True))


def test_an_endless_template_is_one_line_that_names_the_model(tmp_path: Path, info: ModelInfo) -> None:
    folder = model_with(tmp_path / "m", LONG)
    with pytest.raises(InputError, match=r"does not end: no prompt after 0\.4 seconds of computing; take") as caught:
        inspect(folder)
    assert f"the chat template of {folder}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "1 + 1" in info.decode(info.prompt_ids("1 + 1"))  # another model's is rendered by a new process


def test_a_template_that_is_endless_for_one_question_ends_the_plan(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "m", WHEN_ASKED)
    rows = [{"question": f"{what} {i}", "answer": "1"} for i, what in enumerate(["What is", "A PUZZLE"])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="the chat template of m does not end"):
        dry_run(folder, str(path), tokens_per_second=1.0)


def test_an_import_ends_at_it_and_keeps_what_came_before(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "m", WHEN_ASKED)
    rows = [{"problem": what, "answer": "2", "generations": ["2"]} for what in ("1 + 1", "A PUZZLE", "2 + 0")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="the chat template of m does not end"):
        import_traces(folder, path, catalog=tmp_path / "c.duckdb", graders=1)
    assert Catalog(tmp_path / "c.duckdb").query("SELECT question FROM trace").rows == [("1 + 1",)]


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("{% for i in range(50000) %}{{ 'no end of it ' * 10 }}{% endfor %}", "makes a prompt of 6,500,"),
        ("{{ 'x' * (messages | length * 1200000000) }}", "takes more than 1 GiB of memory"),
    ],
)
def test_a_template_that_explodes_is_one_line(tmp_path: Path, before: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        inspect(model_with(tmp_path / "m", before))


def test_a_template_that_refuses_a_conversation_says_why(tmp_path: Path) -> None:
    found = inspect(model_with(tmp_path / "m", NO_SYSTEM))
    assert found.prompt_ids("1 + 1")
    with pytest.raises(InputError, match="the chat template of m refuses the prompt: no system role"):
        found.prompt_ids("1 + 1", "Think.")


CHILD = """
    import os, sys
    os.environ["CALSET_API_KEY"] = "a marker"
    from calset.builder.model import templates
    templates.prepare()
    (child,) = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_process_has_no_keys_and_ends_with_its_parent() -> None:
    process = python(CHILD)
    assert process.stdout is not None
    child = Path("/proc") / process.stdout.readline().strip()
    environment = (child / "environ").read_bytes()
    assert b"PATH=" in environment
    assert b"a marker" not in environment
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_process_that_somebody_ends_is_replaced(info: ModelInfo) -> None:
    before = info.prompt_ids("1 + 1")
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"calset.builder.model.templates" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    assert info.prompt_ids("1 + 1") == before


def test_an_interrupted_rendering_leaves_no_prompt_to_the_next(tmp_path: Path, info: ModelInfo) -> None:
    slow = inspect(model_with(tmp_path / "m", WHEN_ASKED.replace("99999", "200")))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            slow.prompts(["A PUZZLE"] * 1000)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert "1 + 1" in info.decode(info.prompt_ids("1 + 1"))
