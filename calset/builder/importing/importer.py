"""import_traces(): traces that another program collected, with their token ids where the file has them, graded here.

Nothing is taken on trust that can be found out: verdicts in the file are ignored, token ids must be the tokenizer's,
and text without ids is tokenised here and its run says so, so that nobody takes it for what an engine served. A trace's
place among the samples of its problem is a hash of its tokens: the same file again, or another order of its rows, gives
the same trace ids. Must not know: the columns of files (layouts.py), the command line.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calset import ids
from calset.builder.grading import Outcome, check_grader
from calset.builder.grading.grades import grade_row, submit
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.scorers import check_scorers
from calset.builder.importing.layouts import Columns, Draft, RowError, drafts
from calset.builder.importing.places import Manifest, Place, count_all, open_place, read_manifest
from calset.builder.importing.report import ImportReport
from calset.builder.importing.runs import FROM_TEXT, Runs
from calset.builder.importing.tokenize import Tokenization, Tokenized, with_defaults
from calset.builder.model.info import ModelInfo
from calset.builder.model.reasoning import named
from calset.builder.plan import open_model
from calset.builder.problems import BadRow, ProblemSource, gym_tasks, left_out, open_problems
from calset.builder.problems.source import MAX_NAMED
from calset.builder.progress import Saved
from calset.catalog.catalog import Catalog
from calset.catalog.records import Grade, Problem, Run, Source, Trace
from calset.errors import InputError
from calset.io.progress import OnProgress, Progress, silent
from calset.io.rows import read_rows

MAX_REASONS = 5  # that a warning quotes each
PENDING_BATCHES = 2  # being graded while the next is read


def import_traces(
    model: str | Path,
    files: str | Path | Sequence[str | Path],
    *,
    catalog: Catalog | str | Path | None = None,
    problems: str | Sequence[str] = (),
    generated_by: str | None = None,
    source: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    completion: str | Sequence[str] = (),
    thinking: str | Sequence[str] = (),
    reasoning: str | None = None,
    grader: str | None = None,
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    graders: int = 2,
    commit_size: int = 256,
    unsafe_scorers: bool = False,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
) -> ImportReport:
    """Keep traces of files, grade them, and tokenise those that come as text; the same call again adds nothing.

    Args:
        model: a checkpoint folder or Hub id, as ``build`` takes it, for its tokenizer and chat template; no weights are
            loaded.
        files: ``.jsonl``, ``.json``, ``.csv`` and ``.parquet`` files, folders of them, ``hf:org/name?config=&split=``.
        problems: sources as ``open_problems`` takes them. A trace whose question one of them holds gets that problem:
            its reference answer, its grader, and the problem id that a build gives it.
        generated_by: the model that said it all, where it is another than ``model``.
        source: what to call the questions' source; the file's own name when None.
        question, answer: their columns, where they have unusual names. A name with dots is a path into a column,
            through objects, lists and JSON text: ``messages.0.info.reference_answer``.
        completion: the column of what the model said, or the path to it, where it has an unusual name; several columns
            are several completions of one question.
        thinking: the column of the thinking, where it stands apart from ``completion`` under an unusual name; one, or
            one for each of ``completion``.
        reasoning: the reasoning format of the completions (docs/import.md lists them) where it is not the model's;
            ``none`` if they mark no thinking.
        grader: instead of ``math``, or of the grader of ``problems``.
        system_prompt: that the prompts were rendered with, where the file does not say.
        limit: only the first that many rows of each file or folder.
        commit_size: traces kept in one transaction.
        unsafe_scorers: see ``build``.
        skip_bad: leave out rows of ``problems`` that hold no problem; the report's warnings count them.
        progress: called with a ``Progress`` of rows read after each commit (phase "importing"); its facts count the
            new traces, those that were there and the bad rows.

    Raises:
        InputError: a bad model, file, source or option, or not one row that holds a trace.
        CatalogError: the catalog cannot be written; what was reported is there, the same call continues.
    """
    began = time.monotonic()
    if grader is not None:
        check_grader(grader)
    if grader == "gym" and not problems:
        raise InputError("the gym grader needs the problems that were asked: pass --problems gym:TASK?...")
    specs = [str(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
    if not specs:
        raise InputError("no files given: name at least one to import")
    places = [open_place(spec, source, grader or "math") for spec in specs]
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    columns = Columns(question, answer, _several(completion), _several(thinking))
    if columns.thinking and not columns.completion:
        raise InputError("thinking names the column of the thinking beside completion: name that one too")
    info = open_model(model, store, template_options=template_options)
    if reasoning is not None:
        form = named(reasoning, info.reasoning, info.tokenizer)
        reasoning, info = (None if form == info.reasoning else reasoning), replace(info, reasoning=form)
    work = _Import(
        info,
        store,
        places,
        columns=columns,
        tokenization=Tokenization(info, system_prompt, any_marks=reasoning != "none"),
        runs=Runs(info, generated_by or info.model, reasoning),
        generated_by=generated_by or info.model,
        grader=grader,
        limit=limit,
        progress=progress or silent,
    )
    asked = [problems] if isinstance(problems, str) else list(problems)
    if asked:
        sources = [open_problems(spec, grader=grader, skip_bad=skip_bad) for spec in asked]
        check_scorers(gym_tasks(found.source for found in sources), unsafe_scorers=unsafe_scorers)
        work.match(sources)
    with GradingPool(graders, background=False, unsafe_scorers=unsafe_scorers) as pool:
        work.run(pool, commit_size)
    if not (work.n_new or work.n_existing):
        why = f": {work.bad[0].where} {work.bad[0].why}" if work.bad else ""
        raise InputError(f"{', '.join(specs)} holds no trace{why}")
    work.emit("done", final=True)
    return work.report(time.monotonic() - began)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


# --- the work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unit:
    """A trace on its way into the catalog; ``reference``: there is something to grade it by."""

    trace: Trace
    problem: Problem
    run: Run
    source: Source
    reference: bool
    matched: bool


@dataclass(frozen=True, slots=True)
class _Pending:
    units: list[_Unit]
    futures: list[Future[Outcome] | None]


class _Import:
    """One import: rows in, batches of graded traces out, everything counted."""

    def __init__(
        self,
        info: ModelInfo,
        store: Catalog,
        places: Sequence[Place],
        *,
        columns: Columns,
        tokenization: Tokenization,
        runs: Runs,
        generated_by: str,
        grader: str | None,
        limit: int | None,
        progress: OnProgress,
    ) -> None:
        self._info, self._store, self._places = info, store, places
        self._columns, self._tokenization, self._generated_by = columns, tokenization, generated_by
        self._grader, self._limit, self._progress = grader, limit, progress
        self._known: dict[int, tuple[Problem, Source]] = {}
        self._runs = runs
        self._kept_runs: set[str] = set()
        self._old_runs: set[str] = set()  # of traces that were there
        self._kept_sources: set[str] = set()
        self._occurrences: Counter[int] = Counter()
        self._problems: set[int] = set()
        self._said_models: Counter[str] = Counter()
        self._unknown_ends: Counter[str] = Counter()
        self._unread_answers: Counter[str] = Counter()
        self._other_marks: Counter[str] = Counter()
        self._sources: Sequence[ProblemSource] = ()
        self._pending: deque[_Pending] = deque()
        self._counts: Counter[str] = Counter()
        self._saved = Saved()
        self._n_total = count_all(places) if limit is None else None
        self.bad: list[BadRow] = []
        self.n_bad = self.n_rows = 0

    @property
    def n_new(self) -> int:
        return self._saved.n_traces

    @property
    def n_existing(self) -> int:
        return self._counts["existing"]

    def match(self, sources: Sequence[ProblemSource]) -> None:
        """Look which of the files' questions are problems of these sources; only those are held."""
        self._sources = sources
        wanted: set[int] = set()
        for _, draft, _, _ in self._drafts(quiet=True):
            with suppress(RowError):
                wanted.add(_question_key(self._tokenization.question(draft)[0]))
        for source in sources:
            for problem in source:
                key = _question_key(problem.question)
                if key in wanted:
                    self._known.setdefault(key, (problem, source.source))

    def run(self, pool: GradingPool, size: int) -> None:
        """Read, tokenize, grade and keep everything, ``size`` traces at a time."""
        units: list[_Unit] = []
        try:
            for where, draft, place, manifest in self._drafts():
                try:
                    units.append(self._unit(draft, place, manifest, where))
                except RowError as error:
                    self._leave_out(where, str(error))
                if len(units) >= size:
                    self._submit(units, pool)
                    units = []
        except InputError:  # a file that breaks off: what was read of it is whole
            self._drain(units, pool)
            raise
        self._drain(units, pool)

    def _drain(self, units: list[_Unit], pool: GradingPool) -> None:
        self._submit(units, pool)
        while self._pending:
            self._commit()

    def _drafts(self, *, quiet: bool = False) -> Iterator[tuple[str, Draft, Place, Manifest]]:
        """Every trace that the files hold, with where it is; bad rows are counted, unless ``quiet``."""
        leave_out = (lambda where, why: None) if quiet else self._leave_out
        for place in self._places:
            n = 0
            for label, get in place.files:
                path = get()
                manifest = read_manifest(path)
                rows = read_rows(path, label=label, skip=lambda i, why, at=label: leave_out(f"{at}:{i}", why))
                for number, row in rows:
                    if n == self._limit:
                        break
                    n += 1
                    self.n_rows += not quiet
                    where = f"{label}:{number}"
                    try:
                        for draft in drafts(row, self._columns, lambda why, at=where: leave_out(at, why)):
                            told = with_defaults(
                                draft,
                                system_prompt=manifest.system_prompt,
                                max_tokens=manifest.max_tokens,
                                model=manifest.model,
                            )
                            yield where, told, place, manifest
                    except RowError as error:
                        leave_out(where, str(error))

    def _leave_out(self, where: str, why: str) -> None:
        self.n_bad += 1
        if len(self.bad) < MAX_NAMED:
            self.bad.append(BadRow(where, why))

    # -- one trace --

    def _unit(self, draft: Draft, place: Place, manifest: Manifest, where: str) -> _Unit:
        found = self._tokenization(draft)
        problem, source = self._known.get(_question_key(found.question), (None, place.source))
        matched = problem is not None
        if problem is None:
            problem = self._new_problem(draft, found, source, where)
        run = self._runs.of(
            found.system_prompt, place.source, source if matched else None, manifest, from_text=found.from_text
        )
        trace = self._trace(found, problem, run, draft)
        self._problems.add(int(problem.problem_id, 16))
        reference = bool(problem.answer) or problem.grader == "gym"
        self._note(draft, found, reference)
        return _Unit(trace, problem, run, source, reference, matched)

    def _note(self, draft: Draft, found: Tokenized, reference: bool) -> None:
        """Count what the report warns of."""
        if draft.model is not None:
            self._said_models[draft.model] += 1
        if draft.end is not None and draft.end.unknown is not None:
            self._unknown_ends[draft.end.unknown] += 1
        if draft.unread_answer is not None and not reference:
            self._unread_answers[draft.unread_answer] += 1
        if found.other_mark is not None:
            self._other_marks[found.other_mark] += 1

    def _new_problem(self, draft: Draft, found: Tokenized, source: Source, where: str) -> Problem:
        answer = draft.answer or ""
        return Problem(
            problem_id=ids.problem_id(source.name, found.question, answer),
            source_id=source.source_id,
            source=source.name,
            source_row=where.rpartition("/")[2],
            question=found.question,
            answer=answer,
            grader=source.grader,
            metadata=draft.metadata,
        )

    def _trace(self, found: Tokenized, problem: Problem, run: Run, draft: Draft) -> Trace:
        info, parts, completion = self._info, found.parts, found.completion_ids
        sample = self._sample_index(problem, run, completion)
        return Trace(
            trace_id=ids.trace_id(problem.problem_id, run.generation_key, sample),
            problem_id=problem.problem_id,
            run_id=run.run_id,
            generation_key=run.generation_key,
            sample_index=sample,
            request_seed=0,
            prompt_ids=found.prompt_ids,
            completion_ids=completion,
            text=info.text_of(completion),
            response=parts.response,
            finish_reason=found.finish_reason,
            max_tokens=draft.max_tokens or run.max_tokens,
            reasoning_start=parts.reasoning_start,
            reasoning_end=parts.reasoning_end,
            answer_start=parts.answer_start,
        )

    def _sample_index(self, problem: Problem, run: Run, completion_ids: Sequence[int]) -> int:
        """A place among the problem's samples that follows from the tokens, in [0, 2**31).

        The n-th trace with the same tokens has a place of its own: a small model says the same thing twice, and both
        count.
        """
        content = hashlib.sha256(f"{problem.problem_id} {run.generation_key} ".encode())
        content.update(array("q", completion_ids).tobytes())
        key = int.from_bytes(content.digest()[:8], "big")
        n, self._occurrences[key] = self._occurrences[key], self._occurrences[key] + 1
        content.update(f" {n}".encode())
        return int.from_bytes(content.digest()[:4], "big") & 0x7FFFFFFF

    # -- a batch --

    def _submit(self, units: list[_Unit], pool: GradingPool) -> None:
        """Have what is new graded; what was submitted before the last batches is kept."""
        there = self._runs_of([unit.trace.trace_id for unit in units])
        self._old_runs.update(there.values())
        fresh = [unit for unit in units if unit.trace.trace_id not in there]
        self._counts["existing"] += len(units) - len(fresh)
        futures = [
            submit(pool, unit.trace, unit.problem, unit.problem.grader) if unit.reference else None for unit in fresh
        ]
        self._pending.append(_Pending(fresh, futures))
        while len(self._pending) > PENDING_BATCHES:
            self._commit()

    def _runs_of(self, trace_ids: Sequence[str]) -> dict[str, str]:
        """The runs of those traces that the catalog holds."""
        if not trace_ids or not self._store.exists():
            return {}
        sql = "SELECT trace_id, run_id FROM latest_traces WHERE trace_id IN (SELECT unnest(?::VARCHAR[]))"
        return {row["trace_id"]: row["run_id"] for row in self._store.rows(sql, [list(trace_ids)])}

    def _commit(self) -> None:
        batch = self._pending.popleft()
        grades: list[Grade] = [
            grade_row(unit.trace, unit.problem.grader, future.result())
            for unit, future in zip(batch.units, batch.futures, strict=True)
            if future is not None
        ]
        if batch.units:
            self._keep_parents(batch.units)
            problems = {unit.problem.problem_id: unit.problem for unit in batch.units}
            done = self._store.record([unit.trace for unit in batch.units], grades, problems=list(problems.values()))
            self._count(batch.units, grades, done.fresh)
        self.emit("importing")

    def _keep_parents(self, units: Sequence[_Unit]) -> None:
        for unit in units:
            if unit.source.source_id not in self._kept_sources:
                self._store.add_source(unit.source)
                self._kept_sources.add(unit.source.source_id)
            if unit.run.run_id not in self._kept_runs:
                self._store.add_run(unit.run)
                self._kept_runs.add(unit.run.run_id)

    def _count(self, units: Sequence[_Unit], grades: Sequence[Grade], fresh: frozenset[tuple[str, int]]) -> None:
        mine = [unit for unit in units if (unit.trace.trace_id, 0) in fresh]
        self._counts["existing"] += len(units) - len(mine)
        self._saved.add(
            [unit.trace for unit in mine], [grade for grade in grades if (grade.trace_id, grade.attempt) in fresh]
        )
        self._counts["from text"] += sum(unit.run.engine_version == FROM_TEXT for unit in mine)
        self._counts["without reference"] += sum(not unit.reference for unit in mine)
        self._counts["matched"] += sum(unit.matched for unit in mine)

    # -- what is said --

    def emit(self, phase: str, *, final: bool = False) -> None:
        """Send a progress event."""
        facts = {"traces": self.n_new, "there": self.n_existing, "bad": self.n_bad}
        self._progress(Progress(phase, self.n_rows, self._n_total, facts=facts, final=final))

    def report(self, seconds: float) -> ImportReport:
        counts = self._counts
        return ImportReport(
            model=self._generated_by,
            catalog=str(self._store.path),
            n_rows=self.n_rows,
            n_traces=self.n_new,
            n_existing=self.n_existing,
            n_problems=len(self._problems),
            n_tokens=self._saved.n_tokens,
            n_from_file=self.n_new - counts["from text"],
            n_from_text=counts["from text"],
            n_without_reference=counts["without reference"],
            n_matched=counts["matched"],
            n_bad=self.n_bad,
            bad=tuple(self.bad),
            verdicts=dict(self._saved.verdicts),
            finish_reasons=dict(self._saved.finish_reasons),
            run_ids=tuple(sorted(self._kept_runs | self._old_runs)),
            seconds=seconds,
            warnings=tuple(self._warnings()),
        )

    def _warnings(self) -> Iterator[str]:
        mine = _last_name(self._generated_by)
        for name, n in self._said_models.most_common(3):
            if _last_name(name) != mine:
                yield (
                    f"{n} traces say that {name} generated them and are kept as {self._generated_by}'s: pass "
                    f"--generated-by {name} for a subset to say so"
                )
        for reason, n in self._unknown_ends.most_common(MAX_REASONS):
            yield (
                f"{n} traces ended for a reason that calset does not know, {reason!r}: they are kept as aborted and "
                "count for nothing"
            )
        for mark, n in self._other_marks.most_common(MAX_REASONS):
            yield (
                f"{n} traces mark their thinking with {mark}, as {self._info.model} does not: what these marks enclose "
                "was not graded. --reasoning FORMAT says how all traces mark it, --reasoning none that they do not"
            )
        for what, n in self._unread_answers.most_common(MAX_REASONS):
            yield (
                f"{n} traces have {what} for a reference answer and no verdict: --answer takes another column, or a "
                "path (COLUMN.0)"
            )
        yield from filter(None, map(left_out, self._sources))
        if n := self._counts["from text"]:
            yield f"{n} traces were tokenised from their text: the tokens that the model sampled may have been others"
        if n := self._counts["without reference"]:
            yield (
                f"{n} traces have no reference answer and no verdict: --problems SRC looks their questions up, "
                "--answer COLUMN names it"
            )


def _question_key(question: str) -> int:
    """A question whatever its spacing, as a number: a set of 220,000 costs 20 MB."""
    return int.from_bytes(hashlib.sha256(" ".join(question.split()).encode()).digest()[:8], "big")


def _last_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()
