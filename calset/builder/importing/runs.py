"""The runs that imported traces belong to: one for all that are alike in everything but their problem.

Must not know: rows, how text becomes tokens, grading.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from calset import ids
from calset.builder.environment import versions
from calset.builder.importing.places import MANIFEST, Manifest
from calset.builder.model.info import ModelInfo
from calset.catalog.records import Run, Source

ENGINE = "import"
FROM_FILE, FROM_TEXT = "token ids of the file", "tokenised from text"


class Runs:
    """The runs of one import, each made once.

    Args:
        info: the model whose tokenizer and reasoning format the traces are read with.
        generated_by: the model that they are kept as.
        reasoning: the name of a reasoning format that is not the model's own.
    """

    def __init__(self, info: ModelInfo, generated_by: str, reasoning: str | None = None) -> None:
        self._info, self._generated_by, self._reasoning = info, generated_by, reasoning
        self._runs: dict[str, Run] = {}

    def of(
        self,
        system_prompt: str | None,
        file: Source,
        problems: Source | None,
        manifest: Manifest,
        *,
        from_text: bool,
    ) -> Run:
        """The run of traces that are alike in all this.

        Args:
            file: where the traces were read.
            problems: where their problems were found, if not in the file.
            from_text: their token ids were made here.
        """
        how = FROM_TEXT if from_text else FROM_FILE
        key = ids.generation_key(
            model=self._generated_by,
            revision=self._revision,
            tokenizer_hash=self._info.tokenizer_hash,
            chat_template_hash=self._info.chat_template_hash,
            system_prompt=system_prompt,
            sampling=manifest.sampling,
            kind=ENGINE,  # apart from what a build of the same model draws: its samples are counted from 0
            template_options=self._info.template_options,
        )
        told = {"file": file.spec, "revision": file.revision, "token_ids": how}
        if problems is not None:
            told |= {"problems": problems.spec, "problems_revision": problems.revision}
        # All that a run says of itself besides its key: of two imports that differ in it, none speaks for the other.
        said = [file.source_id, problems and problems.source_id, how, manifest.max_tokens, manifest.seed]
        if self._reasoning is not None:
            said.append(self._reasoning)
        run_id = ids.digest("run", ENGINE, key, *said)
        if run_id not in self._runs:
            self._runs[run_id] = self._new_run(run_id, key, system_prompt, manifest, told)
        return self._runs[run_id]

    @property
    def _revision(self) -> str:
        """The model's own, unless another one is said to have generated the traces: of that nothing is known."""
        return self._info.revision if self._generated_by == self._info.model else "unknown"

    def _new_run(
        self, run_id: str, key: str, system_prompt: str | None, manifest: Manifest, told: Mapping[str, str]
    ) -> Run:
        info = self._info
        return Run(
            run_id=run_id,
            kind="build",
            generation_key=key,
            model=self._generated_by,
            model_revision=self._revision,
            tokenizer_hash=info.tokenizer_hash,
            chat_template_hash=info.chat_template_hash,
            system_prompt=system_prompt,
            sampling=dict(manifest.sampling),
            max_tokens=manifest.max_tokens or info.max_model_len,
            seed=manifest.seed,
            engine=ENGINE,
            engine_version=told["token_ids"],
            reasoning_format=info.reasoning.name,
            versions=versions(),
            hardware={},  # of the machine that generated them nothing is known
            command=shlex.join(sys.argv),
            model_path=str(info.folder.resolve()) if info.is_local else None,
            sampling_from=dict.fromkeys(manifest.sampling, MANIFEST),
            template_options=dict(info.template_options),
            engine_options=dict(told),
        )
