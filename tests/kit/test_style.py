"""One vocabulary: private words of the past are in no name, comment, docstring or page of the documentation.

Strings are exempt for now: those that users see are rewritten by an issue of their own, and tests and other programs match them.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kit import ROOT

# word of a name (names are split at underscores and capitals) -> the standard term
NAMES = {
    "anew": "again, new", "border": "bound", "borders": "bounds", "cook": "encode", "cooked": "encoded", "cooks": "encode",
    "cure": "fix", "dice": "rng_state", "doctor": "repair", "found": "a noun", "held": "val, held_out", "looks": "validations",
    "mend": "fix", "mended": "fixed", "mends": "fix", "nobody": "no process", "riddle": "problem", "tell": "log, report",
    "tells": "logs", "told": "logged",
}  # fmt: skip
# words of a sentence -> the standard term; "held-out" and "stands for" are standard
PROSE = {
    r"tell(s|ing)?": "log, report", r"told": "logged, reported",
    r"anew": "again, new", r"nobody": "no process", r"riddles?": "problem",
    r"lies": "is, is stored", r"stands(?! for)": "is", r"goes on": "resumes, continues", r"cook(s|ed|ing)?": "encode",
    r"doctor(s|ed)?": "repair", r"dice": "RNG state", r"(spread|pieces) over (the )?processes": "sharded, shards",
    r"held(?![- ]out)": "validation data, kept", r"first process": "rank 0", r"in vain": "ignored", r"of ours": "launched by us",
    r"borders?": "sequence bounds", r"mend(s|ed|ing)?": "fix", r"cure[sd]?": "fix",
}  # fmt: skip
SENTENCE = {re.compile(rf"\b{pattern}\b", re.IGNORECASE): term for pattern, term in PROSE.items()}
ANY = re.compile(rf"\b(?:{'|'.join(PROSE)})\b", re.IGNORECASE)
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

Hit = tuple[int, str, str]  # line, what is there, the standard term


def in_sentence(line: int, text: str) -> Iterator[Hit]:
    for number, words in enumerate(text.splitlines()):
        for pattern, term in SENTENCE.items() if ANY.search(words) else ():
            yield from ((line + number, match[0], term) for match in pattern.finditer(words))


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.lineno, node.name


def in_python(path: Path) -> Iterator[Hit]:
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    for line, name in defined_names(tree):
        parts = [part.lower() for part in WORDS.findall(name)]
        for part, following in itertools.pairwise([*parts, ""]):
            if part in NAMES and (part, following) != ("held", "out"):
                yield line, name, NAMES[part]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str)
        ):
            first, last = node.body[0].lineno, node.body[0].end_lineno
            yield from in_sentence(first, "\n".join(lines[first - 1 : last]))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from in_sentence(token.start[0], token.string)


def in_page(path: Path) -> Iterator[Hit]:
    """Prose of a Markdown file. Code and output of the program between backticks are exempt, as strings are."""
    text = re.sub(r"```.*?```|`[^`\n]*`", lambda m: "\n" * m[0].count("\n"), path.read_text("utf-8"), flags=re.DOTALL)
    yield from in_sentence(1, text)


def hits(path: Path) -> list[Hit]:
    return sorted(set(in_page(path) if path.suffix == ".md" else in_python(path)))


def parts_of_the_project() -> dict[str, list[Path]]:
    parts: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "rwkv_peft").rglob("*.py")):
        parts.setdefault("/".join(path.relative_to(ROOT).parts[:2]).removesuffix(".py"), []).append(path)
    for folder in ("json2binidx", "bench"):
        parts[folder] = sorted(path for path in (ROOT / folder).rglob("*.py") if ".venv-peers" not in path.parts)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name != "test_style.py":  # which has the words
            parts.setdefault("/".join(path.relative_to(ROOT).parts[:2]).removesuffix(".py"), []).append(path)
    return parts | {"docs": sorted((ROOT / "docs").glob("*.md"))}


PARTS = parts_of_the_project()


@pytest.mark.parametrize("part", PARTS)
def test_private_words_are_not_used(part):
    lines = [
        f"{path.relative_to(ROOT)}:{line}: {words!r}; say: {term}"
        for path in PARTS[part]
        for line, words, term in hits(path)
    ]
    assert not lines, f"{len(lines)} private words:\n" + "\n".join(lines)


def test_a_private_word_is_found_where_it_counts(tmp_path):
    source = '''"""It is told anew."""  # nobody
def cook(found, held_out, _):
    """First line.

    The mended one stands for held-out data; it stands here.
    """
    isHeld = "told to users"
    print("nobody")
'''
    (tmp_path / "x.py").write_text(source)
    assert [(line, words) for line, words, _ in hits(tmp_path / "x.py")] == [
        (1, "anew"), (1, "nobody"), (1, "told"), (2, "cook"), (2, "found"), (5, "mended"), (5, "stands"), (7, "isHeld"),
    ]  # fmt: skip
    (tmp_path / "x.md").write_text("It goes on.\n```\ntold\n```\nSay `nobody`, not anew.\n")
    assert [(line, words) for line, words, _ in hits(tmp_path / "x.md")] == [(1, "goes on"), (5, "anew")]
