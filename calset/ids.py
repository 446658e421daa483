"""Identity: every id and hash that calset stores is made here, from content alone.

Must not know: the catalog, engines or models. An id is the first 24 hex digits (96 bits) of the sha256 of a canonical
JSON encoding, so equal content has an equal id on any machine and in any process.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calset.errors import InputError

ID_DIGITS = 24


def canonical_json(value: Any) -> str:
    """Sorted, separator-free, ASCII JSON; lone surrogates and NULs survive as escapes."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(*parts: Any) -> str:
    """The id of a tuple of JSON-able parts."""
    return hashlib.sha256(canonical_json(list(parts)).encode("ascii")).hexdigest()[:ID_DIGITS]


def problem_id(source: str, row_or_text: str, answer: str) -> str:
    """hash(source, source row or text, reference answer).

    ``source`` is the source's name without sampling options such as a size or a seed, so that one question that two
    overlapping draws of a procedural task both hold is one problem.
    """
    return digest("problem", source, row_or_text, answer)


def generation_key(
    *,
    model: str,
    revision: str,
    tokenizer_hash: str,
    chat_template_hash: str,
    system_prompt: str | None,
    sampling: Mapping[str, Any],
    kind: str = "build",
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """What makes two traces of one problem draws from the same distribution: all but ``max_tokens`` and the seed.

    ``template_options`` (``enable_thinking``, ...) count when there are any: without, a key is what it was before them.

    Raises:
        ValueError: ``sampling`` holds ``max_tokens`` or ``seed``.
    """
    if {"max_tokens", "seed"} & set(sampling):
        raise ValueError("max_tokens and seed are not part of the generation key")
    parts = [model, revision, tokenizer_hash, chat_template_hash, system_prompt, dict(sampling)]
    if template_options:
        parts.append({"template_options": dict(template_options)})
    # Evaluation traces live apart from build traces, so that evaluating never feeds calibration.
    return digest("generation", *parts) if kind == "build" else digest("generation", *parts, kind)


def pool_key(problem: str, model: str, revision: str, kind: str) -> int:
    """60 bits of hash(problem id, model, revision, kind), an integer that the catalog groups pass rates by.

    The same as the catalog's migration computes in SQL, which is why it is no ``digest``.
    """
    text = "\n".join((problem, model, revision, kind))
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:15], 16)


def trace_id(problem: str, generation: str, sample_index: int) -> str:
    """hash(problem_id, generation_key, sample_index)."""
    return digest("trace", problem, generation, sample_index)


def request_seed(run_seed: int, problem: str, sample_index: int) -> int:
    """The engine seed of one (problem, sample), in [0, 2**31): independent streams, unlike ``n > 1``."""
    raw = hashlib.sha256(canonical_json(["seed", run_seed, problem, sample_index]).encode("ascii")).digest()
    return int.from_bytes(raw[:4], "big") & 0x7FFFFFFF


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """The tokenizer hash: two tokenizers with it equal give every token id the same meaning.

    Only token -> id counts: files, versions and merges may be written differently by different library versions.
    """
    rows = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(canonical_json(rows).encode("ascii")).hexdigest()


def outside(token_ids: Iterable[Any], n_vocabulary: int) -> str | None:
    """Return the first of the ids that is no token of a vocabulary of that size, as text; None when all are tokens."""
    strays = (i for i in token_ids if isinstance(i, bool) or not hasattr(i, "__index__") or not 0 <= i < n_vocabulary)
    return next((f"{stray!r:.40}" for stray in strays), None)


def text_hash(text: str) -> str:
    """sha256 of a text's UTF-8 bytes (lone surrogates pass through)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def files_hash(paths: Iterable[Path], root: Path | None = None) -> str:
    """sha256 over (name, bytes) of files in the order of their names: the revision of a local model or data file.

    Args:
        root: a folder above all of them: names are taken from there, so that two of one name may lie below it.
    """
    total = hashlib.sha256()
    named = {path: path.name if root is None else path.relative_to(root).as_posix() for path in paths}
    for path, name in sorted(named.items(), key=lambda item: item[1]):
        inner = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                inner.update(chunk)
        total.update(canonical_json([name, inner.hexdigest()]).encode("ascii"))
    return total.hexdigest()


def content_hash(samples: Iterable[tuple[str, Sequence[int], int]]) -> str:
    """sha256 over canonical rows (sample id, token ids, prompt length), in order; never over Parquet bytes.

    Args:
        samples: (sample id, input ids as int32, number of prompt tokens) in the subset's order; a memoryview of C ints
            is the fastest sequence.

    Raises:
        InputError: a sample that has none of these: an id that is NULL, a negative number of prompt tokens.
    """
    total = hashlib.sha256(b"calset-content-v1\0")
    for sample, input_ids, n_prompt_tokens in samples:
        try:
            name = sample.encode("utf-8")
            total.update(struct.pack("<III", len(name), n_prompt_tokens, len(input_ids)))
            total.update(name)
            total.update(_little_endian_int32(input_ids))
        except (AttributeError, TypeError, OverflowError, struct.error) as error:
            raise InputError(
                f"the sample {str(sample)[:80]!r} has an id, token ids or a number of prompt tokens that calset did "
                "not write: use another copy of the catalog or folder"
            ) from error
    return total.hexdigest()


def _little_endian_int32(values: Sequence[int]) -> bytes:
    packed = array("i", values.tobytes() if isinstance(values, memoryview) and values.format == "i" else values)
    if packed.itemsize != 4:  # pragma: no cover - no supported platform
        raise RuntimeError("calset needs 4-byte C ints")
    if struct.pack("=i", 1) != struct.pack("<i", 1):  # pragma: no cover - big-endian machines
        packed.byteswap()
    return packed.tobytes()
