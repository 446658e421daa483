"""The command line: parse, call the API, print. No logic lives here.

Heavy imports happen inside the commands, so that ``calset --help`` answers at once.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast

import click
from click.core import ParameterSource

from calset.errors import (
    BuildWarning,
    CalsetError,
    CatalogError,
    CatalogUpgraded,
    EngineError,
    EngineWarning,
    InputError,
    Stopped,
    TextsMissing,
)
from calset.io import terminal
from calset.version import __version__

if TYPE_CHECKING:
    from calset.builder.build import BuildReport
    from calset.builder.grade import GradeReport
    from calset.builder.judge import JudgeReport
    from calset.builder.problems import BadRow, Preset
    from calset.builder.settings import BuildOptions, GenerationOptions
    from calset.catalog.filters import Band, FilterOptions
    from calset.catalog.query.stats import Stats
    from calset.catalog.records import Subset
    from calset.catalog.subsets.recipes import RecipeOptions
    from calset.pruning.settings import PruneOptions

SEED = click.IntRange(-(2**63), 2**63 - 1)
Options = TypeVar("Options", bound=Mapping[str, Any])
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="calset")
def cli() -> None:
    """Build, keep and use calibration sets for pruning large reasoning models.

    A model's own graded reasoning traces calibrate its pruning best. The usual way:

    \b
      calset build --model M --problems questions.jsonl --samples 8
      calset stats
      calset select my-set --recipe ssgr --tokens 1000000
      calset prune M --calibration my-set --method sparsegpt --sparsity 0.5 -o pruned
      calset verify pruned
      calset evaluate pruned --problems held-out.jsonl

    Try it all on the bundled tiny model, on a CPU: calset demo
    """


# --- options shared by several commands -------------------------------------------------------------------------


def catalog_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--catalog",
        envvar="CALSET_CATALOG",
        default="calset.duckdb",
        show_default=True,
        show_envvar=True,
        type=click.Path(path_type=Path),
        help="The catalog file.",
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def progress_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--progress",
        "progress_mode",
        type=click.Choice(["auto", "plain", "json", "none"]),
        default="auto",
        show_default=True,
        help="Progress on standard error: a bar on a terminal, plain lines elsewhere, JSON lines, or none.",
    )(command)


class _GraderOption(click.Option):
    """Lists the graders when help is asked for: looking for those that packages bring takes time."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from calset.builder.grading import graders

        record = super().get_help_record(ctx)
        return record and (record[0], f"{', '.join(graders())}. {record[1]}")


def grader_option(default: str) -> Callable[..., Any]:
    return click.option("--grader", cls=_GraderOption, help=f"Default: {default}.")


def scorers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--unsafe-scorers",
        is_flag=True,
        help="Let reasoning-gym score by code that calset does not know and that may run an answer as a program.",
    )(command)


def skip_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--skip-bad", is_flag=True, help="Leave out, count and name rows of the sources that hold no problem."
    )(command)


def engine_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--engine-option",
        "engine_options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_named_values,
        help="The engine's own, e.g. tensor_parallel_size=8; a value is JSON or else text. Repeatable.",
    )(command)


def template_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--template-option",
        "template_options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_named_values,
        help="What the chat template is rendered with, e.g. enable_thinking=false. Repeatable.",
    )(command)


def _named_values(context: click.Context, option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """``tensor_parallel_size=8`` -> {"tensor_parallel_size": 8}."""
    import json

    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option.opts[0]} takes NAME=VALUE, not {pair!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _split(context: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...]:
    """``a,b`` -> ("a", "b")."""
    return tuple(filter(None, (text or "").replace(" ", "").split(",")))


class BandType(click.ParamType):
    """``LO..HI``; ends may be missing where ``is_open``."""

    name = "band"

    def __init__(self, kind: Literal["number", "whole"] = "number", *, is_open: bool = True) -> None:
        self.kind: Literal["number", "whole"] = kind
        self.is_open = is_open

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Band:
        from calset.catalog.filters import parse_band

        option = param.opts[0] if param is not None else "a band"
        if self.is_open:
            return parse_band(value, option, self.kind)
        try:
            low, high = (float(part) for part in value.split(".."))
        except ValueError:
            raise InputError(f"{option} takes LO..HI, two numbers, not {value!r}") from None
        return low, high


CLOSED = BandType(is_open=False)


def _given(options: Options) -> Options:
    """The options without those that were left out."""
    return cast(Options, {name: value for name, value in options.items() if value is not None})


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--question", help="The question's column in a file. Default: question."),
        click.option("--answer", help="The reference answer's column. Default: answer."),
        click.option(
            "--engine",
            default="auto",
            show_default=True,
            envvar="CALSET_ENGINE",
            help="auto, vllm, transformers, or the addresses of running servers: http://host:8000[,http://host2:8000]. "
            "auto takes vLLM when it is installed.",
        ),
        click.option(
            "--temperature", type=float, help="Default: the model's generation_config, else its family's recipe."
        ),
        click.option("--top-p", type=float, help="Default: the model's generation_config, else its family's recipe."),
        click.option("--top-k", type=int, help="0 is off. Default: as for --temperature."),
        click.option("--min-p", type=float, help="0 is off. Default: as for --temperature."),
        click.option("--repetition-penalty", type=float, help="1 is off. Default: as for --temperature."),
        click.option("--max-tokens", type=int, help="Completion tokens at most. Default: what the context holds."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Every trace's own seed derives from it."),
        click.option("--system-prompt", help="None unless given."),
        template_option,
        engine_option,
        click.option("--limit", type=int, help="Only the first N problems."),
        grader_option("the source's own"),
        scorers_option,
        skip_option,
        click.option("--concurrency", type=click.IntRange(min=1), help="Requests in flight at most, at each server."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# --- build ------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--model", required=True, help="A checkpoint folder or Hub id, ORG/NAME or ORG/NAME@REVISION.")
@click.option(
    "--problems",
    required=True,
    multiple=True,
    help="A file, a preset, hf:ORG/NAME, gym:TASK?option=value, or demo. Repeatable.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Traces a problem; with --target, at most.",
)
@click.option(
    "--target",
    metavar="RECIPE",
    help="Sample adaptively until this recipe (a name or a TOML file) has what it needs.",
)
@click.option("--need", type=click.IntRange(min=1), help="How many samples the target must be able to take.")
@click.option("--need-tokens", type=click.IntRange(min=1), help="How many tokens of samples, instead.")
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 1, max_open=True),
    help="Of stopping a problem outside the target's difficulty band. Default: 0.95.",
)
@click.option(
    "--retry",
    multiple=True,
    type=click.Choice(["truncated", "error"]),
    help="Run again what a smaller --max-tokens cut, or what the engine failed on. Repeatable.",
)
@click.option(
    "--decontaminate",
    metavar="SRC",
    multiple=True,
    help="Leave out problems that this evaluation source holds too, and keep the evidence. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Say what it would do and cost, and stop; needs no GPU.")
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(0.001, 1e12),
    help="For --dry-run: of all devices together. Default: a cited table.",
)
@click.option("--gpu", help="For --dry-run: plan for this GPU (H100, H200, A100).")
@click.option("--devices", "n_devices", type=click.IntRange(1, 1_000_000), help="For --dry-run: how many of them.")
@generation_options
@catalog_option
@progress_option
@json_option
def build(
    model: str,
    problems: tuple[str, ...],
    dry_run: bool,
    tokens_per_second: float | None,
    gpu: str | None,
    n_devices: int | None,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
    **options: Unpack[BuildOptions],
) -> None:
    """Generate and grade a model's own traces; killed or stopped, the same command continues."""
    from calset.builder.build import build as run
    from calset.builder.build import dry_run as plan
    from calset.builder.engines.base import RESUME_HINT

    if dry_run:
        with terminal.progress(progress_mode, "planned") as show:
            planned = plan(
                model, problems, tokens_per_second=tokens_per_second, gpu=gpu, n_devices=n_devices, catalog=catalog,
                progress=show, **options,
            )  # fmt: skip
        if as_json:
            terminal.emit_json(planned.as_dict())
            return
        for line in planned.lines():
            terminal.say(line)
        if target := options.get("target"):
            terminal.note(f"An upper bound: with --target {target} a build stops problems, and itself, earlier.")
        return
    for option, value in {"tokens-per-second": tokens_per_second, "gpu": gpu, "devices": n_devices}.items():
        if value is not None:
            raise InputError(f"--{option} is for --dry-run")
    with terminal.progress(progress_mode, "saved", main="generating") as show:
        try:
            report = run(model, problems, catalog=catalog, progress=show, **options)
        except EngineError as error:
            raise type(error)(f"{error}: {_command_line()}") from error
        except CatalogError as error:
            raise type(error)(f"{error}; to continue: {_command_line()}") from error
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped; {RESUME_HINT}: {_command_line()}") from error
    if as_json:
        terminal.emit_json(report.as_dict())
    else:
        _print_build(report, options.get("target"))
    if report.stopped:
        of = f" of {report.n_requested}" if report.n_requested is not None else ""
        terminal.note(f"Stopped; {report.n_existing + report.n_new}{of} traces are saved. To continue:")
        terminal.note(f"  {_command_line()}")
        sys.exit(130)


def _print_bad(n: int, named: Sequence[BadRow]) -> None:
    for row in named:
        terminal.note(f"{row.where} {row.why}")
    if (more := n - len(named)) > 0:
        terminal.note(f"... and {more:,} more rows")


def _print_build(report: BuildReport, target: object) -> None:
    _print_bad(report.n_bad, report.bad)
    verdicts = ", ".join(f"{n} {v}" for v, n in sorted(report.verdicts.items(), key=lambda x: -x[1]))
    reasons = ", ".join(f"{n} {r}" for r, n in sorted(report.finish_reasons.items(), key=lambda x: -x[1]))
    speed = f" at {report.n_tokens / report.seconds:,.0f} tokens/s" if report.n_new and report.seconds else ""
    terminal.say(
        f"{report.n_new} new traces of {report.n_problems} problems ({report.n_existing} were there), "
        f"{report.n_tokens:,} tokens in {terminal.duration(report.seconds)}{speed}"
    )
    if report.n_excluded:
        terminal.say(f"{report.n_excluded} problems were left out: calset query 'FROM excluded' shows the evidence")
    if verdicts:
        terminal.say(f"Verdicts: {verdicts}. Finish reasons: {reasons}")
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")
    following = "calset stats"
    if report.target is not None:
        aim = report.target
        terminal.say(
            f"Target {aim['recipe']}: {aim['met']:,} of {aim['need']:,} {aim['unit']}; {aim['complete']:,} problems "
            f"with all samples ({aim['in_band']:,} in the band), {aim['stopped']:,} stopped early"
        )
        named = f"--recipe {shlex.quote(str(target or aim['recipe']))} --model {shlex.quote(report.model)}"
        following = f"calset select NAME {named} --min-k {aim['samples']} --{aim['unit']} {aim['need']}"
    terminal.say(f"Catalog: {report.catalog}. Next: {following} --catalog {report.catalog}")


def _command_line() -> str:
    return shlex.join(["calset", *sys.argv[1:]])


@cli.command()
@grader_option("each problem's own")
@click.option("--model", help="Only this model's traces.")
@click.option("--source", help="Only this source's problems.")
@click.option("--run", help="Only this run's traces.")
@click.option(
    "--verdict",
    "verdicts",
    metavar="VERDICT[,...]",
    callback=_split,
    help="Only traces whose present verdict is one of these.",
)
@click.option("--ungraded", is_flag=True, help="Only traces without a verdict.")
@click.option("--force", is_flag=True, help="Also what would get the verdict it has.")
@scorers_option
@click.option(
    "--judge", metavar="MODEL", help="Let this model judge instead; its judgements stand beside the verdicts."
)
@click.option("--judge-engine", help="As build's --engine. Default: auto.")
@engine_option
@catalog_option
@progress_option
@json_option
def grade(
    grader: str | None,
    model: str | None,
    source: str | None,
    run: str | None,
    verdicts: tuple[str, ...],
    ungraded: bool,
    force: bool,
    unsafe_scorers: bool,
    judge: str | None,
    judge_engine: str | None,
    engine_options: dict[str, Any],
    catalog: Path,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Grade stored traces again, or let a model judge them; earlier verdicts stay in the history."""
    from calset.builder.grade import grade as grade_traces
    from calset.builder.judge import judge as judge_traces

    if judge is None:
        if judge_engine is not None or engine_options:
            raise InputError(f"--{'engine-option' if judge_engine is None else 'judge-engine'} is for --judge MODEL")
        with terminal.progress(progress_mode, "graded", main="grading") as show:
            graded = grade_traces(
                catalog, grader=grader, model=model, source=source, run=run, verdicts=verdicts, ungraded=ungraded,
                force=force, unsafe_scorers=unsafe_scorers, progress=show,
            )  # fmt: skip
        _print_graded(graded, as_json)
        return
    if grader or force or unsafe_scorers:
        raise InputError(
            "--judge takes neither --grader nor --force nor --unsafe-scorers: a judge judges each trace once"
        )
    with terminal.progress(progress_mode, "judged", main="judging") as show:
        judged = judge_traces(
            catalog, judge, engine=judge_engine or "auto", traces_of=model, source=source, run=run, verdicts=verdicts,
            ungraded=ungraded, engine_options=engine_options, progress=show,
        )  # fmt: skip
    _print_judged(judged, as_json)


def _print_graded(report: GradeReport, as_json: bool) -> None:
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    skipped = f" ({report.n_skipped} had this verdict already)" if report.n_skipped else ""
    terminal.say(f"{report.n_graded} traces graded, {report.n_changed} verdicts changed{skipped}")
    if report.verdicts:
        terminal.table(["verdict", "traces"], sorted(report.verdicts.items(), key=lambda x: -x[1]))
    if report.changes:
        changed = [(before, after, n) for before, row in report.changes.items() for after, n in row.items()]
        terminal.table(["before", "now", "traces"], sorted(changed, key=lambda x: -x[2]))


def _print_judged(report: JudgeReport, as_json: bool) -> None:
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    terminal.say(f"{report.n_judged} traces judged by {report.judge}, {report.n_sent} of them read; verdicts unchanged")
    pairs = [(rule, judged, n) for rule, row in report.confusion.items() for judged, n in row.items()]
    if pairs:
        terminal.table(["rule", "judge", "traces"], sorted(pairs, key=lambda x: -x[2]))
    if report.agreement is not None:
        terminal.say(
            f"Agreement: {report.agreement:.1%} of what both judged; unreadable replies: {report.unparsable:.1%}"
        )
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")


@cli.command()
@click.argument("spec", required=False)
@click.option("--question", help="The question's column. Default: question.")
@click.option("--answer", help="The reference answer's column. Default: answer.")
@click.option("--limit", type=click.IntRange(min=1), default=5, show_default=True, help="Show the first N problems.")
@click.option("--count", is_flag=True, help="Count them, which reads them all.")
@skip_option
@json_option
def problems(
    spec: str | None,
    question: str | None,
    answer: str | None,
    limit: int,
    count: bool,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """List the presets, or preview a source of problems: SPEC as `build --problems` takes it."""
    from calset.builder.problems import PRESETS, bad_rows_of, open_problems

    if spec is None:
        _print_presets(PRESETS.values(), as_json)
        return
    source = open_problems(spec, question=question, answer=answer, skip_bad=skip_bad)
    rows, n = source.preview(limit, count=count)
    n_bad, bad = bad_rows_of([source])
    _print_bad(n_bad, bad)
    facts = {key: getattr(source.source, key) for key in ("name", "kind", "revision", "grader", "licence")}
    if as_json:
        keys = ("problem_id", "question", "answer", "metadata")
        listed = [{key: getattr(problem, key) for key in keys} for problem in rows]
        terminal.emit_json(
            {"source": facts.pop("name"), **facts, "n": n, "at_most": source.size, "n_bad": n_bad, "problems": listed}
        )
        return
    revision = facts["revision"] if " " in facts["revision"] else facts["revision"][:12]
    many = f"{n} problems" if n is not None else f"at most {source.size} problems" if source.size else "problems"
    terminal.say(f"{facts['name']}: {many}, grader {facts['grader']}, revision {revision}")
    terminal.table(["problem", "question", "answer"], [(p.problem_id[:10], p.question, p.answer) for p in rows])


def _print_presets(presets: Iterable[Preset], as_json: bool) -> None:
    keys = ("name", "repo", "config", "split", "grader", "licence", "gated", "note")
    rows = [[getattr(preset, key) for key in keys] for preset in presets]
    if as_json:
        for row in rows:
            terminal.emit_json(dict(zip(keys, row, strict=True)))
    else:
        terminal.table(["preset", "dataset", *keys[2:]], rows)


@cli.command()
@click.option("--against", required=True, multiple=True, help="An evaluation source, as `build` takes it. Repeatable.")
@click.option("--problems", multiple=True, help="Check these, not the catalog's. Repeatable.")
@click.option(
    "--n", type=click.IntRange(min=2), multiple=True, default=(8, 13), show_default=True, help="Words a gram."
)
@click.option(
    "--min-share", type=float, default=0.5, show_default=True, help="Of all grams but those of the largest n."
)
@click.option("--question", help="The question's column of the evaluation. Default: question.")
@click.option("--answer", help="Its reference answer's column. Default: answer.")
@skip_option
@catalog_option
@progress_option
@json_option
def decontaminate(
    against: tuple[str, ...],
    problems: tuple[str, ...],
    n: tuple[int, ...],
    min_share: float,
    question: str | None,
    answer: str | None,
    skip_bad: bool,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Find problems that an evaluation source holds too, and keep the evidence (the view excluded)."""
    from calset.builder.decontaminate import decontaminate as run

    with terminal.progress(progress_mode, "checked", main="checking") as show:
        report = run(
            catalog, against, problems=problems or None, n=n, min_share=min_share, question=question, answer=answer,
            skip_bad=skip_bad, progress=show,
        )  # fmt: skip
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    terminal.say(
        f"{report.n_contaminated} of {report.n_checked} problems are contaminated by {', '.join(report.evaluations)} "
        f"({report.n_evaluation} questions); {report.n_traces} traces"
    )
    columns = ["evaluation", "row", "n", "share", "evidence"]
    rows = [(e["evaluation_source"], e["evaluation_row"], e["n"], e["share"], e["evidence"]) for e in report.examples]
    if rows:
        terminal.table(columns, rows, title="the strongest evidence")
        terminal.say('To leave them out: calset select --where "problem_id NOT IN (SELECT problem_id FROM excluded)"')


# --- catalog ----------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--model", help="Only this model.")
@click.option("--source", help="Only this source.")
@catalog_option
@json_option
def stats(catalog: Path, model: str | None, source: str | None, as_json: bool) -> None:
    """Counts, pass rate, verdicts, and a difficulty x length table."""
    from calset.catalog.query.stats import stats as compute

    result = compute(catalog, model=model, source=source)
    if as_json:
        terminal.emit_json(result.as_dict())
    else:
        _print_stats(result)


@cli.command()
@click.argument("sql", required=False)
@click.option(
    "--difficulty", metavar="LO..HI", type=BandType(), help="The band of 1 - pass rate: 0.3..0.8, 0.3.. or ..0.8."
)
@click.option("--correct/--incorrect", default=None, help="Judged correct, or judged and not correct.")
@click.option(
    "--verdict",
    multiple=True,
    metavar="V",
    callback=lambda context, option, verdicts: verdicts or None,
    help="With this verdict. Repeatable.",
)
@click.option(
    "--tokens", metavar="LO..HI", type=BandType("whole"), help="The band of completion tokens, e.g. 2000..8000."
)
@click.option("--model", metavar="M", help="Of this model: MODEL, MODEL@REVISION or its folder.")
@click.option("--source", metavar="S", help="Of this source's problems.")
@click.option(
    "--k", metavar="LO..HI", type=BandType("whole"), help="The band of judged traces of the problem, e.g. 8.."
)
@click.option("--finished/--unfinished", default=None, help="Finish reason stop, or any other.")
@click.option(
    "--kind",
    type=click.Choice(["build", "evaluate", "all"]),
    default="build",
    callback=lambda context, option, kind: None if kind == "all" else kind,
    help="Traces of builds, of evaluations, or both. Default: build.",
)
@click.option("--columns", metavar="A,B,...", help="Of the view trace; '*' for all. Default: all but its texts.")
@click.option("--limit", type=click.IntRange(min=1), help="At most N rows.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "jsonl", "csv", "parquet"]),
    help="Default: what the name after -o says, else table.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write to this file; parquet needs one.")
@catalog_option
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
def query(
    sql: str | None,
    columns: str | None,
    limit: int | None,
    form: str | None,
    out: Path | None,
    catalog: Path,
    as_json: bool,
    **filters: Unpack[FilterOptions],
) -> None:
    """Ask the catalog, read-only: in SQL (views trace, problem, suspect_gold, ...), or for traces by filters.

    \b
      calset query "SELECT question, difficulty FROM problem ORDER BY difficulty DESC LIMIT 10"
      calset query --difficulty 0.3..0.8 --correct --tokens 2000..8000 --source gsm8k -o hard.parquet
    """
    from calset.catalog.catalog import Catalog
    from calset.catalog.query.output import Question, format_of, print_answer, save_answer

    if as_json and form not in (None, "jsonl"):
        raise InputError(f"--json is --format jsonl: leave one of --json and --format {form} out")
    form = format_of(out, "jsonl" if as_json else form)
    text, params = _question(sql, columns, filters)
    store, question = Catalog(catalog), Question(text, params, limit)
    try:
        if out is not None:
            written = save_answer(store, question, form, out)
            terminal.note(f"Wrote {written.rows:,} rows to {out}")
        elif form == "table" and sys.stdout.isatty():
            most = limit or SHOWN_ROWS
            result = store.query(text, params, limit=most)
            terminal.table(result.columns, result.rows)
            if result.truncated and limit is None:
                terminal.note(f"The first {most:,} rows; more match. All of them: --format csv, jsonl, or -o FILE.")
                return
            written = result
        else:
            written = print_answer(store, question, form)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop but the line that says so
        raise Stopped("stopped") from None
    if written.truncated:
        terminal.note(f"The first {limit} rows; more match.")


SHOWN_ROWS = 1000  # of a table that a terminal lays out, for which all rows are in memory


def _question(sql: str | None, columns: str | None, filters: FilterOptions) -> tuple[str, list[Any]]:
    """The SQL given, or what the filters come to."""
    from calset.catalog.filters import Filter

    source_of = click.get_current_context().get_parameter_source
    given = [name for name in (*filters, "columns") if source_of(name) is ParameterSource.COMMANDLINE]
    if sql is not None:
        if given:
            raise InputError(f"give SQL or filters, not both: --{given[0]} is a filter")
        return sql, []
    if not given:
        raise InputError("nothing is asked: give SQL, or a filter such as --correct (calset query --help)")
    return Filter(**filters).select([c.strip() for c in columns.split(",")] if columns else None)


@cli.command()
@click.argument("trace")
@click.option("--full", is_flag=True, help="Fold nothing: the whole question, reasoning and answer.")
@catalog_option
@json_option
def show(trace: str, full: bool, catalog: Path, as_json: bool) -> None:
    """Show one trace (by id or the start of it): question, reasoning, answer, verdict and why, its other samples."""
    from calset.catalog.catalog import Catalog

    row = Catalog(catalog).trace(trace)
    if as_json:
        terminal.emit_json(row)
    else:
        _print_trace(row, full=full)


@cli.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--model", required=True, help="A checkpoint folder or Hub id, for its tokenizer and chat template.")
@click.option("--problems", multiple=True, help="Look questions up here for their reference answers. Repeatable.")
@click.option("--generated-by", metavar="MODEL", help="Who generated the traces, where it was not --model.")
@click.option("--source", help="What to call the questions' source. Default: the file's name.")
@click.option("--question", help="The question's column. Default: problem, question, or the conversation's.")
@click.option("--answer", help="The reference answer's column. Default: answer, or what others call it.")
@click.option(
    "--completion",
    metavar="COLUMN",
    multiple=True,
    help="The column of what the model said, or a path into it (response.choices.0.message). Repeatable.",
)
@click.option(
    "--thinking", metavar="COLUMN", multiple=True, help="The column of its thinking, where that is apart. Repeatable."
)
@click.option(
    "--reasoning",
    metavar="FORMAT",
    help="How the traces mark their thinking (docs/import.md): think, thinking, begin_of_thought, ..., none. Default: "
    "as the model does.",
)
@click.option("--system-prompt", help="That the prompts were rendered with, where the file does not say.")
@template_option
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows of each file.")
@grader_option("math, or that of --problems")
@scorers_option
@skip_option
@catalog_option
@progress_option
@json_option
def import_(
    files: tuple[str, ...],
    model: str,
    problems: tuple[str, ...],
    generated_by: str | None,
    source: str | None,
    question: str | None,
    answer: str | None,
    completion: tuple[str, ...],
    thinking: tuple[str, ...],
    reasoning: str | None,
    system_prompt: str | None,
    template_options: dict[str, Any],
    limit: int | None,
    grader: str | None,
    unsafe_scorers: bool,
    skip_bad: bool,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Keep traces that other programs collected, and grade them; the same files again add nothing."""
    from calset.builder.importing.importer import import_traces as run

    with terminal.progress(progress_mode, "rows", main="importing") as show:
        report = run(
            model, files, problems=problems, generated_by=generated_by, source=source, question=question,
            answer=answer, completion=completion, thinking=thinking, reasoning=reasoning, system_prompt=system_prompt,
            template_options=template_options, limit=limit, grader=grader, unsafe_scorers=unsafe_scorers,
            skip_bad=skip_bad, catalog=catalog, progress=show,
        )  # fmt: skip
    _print_bad(report.n_bad, report.bad)
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    verdicts = ", ".join(f"{n} {v}" for v, n in sorted(report.verdicts.items(), key=lambda x: -x[1]))
    terminal.say(
        f"{report.n_traces:,} new traces of {report.n_problems:,} problems ({report.n_existing:,} were there), "
        f"{report.n_tokens:,} tokens in {terminal.duration(report.seconds)}; {report.n_bad:,} bad rows left out"
    )
    if verdicts:
        terminal.say(f"Verdicts: {verdicts}")
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")


@cli.command()
@click.argument("others", metavar="OTHER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@catalog_option
@progress_option
@json_option
def merge(others: tuple[Path, ...], catalog: Path, progress_mode: str, as_json: bool) -> None:
    """Bring the rows of other catalogs into this one, each in one transaction; again adds nothing."""
    from calset.catalog.maintenance.merge import merge as run

    for other in others:
        with terminal.progress(progress_mode, "merged tables") as show:
            report = run(catalog, other, progress=show)
        if as_json:
            terminal.emit_json(report.as_dict())
            continue
        added = ", ".join(f"{n:,} {table}" for table, n in report.added.items() if n)
        terminal.say(f"{other}: {added or 'nothing that was not here'} ({terminal.duration(report.seconds)})")
        for warning in report.warnings:
            terminal.note(f"Warning: {warning}")


@cli.command()
@click.option("--full", is_flag=True, help="Read every byte of the catalog and count every trace's token ids.")
@catalog_option
@progress_option
@json_option
def doctor(full: bool, catalog: Path, progress_mode: str, as_json: bool) -> None:
    """Check the catalog, packages, engines, GPU, graders and the Hub login; exit code 1 when something is broken."""
    from calset.diagnosis import doctor as run

    with terminal.progress(progress_mode, "looked at") as show:
        found = run(catalog, full=full, progress=show)
    if as_json:
        terminal.emit_json(found.as_dict())
    else:
        terminal.table(["check", "state", "found", "remedy"], [check.row() for check in found.checks])
    if not found.ok:
        sys.exit(1)


# --- subsets ----------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("name")
@click.option("--recipe", default="ssgr", show_default=True, help="A recipe's name or a TOML file.")
@click.option("--model", help="Whose traces, when the catalog holds several models'.")
@click.option("--where", help="A SQL condition over the trace view.")
@click.option("--samples", type=click.IntRange(1, 2**62), help="At most N samples.")
@click.option("--tokens", type=click.IntRange(1, 2**62), help="At most N tokens, whole samples.")
@click.option("--difficulty", metavar="LO..HI", type=CLOSED, help="The band of 1 - pass rate, e.g. 0.2..0.8.")
@click.option("--min-k", type=click.IntRange(min=1), help="Only problems with at least K judged traces.")
@click.option(
    "--length-quantiles",
    metavar="LO..HI",
    type=CLOSED,
    help="The band of lengths among the candidates, e.g. 0.25..0.75.",
)
@click.option("--length-tokens", metavar="LO..HI", type=CLOSED, help="The band of lengths in tokens, e.g. 2000..8000.")
@click.option("--per-problem", type=click.IntRange(min=1), help="Traces a problem at most.")
@click.option("--text", metavar="FILE", help="The recipe text's: a file, a folder, FILE?text=COLUMN, or hf:ORG/NAME.")
@click.option("--window", type=click.IntRange(min=1), help="Tokens a sample: of a text, or cut from each longer trace.")
@click.option("--stratify", metavar="BY", help="Divide the budget by source, or by this key of the problems' metadata.")
@click.option("--shares", type=click.Choice(["equal", "proportional"]), help="Of a stratified budget. Default: equal.")
@click.option(
    "--exclude-problems-of",
    "evaluations",
    metavar="SRC",
    multiple=True,
    help="Leave out problems that this evaluation source holds too, as build --decontaminate tells. Repeatable.",
)
@click.option(
    "--held-out-from",
    metavar="REF",
    multiple=True,
    help="Leave out the problems of this subset (NAME, NAME@VERSION, hub:... or an exported folder). Repeatable.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@catalog_option
@json_option
def select(
    name: str,
    recipe: str,
    model: str | None,
    where: str | None,
    text: str | None,
    evaluations: tuple[str, ...],
    held_out_from: tuple[str, ...],
    seed: int,
    catalog: Path,
    as_json: bool,
    **options: Unpack[RecipeOptions],
) -> None:
    """Take a subset from the catalog by a recipe, as a new immutable version of NAME."""
    from calset.catalog.catalog import Catalog
    from calset.catalog.select import select as run
    from calset.catalog.subsets.compare import tables

    store, exclude = Catalog(catalog), None
    if evaluations:
        from calset.builder.decontaminate import against_sources

        exclude = against_sources(evaluations, pinned=store.source_revisions())
    subset = run(
        store, name, recipe, model=model, where=where, seed=seed, text=text, exclude=exclude,
        held_out_from=held_out_from, **_given(options),
    )  # fmt: skip
    if as_json:
        terminal.emit_json(_subset_facts(subset))
        return
    terminal.say(f"{subset.ref}: {subset.n_samples} samples, {subset.n_tokens:,} tokens, {subset.content_hash}")
    for title, columns, rows in tables(subset):
        terminal.table(columns, rows, title=title or None)
    for warning in subset.warnings:
        terminal.note(f"Warning: {warning}")


def _subset_facts(subset: Subset) -> dict[str, Any]:
    keys = ("name", "version", "content_hash", "n_samples", "n_tokens", "recipe", "seed", "model", "pool", "warnings")
    return {key: getattr(subset, key) for key in keys} | {"created_at": subset.created_at}


@cli.command()
@catalog_option
@json_option
def subsets(catalog: Path, as_json: bool) -> None:
    """List the subsets."""
    from calset.catalog.catalog import Catalog
    from calset.catalog.subsets.versions import list_subsets

    rows = list_subsets(Catalog(catalog))
    if as_json:
        for row in rows:
            terminal.emit_json(row)
        return
    columns = ["subset", "recipe", "samples", "tokens", "model", "content hash", "created"]
    terminal.table(
        columns,
        [
            (
                f"{r['name']}@{r['version']}",
                r["recipe"]["name"],
                r["n_samples"],
                r["n_tokens"],
                r["model"],
                r["content_hash"][:12],
                r["created_at"],
            )
            for r in rows
        ],
    )


@cli.command()
@click.argument("a")
@click.argument("b")
@catalog_option
@json_option
def diff(a: str, b: str, catalog: Path, as_json: bool) -> None:
    """Compare two subsets: what they share, what only one holds, distributions side by side."""
    from calset.catalog.references import diff as compare

    result = compare(catalog, a, b)
    if as_json:
        terminal.emit_json(result.as_dict())
    else:
        terminal.table(["", a, b], result.rows())


@cli.command()
@click.argument("reference")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@catalog_option
@json_option
def export(reference: str, out: Path, catalog: Path, as_json: bool) -> None:
    """Write a subset (NAME, NAME@VERSION or hub:ORG/REPO/NAME@VERSION) to a folder: Parquet rows and a manifest."""
    from calset.catalog.references import export as write

    path = write(catalog, reference, out)
    if as_json:
        terminal.emit_json({"out": str(path)})
    else:
        terminal.say(f"Wrote {reference} to {path}")


# --- the Hub ----------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("reference")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everybody read the repository. Without it a new one is private.")
@click.option(
    "--dry-run", is_flag=True, help="Show the files, their sizes and the card, and stop; asks the Hub nothing."
)
@catalog_option
@json_option
def publish(reference: str, repo: str, public: bool, dry_run: bool, catalog: Path, as_json: bool) -> None:
    """Publish a subset (NAME or NAME@VERSION) to the dataset repository ORG/NAME, with a card and a tag.

    The login is huggingface_hub's own: hf auth login. Run again after whatever happened, it does what is left to do.
    """
    from calset.catalog.hub.publish import publish as run

    report = run(reference, repo, catalog=catalog, public=public, dry_run=dry_run)
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    terminal.table(["file", "bytes"], [*report.files, ("README.md", len(report.card.encode()))])
    if dry_run:
        terminal.say(report.card)
        terminal.say(f"{report.ref} would go to {repo} with the tag {report.tag}; nothing was sent.")
    else:
        done = "is published" if report.new else "was there already"
        seen = "public" if report.public else "private"
        terminal.say(f"{report.ref} {done}: hub:{repo}/{report.ref} ({seen}), commit {report.commit}\n{report.url}")
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")


@cli.command()
@click.argument("reference")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write it to a new folder too.")
@catalog_option
@json_option
def pull(reference: str, out: Path | None, catalog: Path, as_json: bool) -> None:
    """Download hub:ORG/REPO/NAME@VERSION (or the latest version), check it, and keep it in the catalog."""
    from calset.catalog.hub.pull import pull as run

    subset = run(reference, catalog, directory=out)
    if as_json:
        terminal.emit_json(_subset_facts(subset) | {"origin": subset.origin})
        return
    terminal.say(f"{subset.ref}: {subset.n_samples} samples, {subset.n_tokens:,} tokens, {subset.content_hash}")


@cli.command()
@click.argument("text", required=False)
@click.option("--author", help="Only repositories of this user or organisation.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most N repositories.")
@json_option
def search(text: str | None, author: str | None, limit: int, as_json: bool) -> None:
    """List the calset repositories on the Hub, or those whose name holds TEXT."""
    from calset.catalog.hub.search import search as run

    found = run(text, author=author, limit=limit)
    if as_json:
        for item in found:
            terminal.emit_json(item.as_dict())
        return
    columns = ["repository", "subsets", "licence", "downloads", "updated"]
    rows = [(f.repo, ", ".join(f.subsets), f.licence, f.downloads, f.updated_at) for f in found]
    terminal.table(columns, rows)


@cli.command()
@click.argument("reference")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The HTML file.")
@catalog_option
@json_option
def report(reference: str, out: Path, catalog: Path, as_json: bool) -> None:
    """Write one self-contained HTML page about a subset: recipe, picture, verdicts, samples, provenance."""
    from calset.catalog.report.page import report as write

    path = write(catalog, reference, out)
    if as_json:
        terminal.emit_json({"out": str(path)})
    else:
        terminal.say(f"Wrote the report of {reference} to {path}")


@cli.command()
@catalog_option
@json_option
def compact(catalog: Path, as_json: bool) -> None:
    """Rewrite the catalog without the space that deleting and many small commits leave behind.

    Nobody can write to it meanwhile. Killed at any moment, it leaves the old file or the new one.
    """
    from calset.catalog.maintenance.compact import compact as rewrite
    from calset.io.files import size

    done = rewrite(catalog)
    if as_json:
        terminal.emit_json(done.as_dict())
        return
    before, after = size(done.bytes_before), size(done.bytes_after)
    terminal.say(f"{catalog}: {before} before, {after} now, {sum(done.rows.values()):,} rows")


# --- pruning ----------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("model")
@click.option(
    "--calibration", required=True, help="NAME, NAME@VERSION, hub:ORG/REPO/NAME@VERSION, or an exported folder."
)
@click.option(
    "--method",
    default="sparsegpt",
    show_default=True,
    help="magnitude, wanda, ria, sparsegpt, admm or alps; magnitude+dsnot and sparsegpt+dsnot refine the mask. "
    "reap drops experts, depth drops blocks.",
)
@click.option(
    "--sparsity",
    type=float,
    help="The share of zeros in every matrix, or of the experts or blocks that go, e.g. 0.5.",
)
@click.option("--pattern", help="N:M with N kept of every M, e.g. 2:4.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--tokens", type=click.Choice(["all", "completion", "prompt"]), default="all", show_default=True)
@click.option("--propagate", type=click.Choice(["pruned", "dense"]), default="pruned", show_default=True)
@click.option("--group", type=click.Choice(["row", "block", "matrix"]), help="Default: the method's own.")
@click.option(
    "--allocation",
    default="uniform",
    show_default=True,
    help="How zeros are shared out: uniform, owl (blocks with outliers keep more), or a JSON file of ratios.",
)
@click.option(
    "--token-weights",
    type=click.Path(path_type=Path),
    help="Parquet with sample_id and token_weights. Default: that column of the calibration folder, if it has one.",
)
@click.option(
    "--damping",
    type=float,
    default=0.01,
    show_default=True,
    help="SparseGPT, ADMM, ALPS: share of the mean diagonal.",
)
@click.option("--device", help="Default: a CUDA device when there is one, else the CPU.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), help="Positions run at a time; default: 8192, on a CPU 2048."
)
@click.option("--max-length", type=click.IntRange(min=1), help="Cut longer samples to N tokens; the report says so.")
@click.option(
    "--include", multiple=True, metavar="REGEX", help="Prune only matrices with it in their name. Repeatable."
)
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave matrices with it in their name. Repeatable.")
@click.option("--allow-partial", is_flag=True, help="Leave decoder weights that calset does not understand dense.")
@click.option(
    "--hidden",
    type=click.Choice(["device", "host", "disk"]),
    help="Where hidden states are kept between blocks. Default: the nearest place where they fit.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be done and needed, without loading a weight.")
@click.option("--force", is_flag=True, help="Accept a subset of another tokenizer, and an estimate that does not fit.")
@catalog_option
@progress_option
@json_option
def prune(
    model: str,
    calibration: str,
    out: Path,
    token_weights: Path | None,
    dry_run: bool,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
    **options: Unpack[PruneOptions],
) -> None:
    """Prune MODEL against a calibration subset and save an ordinary checkpoint with pruning.json.

    Most methods put zeros into matrices; reap and depth drop whole experts or blocks, which makes the model smaller.

    Killed or stopped, the same command continues where it was.
    """
    from calset.pruning.blockwise.distributed import is_first
    from calset.pruning.prune import plan_pruning
    from calset.pruning.prune import prune as run

    if dry_run:
        plan = plan_pruning(model, calibration, out, token_weights=token_weights, catalog=catalog, **options)
        if as_json:
            terminal.emit_json(plan.as_dict())
        else:
            terminal.table(["plan", "at most"], plan.rows())
            for warning in plan.warnings:
                terminal.note(f"Warning: {warning}")
        plan.check(options.get("force", False))
        return
    with terminal.progress(progress_mode if is_first() else "none", "pruned blocks") as show:
        report = run(model, calibration, out, token_weights=token_weights, catalog=catalog, progress=show, **options)
    if not is_first():
        return
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    counted = f"calibrated on {report.calibration['subset']} ({report.n_counted_tokens:,} tokens)"
    terminal.say(
        f"{report.out}: {report.method}, {report.outcome()}, "
        f"{counted if report.calibration['used'] else 'no calibration used'} in {terminal.duration(report.seconds)}"
    )
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="The dense model, to prove the rest untouched.")
@click.option(
    "--held-out",
    metavar="REF",
    help="Compare both models' loss on this subset's completions: NAME, NAME@VERSION, hub:... or an exported folder.",
)
@click.option("--max-length", type=click.IntRange(min=1), help="Cut longer held-out samples to N tokens.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), help="Held-out positions run at a time; default: 8192, on a CPU 2048."
)
@click.option("--device", help="Default: the CPU; with --held-out a CUDA device when there is one.")
@catalog_option
@progress_option
@json_option
def verify(
    directory: Path,
    base: Path | None,
    held_out: str | None,
    max_length: int | None,
    batch_tokens: int | None,
    device: str | None,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Reopen a pruned checkpoint and prove its pattern, sparsity, finite logits and untouched tensors.

    Of one without some experts or blocks: counts, config, finite logits, and that every tensor is the dense model's.
    """
    from calset.pruning.verify import verify as check

    with terminal.progress(progress_mode, "verified") as show:
        report = check(
            directory, base=base, held_out=held_out, max_length=max_length, batch_tokens=batch_tokens, device=device,
            catalog=catalog, progress=show,
        )  # fmt: skip
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    for line in report.lines():
        terminal.say(line)


@cli.command()
@click.argument("model")
@click.option("--problems", required=True, multiple=True, help="Held-out problems, as build takes them. Repeatable.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Traces a problem.")
@generation_options
@catalog_option
@progress_option
@json_option
def evaluate(
    model: str,
    problems: tuple[str, ...],
    samples: int,
    catalog: Path,
    progress_mode: str,
    as_json: bool,
    **options: Unpack[GenerationOptions],
) -> None:
    """Generate and grade held-out problems: accuracy, length, non-termination, loops, tokens/s."""
    from calset.evaluation.evaluate import evaluate as run

    with terminal.progress(progress_mode, "evaluated", main="generating") as show:
        report = run(model, problems, samples=samples, catalog=catalog, progress=show, **options)
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    terminal.table(["measure", "value"], report.rows())
    for warning in report.warnings:
        terminal.note(f"Warning: {warning}")


@cli.command()
@click.option("-o", "--out", default="calset-demo", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    envvar="CALSET_ENGINE",
    help="auto, vllm or transformers; auto takes vLLM when it is installed.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@progress_option
@json_option
def demo(out: Path, engine: str, seed: int, progress_mode: str, as_json: bool) -> None:
    """The whole chain on the bundled tiny reasoning model, on a CPU, in minutes."""
    from calset.demo.run import run_demo

    with terminal.stages(progress_mode) as show:
        report = run_demo(out, engine=engine, seed=seed, progress=show)
    if as_json:
        terminal.emit_json(report.as_dict())
        return
    terminal.table(report.columns(), report.rows(), title=report.title())
    terminal.say(f"Plot: {report.plot}\nCatalog: {report.catalog}\nTook {terminal.duration(report.seconds)}")


# --- printing ---------------------------------------------------------------------------------------------------


def _print_stats(result: Stats) -> None:
    *tables, (title, columns, rows) = result.tables()
    for name, names, listed in tables:
        terminal.table(names, listed, title=name)
    if sys.stdout.isatty():
        terminal.heatmap("difficulty x length: traces, and how many of them are correct", columns, result.heat())
    else:
        terminal.table(columns, rows, title=title)


def _print_trace(row: dict[str, Any], *, full: bool) -> None:
    from calset.catalog.query.show import facts, tables, texts

    for what, value in facts(row):
        terminal.say(f"{what + ':':<11} {terminal.cell(value)}")
    for title, text in texts(row, full=full):
        terminal.say(f"\n{title}:\n{text}")
    for title, columns, rows in tables(row):
        terminal.say()
        terminal.table(columns, rows, title=title)


# --- entry ------------------------------------------------------------------------------------------------------

WARNINGS = (BuildWarning, CatalogUpgraded, EngineWarning, TextsMissing)  # calset's own


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors are one line on standard error, exit code 2 for bad input, 1 for a failure."""
    warnings.showwarning = _warn
    for kind in WARNINGS:  # messages to the user, whatever PYTHONWARNINGS says of Python's
        warnings.simplefilter("default", kind)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that is not UTF-8
    try:
        code = cli.main(argv, prog_name="calset", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
        code = 2
    except click.ClickException as error:
        hint = f" See: {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(error.format_message() + hint)
        code = 2
    except CalsetError as error:
        _fail(_with_options(str(error)))
        code = error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("stopped")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'the output folder'}; make room or name another")
        code = 1
    sys.exit(code or 0)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    text = f"Warning: {message}" if issubclass(category, WARNINGS) else None
    terminal.note(text or warnings.formatwarning(message, category, filename, lineno).rstrip())


def _with_options(message: str) -> str:
    """Name options where the library names its parameters: ``max_length=`` becomes ``--max-length``."""
    parameters = [(each.name, opt) for command in cli.commands.values() for each in command.params for opt in each.opts]
    options = {name: opt for name, opt in parameters if opt.startswith("--")}
    # A parameter stands alone: what is quoted is the user's, and what follows "limit=" in ?limit=5 is a value.
    pattern = r"'[^']*'|\"[^\"]*\"|(?<=[\s(])([a-z][a-z_]*)=(?=[\s,.:;)]|$)|^([a-z][a-z_]*)=(?=[\s,.:;)]|$)"
    return re.sub(pattern, lambda found: options.get(found[1] or found[2], found[0]), message)


def _fail(message: str) -> None:
    line = " ".join(message.split())  # an error of DuckDB's quotes the value, and a value may have 10 MB
    terminal.note("calset: " + (line if len(line) <= 4000 else f"{line[:4000]}…"))


if __name__ == "__main__":
    main()
