"""What a build must know of a model before any weight is loaded: identity, tokenizer, template, limits, defaults."""

from __future__ import annotations

import inspect as signatures
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from calset import ids
from calset.builder.model import templates
from calset.builder.model.families import Family, Traits, recognise
from calset.builder.model.reasoning import ReasoningFormat, detect, shared_prefix
from calset.builder.model.sampling import Sampling
from calset.errors import CalsetError, EngineError, InputError, first_line, import_problem
from calset.io.models import locate, read_config, recorded_name


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as a build records it. ``location`` is what an engine loads: the folder, or the Hub id."""

    model: str
    location: str
    folder: Path  # where config and tokenizer lie
    revision: str  # the Hub commit, or the hash of a folder's config, weights and tokenizer
    is_local: bool
    tokenizer: Any
    tokenizer_hash: str
    chat_template_hash: str
    n_vocabulary: int  # token ids from there on mean nothing: the tokenizer's, and the rows that pad the embedding
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sampling: Sampling  # the defaults: see sampling_from
    reasoning: ReasoningFormat
    # Field of ``sampling`` -> "generation_config", "family NAME" or "default".
    sampling_from: Mapping[str, str] = field(default_factory=dict)
    family: Family | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)  # what the chat template is rendered with
    template_system: str | None = None  # the system prompt that the template adds when none is given
    template_reads_clock: bool = False  # it writes today's date into the prompt: another day, other token ids

    def prompt_ids(self, question: str, system_prompt: str | None = None) -> tuple[int, ...]:
        """The chat template's ids for one question; see ``prompts``."""
        return self.prompts([question], system_prompt)[0]

    def prompts(self, questions: Sequence[str], system_prompt: str | None = None) -> list[tuple[int, ...]]:
        """The chat template's ids for each question, ending where the model's turn begins.

        Raises:
            TemplateRefusal: the template refuses the messages (some know no system role).
            InputError: the template does not end in time, or takes too much memory or text.
        """
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        asked = [[*system, {"role": "user", "content": question}] for question in questions]
        try:
            texts = templates.render(
                self.tokenizer, asked, options=self.template_options, add_generation_prompt=True, model=self.model
            )
            # One by one: tokenizers would start threads for several, and then complain of every fork.
            return [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        except CalsetError:
            raise
        except Exception as error:
            raise templates.TemplateRefusal(
                f"the chat template of {self.model} refuses the prompt: {first_line(error)}"
            ) from error

    def remarks(self, system_prompt: str | None = None, given: Collection[str] = ()) -> tuple[str, ...]:
        """What somebody who samples this model should know, a line each.

        Args:
            system_prompt: the one that the build sends.
            given: the fields of the sampling that the user chose.
        """
        lines = []
        neutral, values = Sampling().as_dict(), self.sampling.as_dict()
        taken = [
            f"{name} {values[name]:g}"
            for name, origin in self.sampling_from.items()
            if origin.startswith("family") and name not in given and values[name] != neutral[name]
        ]
        if self.family and taken:
            lines.append(
                f"{self.model} leaves its sampling open: {', '.join(taken)} as recommended for {self.family.name} "
                f"({self.family.source})"
            )
        wanted = self.family.system_prompt if self.family else None
        if system_prompt is None and self.template_system is not None:
            lines.append(f"the chat template adds a system prompt: {shortened(self.template_system)!r}")
        elif system_prompt is None and wanted == "own":
            lines.append(f"{self.model} may not think without the system prompt of its model card: pass that one")
        elif system_prompt is not None and wanted == "never":
            lines.append(f"{self.model} is recommended to have no system prompt: put instructions into the question")
        if self.template_reads_clock:
            lines.append("the chat template writes today's date into every prompt: another day, other prompts")
        return tuple(lines)

    def check_ids(self, token_ids: Any, whose: str) -> None:
        """Refuse token ids that no engine of this model can have sampled.

        Args:
            whose: the engine that returned them, for the message.

        Raises:
            EngineError: naming the id.
        """
        if (stray := ids.outside(token_ids, self.n_vocabulary)) is not None:
            raise EngineError(
                f"the engine {whose} returned the token id {stray}, outside the vocabulary of {self.model} "
                f"({self.n_vocabulary} tokens): it holds another model, or is broken"
            )

    def decode(self, token_ids: Any) -> str:
        """Text without special tokens (end of turn, padding)."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def spell(self, token_ids: Any) -> str:
        """Text with special tokens and all."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def text_of(self, completion_ids: Any) -> str:
        """A trace's text: with special tokens, but the one that ended it."""
        ended = bool(completion_ids) and completion_ids[-1] in self.eos_token_ids
        return self.spell(completion_ids[:-1] if ended else completion_ids)


def inspect(
    model: str | Path, *, revision: str | None = None, template_options: Mapping[str, Any] | None = None
) -> ModelInfo:
    """Read a model's config, tokenizer and template, from a folder or the Hub; loads no weights, runs no remote code.

    Args:
        model: a checkpoint folder, or a Hub id: ``org/name`` or ``org/name@REVISION`` (a branch, tag or commit).
        revision: of a Hub model that names none; the default branch when None.
        template_options: what the chat template is rendered with, e.g. ``{"enable_thinking": False}`` (Qwen3) or
            ``{"reasoning_effort": "high"}`` (gpt-oss).

    Raises:
        InputError: no such folder, Hub model or revision, no config.json, no safetensors, no usable tokenizer, chat
            template or generation_config.json, an option that the template does not read, or a transformers that cannot
            be imported.
    """
    templates.prepare()
    try:
        from transformers import AutoTokenizer
    except Exception as error:  # RuntimeError too: "operator torchvision::nms does not exist"
        why = import_problem(error, "reinstall torch and transformers")
        raise InputError(f"transformers is installed but cannot be imported: {why}") from error

    folder, sha, is_local = locate(model, revision)
    config = read_config(model, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer of {model}: {first_line(error)}") from error
    template = _chat_template(model, tokenizer)
    options = dict(template_options or {})
    _check_options(model, tokenizer, template, options)
    try:
        reasoning = detect(tokenizer, template, options, model)
    except CalsetError:
        raise
    except Exception as error:  # a template of the tokenizer's own
        raise InputError(f"the chat template of {model} refuses a plain question: {first_line(error)}") from error
    defaults = _generation_config(folder)
    vocabulary = tokenizer.get_vocab()
    family = recognise(Traits(config.get_text_config().model_type, template, reasoning))
    sampling, sampling_from = _sampling(defaults, folder / "generation_config.json", family)
    name = recorded_name(model, folder, is_local)
    return ModelInfo(
        model=name,
        location=str(folder) if is_local else name,
        folder=folder,
        revision=sha,
        is_local=is_local,
        tokenizer=tokenizer,
        tokenizer_hash=ids.vocabulary_hash(vocabulary),
        chat_template_hash=ids.text_hash(template),
        n_vocabulary=_n_vocabulary(vocabulary, config),
        max_model_len=_max_model_len(model, config),
        eos_token_ids=_eos_token_ids(defaults, config, tokenizer),
        sampling=sampling,
        reasoning=reasoning,
        sampling_from=sampling_from,
        family=family,
        template_options=options,
        template_system=template_system(tokenizer, options, model),
        # Llama 3.2's leaves the clock alone when told its date_string.
        template_reads_clock="strftime_now" in template and "date_string" not in options,
    )


def _chat_template(model: str | Path, tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except Exception as error:
        raise InputError(
            f"{model} has no chat template; pass an instruction-tuned model, or put its chat_template.jinja there"
        ) from error


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _sampling(defaults: dict[str, Any], path: Path, family: Family | None) -> tuple[Sampling, dict[str, str]]:
    """generation_config's values, whatever its ``do_sample`` says (calset samples unless told temperature 0); what it
    leaves open from the family's recipe; and where each came from.

    Raises:
        InputError: a value that is no number or out of its range; names the file.
    """
    recipe = family.sampling if family else {}
    values: dict[str, float] = {}
    origins: dict[str, str] = {}
    for name, neutral in ((f.name, f.default) for f in fields(Sampling)):
        found = defaults.get(name)
        if found is not None:
            origins[name] = "generation_config"
        elif family is not None and name in recipe:
            found, origins[name] = recipe[name], f"family {family.name}"
        else:
            found, origins[name] = neutral, "default"
        values[name] = _number(path, name, found)
    try:
        return Sampling(**{**values, "top_k": max(0, int(values["top_k"]))}), origins
    except InputError as error:
        raise InputError(f"{path}: {error}; correct it there") from error


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{path}: {name} must be a number, not {value!r}; correct it there")
    return float(value)


def _check_options(model: str | Path, tokenizer: Any, template: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that would do nothing: Jinja takes a name that no template reads in silence."""
    taken = {*signatures.signature(tokenizer.apply_chat_template).parameters, "messages", "strftime_now"}
    for name in options:
        if not name.isidentifier() or name in taken or not re.search(rf"\b{name}\b", template):
            raise InputError(
                f"the chat template of {model} reads no option {name!r}; its model card names those it has"
            )


def template_system(
    tokenizer: Any, template_options: Mapping[str, Any] | None = None, model: str | Path = ""
) -> str | None:
    """The system prompt that a chat template adds by itself, as text without special tokens; None when it adds none.

    A conversation's second question follows its user turn's header alone, so what stands before the first one and is
    not that header is the template's own. None too where the template takes no such conversation.
    """
    words = ("calset question one", "calset reply", "calset question two")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
    try:
        (text,) = templates.render(tokenizer, [messages], options=template_options, model=model)
        # First, or the end of one special token could be taken for that of another.
        for token in sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)[::-1]:
            text = text.replace(token, "\0")
        head, rest = text.split(words[0])
        between = rest.split(words[1])[1].split(words[2])[0]
    except (templates.TemplateRefusal, ValueError, IndexError):
        return None
    own = head[: len(head) - shared_prefix(head[::-1], between[::-1])]
    own = re.sub(r"^\W*(system|developer)\b", "", own).replace("\0", "\n").strip()
    return own if re.search(r"\w", own) else None


def shortened(text: str, width: int = 80) -> str:
    """The start of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _eos_token_ids(defaults: dict[str, Any], config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion; both engines stop on exactly these."""
    found: set[int] = set()
    for value in (defaults.get("eos_token_id"), getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _n_vocabulary(vocabulary: Mapping[str, int], config: Any) -> int:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    known = max(vocabulary.values(), default=-1) + 1
    # The catalog keeps token ids in 32 bits.
    return min(max(known, rows if type(rows) is int else 0), 2**31)


def _max_model_len(model: str | Path, config: Any) -> int:
    # Not the tokenizer's model_max_length: R1-Distill's says 16384 of 131072.
    text_config = config.get_text_config()
    length = getattr(text_config, "max_position_embeddings", None)
    if not length:
        raise InputError(f"the config of {model} does not say max_position_embeddings; calset cannot tell its length")
    return int(length)
