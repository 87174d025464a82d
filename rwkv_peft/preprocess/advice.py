"""Numbers about numbers of rows, with the labels of the field's tool."""

from __future__ import annotations

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
    return [
        f"### The first ten factors of the five numbers nearby (±{NEARBY}):",
        *(f"{n:>{width}}: MICRO_BSZ={factors(n)} EPOCH_STEPS={[n // d for d in factors(n)]}" for n in numbers),
        "(rows of DATALOAD=pad and only; with pack, several rows share a place and auto counts the packs)",
    ]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
