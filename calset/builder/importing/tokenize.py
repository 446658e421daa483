"""Convert imported rows to what a build keeps of a trace: the question, the exact token ids, the finish reason.

The file's own token ids are kept as they are. Text is tokenised in two pieces, prompt and completion, as it was
generated: no token spans the border. Must not know: files, problems, the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calset import ids
from calset.builder.importing.layouts import Draft, RowError
from calset.builder.model.info import ModelInfo
from calset.builder.model.reasoning import Parts, holds_marks, split, split_any
from calset.builder.model.templates import TemplateRefusal

_PLACE = "calset question placeholder"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A trace's question, ids and end.

    ``from_text``: the completion's ids were made here. ``other_mark``: what opens its thinking where that is not the
    model's.
    """

    question: str
    system_prompt: str | None
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    parts: Parts
    finish_reason: str
    from_text: bool
    other_mark: str | None = None


class Tokenization:
    """One model's tokenizer and template at work on drafts.

    Args:
        system_prompt: of prompts that do not say theirs.
        any_marks: also look for thinking marks that are not the model's.
    """

    def __init__(self, info: ModelInfo, system_prompt: str | None = None, *, any_marks: bool = True) -> None:
        self._info, self._system_prompt, self._any_marks = info, system_prompt, any_marks
        self._special = sorted(
            (str(t) for t in info.tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True
        )
        self._frames: dict[str | None, tuple[str, str]] = {}

    def __call__(self, draft: Draft) -> Tokenized:
        """What a build would have kept of it.

        Raises:
            RowError: token ids that are not this tokenizer's, or a prompt that the template refuses.
        """
        question, system_prompt, is_rendered = self.question(draft)
        prompt_ids = draft.prompt_ids
        if not prompt_ids and draft.prompt_text is not None and is_rendered:
            prompt_ids = self._encode(draft.prompt_text)
        try:
            prompt_ids = prompt_ids or self._info.prompt_ids(question, system_prompt)
        except TemplateRefusal as error:
            raise RowError(str(error)) from error
        completion_ids = draft.completion_ids or self._encode(self._completion(draft, prompt_ids))
        if not completion_ids:
            raise RowError("has an empty completion")
        from_text, finish_reason = not draft.completion_ids, draft.end and draft.end.reason
        if from_text and finish_reason == "stop":
            completion_ids = self._ended(completion_ids)
        parts, other = self._split(completion_ids)
        if finish_reason is None:
            finish_reason = self._finish_reason(draft, completion_ids, parts)
            if from_text and finish_reason == "stop":
                completion_ids = self._ended(completion_ids)
                parts, other = self._split(completion_ids)
        return Tokenized(question, system_prompt, prompt_ids, completion_ids, parts, finish_reason, from_text, other)

    # -- the prompt --

    def question(self, draft: Draft) -> tuple[str, str | None, bool]:
        """What was asked, under which system prompt, and whether ``draft.prompt_text`` is a rendered prompt.

        A prompt that is known only as the model got it is taken apart by the chat template; one that is in no such
        template is its own question.

        Raises:
            RowError: token ids that are not this tokenizer's.
        """
        if draft.completion_ids:
            self._check_ids(draft)
        system_prompt = draft.system_prompt or self._system_prompt
        if draft.question is not None:
            return draft.question, system_prompt, True
        text = draft.prompt_text
        if text is None:
            text = self._info.spell(draft.prompt_ids)
        for candidate in dict.fromkeys((system_prompt, None)):
            before, after = self._frame(candidate)
            if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
                return text[len(before) : len(text) - len(after)], candidate, True
        before, after = self._frame(None)
        header = self._last_header(before)
        if after and text.endswith(after) and header and header in text:
            system, _, question = text[: len(text) - len(after)].rpartition(header)
            if question.strip():
                return question, self._plain(system) or None, True
        return self._plain(text) or text, system_prompt, False

    def _frame(self, system_prompt: str | None) -> tuple[str, str]:
        """What the template writes before and after a question."""
        if system_prompt not in self._frames:
            try:
                rendered = self._info.prompt_ids(_PLACE, system_prompt)
            except TemplateRefusal as error:
                raise RowError(str(error)) from error
            text = self._info.spell(rendered)
            before, _, after = text.rpartition(_PLACE)
            self._frames[system_prompt] = before, after
        return self._frames[system_prompt]

    def _last_header(self, before: str) -> str:
        """The user turn's own header: from the last special token that opens it."""
        starts = [before.rfind(token) for token in self._special]
        return before[max(starts) :] if any(start >= 0 for start in starts) else ""

    def _plain(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, "\n")
        return re.sub(r"^\W*(system|developer|user)\b", "", text).strip()

    # -- the completion --

    def _check_ids(self, draft: Draft) -> None:
        both = (*draft.prompt_ids, *draft.completion_ids)
        if (stray := ids.outside(both, self._info.n_vocabulary)) is not None:
            raise RowError(
                f"has the token id {stray}, outside the vocabulary of {self._info.model} "
                f"({self._info.n_vocabulary} tokens)"
            )
        if draft.whole_text is None:
            return
        said = "".join(draft.whole_text.split())
        decode = self._info.tokenizer.decode
        for token_ids in (both, draft.completion_ids, draft.completion_ids[:-1]):
            for skip in (False, True):
                if said == "".join(decode(list(token_ids), skip_special_tokens=skip).split()):
                    return
        raise RowError(f"has a text that its token ids do not say in the tokenizer of {self._info.model}")

    def _completion(self, draft: Draft, prompt_ids: Sequence[int]) -> str:
        """The completion's text: thinking that came apart is put before it, and what the prompt ends with goes."""
        text, form = draft.text or "", self._info.reasoning
        thought = (draft.reasoning or "").strip().removeprefix(form.open_mark).removesuffix(form.close_mark).strip()
        if thought and not (thought in text and holds_marks(text)):  # some servers give it in both places
            if not form.open_mark:
                raise RowError(
                    f"has its reasoning apart, and {self._info.model} has no marks to put around it; --reasoning NAME "
                    "names some"
                )
            text = f"{form.open_mark}\n{thought}" + (f"\n{form.close_mark}\n\n{text.lstrip()}" if text.strip() else "")
        if form.open_mark and form.opened_by_template and text.lstrip().startswith(form.open_mark):
            # R1's style: the prompt has opened the thinking already, with or without the newline behind the mark.
            text = text.lstrip().removeprefix(form.open_mark)
            ending = self._info.spell(prompt_ids[-8:])
            if ending.endswith("\n"):
                text = text.removeprefix("\n")
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._info.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ended(self, completion_ids: tuple[int, ...]) -> tuple[int, ...]:
        """With the end token that an engine returns and a text does not show."""
        known = self._info.eos_token_ids
        if not known or completion_ids[-1] in known:
            return completion_ids
        own = self._info.tokenizer.eos_token_id
        return (*completion_ids, own if own in known else known[0])

    def _split(self, completion_ids: Sequence[int]) -> tuple[Parts, str | None]:
        info = self._info
        if self._any_marks:
            return split_any(completion_ids, info.reasoning, info.decode, info.spell)
        return split(completion_ids, info.reasoning, info.decode), None

    def _finish_reason(self, draft: Draft, completion_ids: Sequence[int], parts: Parts) -> str:
        """By the end token, the limit, or whether there is an answer after the thinking: the file does not say."""
        if completion_ids[-1] in self._info.eos_token_ids:
            return "stop"
        if draft.max_tokens is not None:
            return "length" if len(completion_ids) >= draft.max_tokens else "stop"
        return "stop" if parts.answer_start >= 0 and parts.response.strip() else "length"


def with_defaults(draft: Draft, *, system_prompt: str | None, max_tokens: int | None, model: str | None) -> Draft:
    """What stands beside a file goes where its row says nothing."""
    return replace(
        draft,
        system_prompt=draft.system_prompt or system_prompt,
        max_tokens=max_tokens if draft.max_tokens is None else draft.max_tokens,
        model=draft.model or model,
    )
