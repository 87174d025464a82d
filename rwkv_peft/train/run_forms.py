"""Warnings of the plan: the templates of the base, the data and the held-out rows do not fit one another."""

from __future__ import annotations

from pathlib import Path

from rwkv_peft.checkpoint.base_template import describe_mismatch
from rwkv_peft.data.tokenized_files import Form, read_form


def warnings(base: Path, forms: tuple[Form, ...], held: list[Path]) -> list[str]:
    """base: its file. forms: of the trained data. held: prefixes of the held-out data."""
    found = []
    for form in forms:
        if form.template and (words := describe_mismatch(base, form.template)):
            found.append(f"the data were made with PROMPT_TYPE={form.prompt_type}, but {words}")
    for prefix in held:
        form = read_form(prefix) or read_form(prefix.with_name(prefix.name.removesuffix(".valid")))
        if form and forms and form not in forms:
            theirs = " and ".join(f"PROMPT_TYPE={one.prompt_type} with EOT={one.eot}" for one in forms)
            found.append(
                f"the held-out rows of {prefix.name} were made with PROMPT_TYPE={form.prompt_type} with EOT={form.eot}, the "
                f"trained ones with {theirs}: their loss tells little"
            )
    return found
