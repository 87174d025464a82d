"""What make_tokenize.sh may say: names, types, bounds and cross-rules, in the order of the script. Values live in the script."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from rwkv_peft.checkpoint.base_template import AUTO, find_base_template, is_g1_name
from rwkv_peft.common import paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.config.shell import MOST, parse_assignments, setting
from rwkv_peft.text.preset_names import find_template

from . import encodings
from .keys import columns
from .pipeline import EncodeConfig
from .schemas import HANDLERS
from .truncate import Limits


@dataclass(frozen=True)
class TokenizeConfig:
    """The variables of make_tokenize.sh."""

    prompt_type: str = setting("PROMPT_TYPE")
    eot: Literal["doc", "blank", "both", "x17"] = setting("EOT")
    bos: Literal["auto", "0", "1"] = setting("BOS")
    handler: str = setting("HANDLER", choices=tuple(HANDLERS))
    map_keys: str = setting("MAP_KEYS")
    role_map: str = setting("ROLE_MAP")
    txt_mode: Literal["file", "line", "paragraph"] = setting("TXT_MODE")
    encoding: str = setting("ENCODING")
    repair: bool = setting("REPAIR")
    convert_headings: bool = setting("CONVERT_HEADINGS")
    strict: bool = setting("STRICT")

    expand: bool = setting("EXPAND")
    mask_history: bool = setting("MASK_HISTORY")

    max_tokens: int = setting("MAX_TOKENS", ge=0, le=MOST)
    source_length: int = setting("SOURCE_LENGTH", ge=0, le=MOST)
    target_length: int = setting("TARGET_LENGTH", ge=0, le=MOST)
    overlong: Literal["drop", "truncate", "truncate-left", "split"] = setting("OVERLONG")

    valid_percent: float = setting("VALID_PERCENT", ge=0, lt=100)
    valid_split: str = setting("VALID_SPLIT")
    seed: int = setting("SEED", ge=0, le=2**31 - 1)
    workers: Literal["auto"] | int = setting("WORKERS", ge=1, le=1024)
    overwrite_cache: bool = setting("OVERWRITE_CACHE")

    @staticmethod
    def problems(given: SimpleNamespace) -> list[SettingError]:
        """Return the errors that concern several variables. given: the values that are sound, None where one is not."""
        errors = []
        roles = functools.partial(columns, "")
        for check, value in ((find_template, given.prompt_type), (columns, given.map_keys), (roles, given.role_map)):
            try:
                if value is not None and not (check is find_template and value == AUTO):
                    check(value)
            except SettingErrors as problems:
                errors += problems.problems
            except UserError as error:
                errors.append(SettingError("PROMPT_TYPE", str(error)))
        if given.encoding is not None and (wrong := encodings.check(given.encoding)):
            errors.append(SettingError("ENCODING", wrong))
        if given.overlong == "split" and (given.source_length or given.target_length):
            which = "SOURCE_LENGTH" if given.source_length else "TARGET_LENGTH"
            errors.append(
                SettingError(which, "limits single turns, which cannot be split; use drop, truncate or truncate-left")
            )
        for name, value in (("SOURCE_LENGTH", given.source_length), ("TARGET_LENGTH", given.target_length)):
            if given.max_tokens and value and value > given.max_tokens:
                errors.append(
                    SettingError(name, f"is more than MAX_TOKENS={given.max_tokens}, which limits the whole row")
                )
        if given.valid_split and given.valid_percent:
            errors.append(
                SettingError("VALID_SPLIT", f"must be empty with VALID_PERCENT={given.valid_percent:g}, or that be 0")
            )
        if given.expand and given.mask_history:
            errors.append(SettingError("MASK_HISTORY", "must be 0 with EXPAND=1, which makes a row for every answer"))
        return errors


def settled(config: TokenizeConfig, base: Path | None = None) -> tuple[TokenizeConfig, str]:
    """The settings with PROMPT_TYPE=auto replaced by the name of a template, and what to say of it ("" where it was none).

    base: what will be trained; else training.sh says it.
    """
    if config.prompt_type != AUTO:
        return config, ""
    where = "the base"
    if base is None:
        where, base = "MODEL_PATH in training.sh", base_of_training()
    if base is None:
        name, why = "rwkv-world", "there is no training.sh that names a base; --prompt-type takes another"
    else:
        known = find_base_template(base)
        name, why = known.name, f"{where} is {base.name}"
        if known.trained:
            why += f", which was trained with {name}"
            try:
                fits = find_template(name) == known.template
            except (SettingErrors, UserError):
                fits = False
            if not fits:
                name = "rwkv-g1" if is_g1_name(base) else "rwkv-world"
                why += ", a template that is not here any more: give it with --prompt-type"
    return dataclasses.replace(config, prompt_type=name), f"PROMPT_TYPE=auto became {name} ({why})"


def base_of_training() -> Path | None:
    """The base that training.sh names, read without bash; None where there is none."""
    with contextlib.suppress(OSError, ValueError, UserError):
        name = parse_assignments(paths.ROOT / "training.sh").get("MODEL_PATH", "").strip()
        return paths.resolve_model(name) if name else None
    return None


def recipe(config: TokenizeConfig, end_of_doc: bool) -> EncodeConfig:
    """How rows become tokens under these settings."""
    limits = Limits(config.max_tokens, config.source_length, config.target_length, config.overlong)
    form = find_template(config.prompt_type)
    return EncodeConfig(
        form, config.eot, end_of_doc, config.handler, columns(config.map_keys, config.role_map), config.repair,
        config.expand, config.mask_history, limits, config.convert_headings, form.begins_with_zero(config.bos),
    )  # fmt: skip
