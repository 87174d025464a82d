"""Warnings about templates that differ between the base model, the training data and the held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rwkv_peft.checkpoint.base_template import describe_mismatch
from rwkv_peft.data.tokenized_files import Form, read_form


def warnings(base: Path, forms: Sequence[Form], val_prefixes: Sequence[Path]) -> list[str]:
    """Return a warning for each template that does not fit.

    Args:
        base: file of the base model.
        forms: of the training data.
        val_prefixes: of the held-out data.
    """
    messages = []
    for form in forms:
        if form.template and (words := describe_mismatch(base, form.template)):
            messages.append(f"the data were made with PROMPT_TYPE={form.prompt_type}, but {words}")
    for prefix in val_prefixes:
        val_form = read_form(prefix) or read_form(prefix.with_name(prefix.name.removesuffix(".valid")))
        if val_form and forms and val_form not in forms:
            trained = " and ".join(f"PROMPT_TYPE={form.prompt_type} with EOT={form.eot}" for form in forms)
            messages.append(
                f"the held-out rows of {prefix.name} were made with PROMPT_TYPE={val_form.prompt_type} with "
                f"EOT={val_form.eot}, the trained ones with {trained}: their loss tells little"
            )
    return messages
