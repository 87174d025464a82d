"""What make_tokenize.sh prints at its end: the numbers that training.sh wants, with the labels of the field's tool."""

from __future__ import annotations

import shlex

UNSAFE = set('"$`\\!\n')  # characters that double quotes do not protect from bash
NEARBY = 5
FIRST = 10


def factors(n: int, first: int = FIRST) -> list[int]:
    """The smallest `first` divisors of n."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    large = [n // d for d in reversed(small) if d * d != n]
    return (small + large)[:first]


def factor_table(count: int) -> list[str]:
    """Pairs MICRO_BSZ x EPOCH_STEPS whose product is near the number of rows. Any other pair works as well."""
    numbers = [n for n in range(count - NEARBY, count + NEARBY + 1) if n > 0]
    width = len(str(numbers[-1]))
    return [f"{n:>{width}}: MICRO_BSZ={factors(n)} EPOCH_STEPS={[n // d for d in factors(n)]}" for n in numbers]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def advice(name: str, longest: int, rows: int, end_of_doc: bool, answers: bool) -> str:
    """longest: tokens of the longest row. answers: whether any row has an Assistant turn."""
    return "\n".join([
        f"### append_eof = {end_of_doc}",
        f"### max_length = {longest}",
        f"### max_length_power_of_two = {power_of_two(longest)}",
        f"### data_line_count = {rows}",
        f"### The first ten factors of the five numbers nearby (±{NEARBY}):",
        *factor_table(rows),
        "(rows of DATALOAD=pad and only; with pack, several rows share a place and auto counts the packs)",
        "",
        "### Lines for training.sh (auto works everything out; any MICRO_BSZ and EPOCH_STEPS work, every row is used):",
        f"DATA_PATH={shlex.quote(name) if set(name) & UNSAFE else chr(34) + name + chr(34)}",
        "CTX_LEN=auto",
        "EPOCH_STEPS=auto",
        "MICRO_BSZ=auto",
        "LOSS_MASK=qa" if answers else "LOSS_MASK=pad   # no row has an Assistant turn: learn all of the text",
    ])  # fmt: skip
