"""What a prompt carries besides its text: references in JSON, texts per loop, score suffixes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple


class PromptParts(NamedTuple):
    """A prompt without its JSON; "" and None where the prompt names none. All but the text are options of a sampler."""

    text: str
    reference_path: str = ""
    mask_strategy: str = ""
    start: str = ""
    end: str = ""
    edit: str = ""
    edit_region: str = ""
    edit_ratio: float | None = None
    negative_prompt: str | None = None


def split_json(prompt: str) -> PromptParts:
    """Split 'text {"reference_path": ..., "mask_strategy": ...}' at its first brace.

    Errors: ValueError for text that is not one flat JSON object, and for other keys or values of another kind.
    Source: Open-Sora v1.2.0, opensora/utils/inference_utils.py, which knows the first two keys.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return PromptParts(text)
    try:
        options = json.loads(brace + rest)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"prompt: what follows the first brace must be JSON ({error}), got {brace + rest!r}"
        ) from error
    known = PromptParts._fields[1:]
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"prompt: JSON keys must be among {', '.join(known)}, got {key!r}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number if key == "edit_ratio" else isinstance(value, str)):
            kind = "number" if key == "edit_ratio" else "string"
            raise ValueError(f"prompt: {key} must be a {kind}, got {value!r}")
    return PromptParts(text, **options)


def split_loops(prompt: str) -> tuple[list[str], list[int] | None]:
    """Split "|0|text|2|text" into its texts and the loops they start at; (["prompt"], None) when it has no loops.

    Texts are stripped. Only prompts that begin with "|0|" have loops.
    Errors: ValueError when texts and loop numbers do not alternate or the numbers do not grow.
    Source: Open-Sora v1.2.0, opensora/utils/inference_utils.py.
    """
    if not prompt.startswith("|0|"):
        return [prompt], None
    starts, texts = _loop_fields(prompt)
    return [text.strip() for text in texts], starts


def merge_loops(texts: Sequence[str], starts: Sequence[int] | None) -> str:
    """The inverse of `split_loops`."""
    if starts is None:
        return texts[0]
    return "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))


def prompt_for_loop(prompt: str, loop: int) -> str:
    """The text that holds in loop number `loop`: that with the largest start not above it. Not stripped."""
    if not prompt.startswith("|0|"):
        return prompt
    starts, texts = _loop_fields(prompt)
    return [text for start, text in zip(starts, texts, strict=True) if start <= loop][-1]


def _loop_fields(prompt: str) -> tuple[list[int], list[str]]:
    fields = prompt.split("|")[1:]
    rule = "prompt: loops must be written |0|text|number|text with growing numbers"
    if len(fields) % 2 != 0:
        raise ValueError(f"{rule}, got {prompt!r}")
    try:
        starts = [int(field) for field in fields[::2]]
    except ValueError as error:
        raise ValueError(f"{rule}, got {prompt!r}") from error
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise ValueError(f"{rule}, got {prompt!r}")
    return starts, fields[1::2]


def append_scores(
    prompt: str, *, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Append " aesthetic score: X." " motion score: Y." " camera motion: Z." for what is given.

    A tag that the prompt already has (case-sensitive) stays as it is. Numbers get one decimal. Camera motions seen in
    training: pan right, pan left, tilt up, tilt down, zoom in, zoom out, static.
    Source: Open-Sora v1.2.0, opensora/utils/inference_utils.py.
    """
    if aes is not None and "aesthetic score:" not in prompt:
        prompt += f" aesthetic score: {aes:.1f}."
    if flow is not None and "motion score:" not in prompt:
        prompt += f" motion score: {flow:.1f}."
    if camera_motion is not None and "camera motion:" not in prompt:
        prompt += f" camera motion: {camera_motion}."
    return prompt
