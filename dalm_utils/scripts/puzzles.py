"""Writes Latin squares to complete, as prompt/answer pairs: `python -m dalm_utils.scripts.puzzles OUT.jsonl`.

In a Latin square of order 4 each row and each column holds 1, 2, 3 and 4 once. A prompt shows some of the cells, a dot
for each of the others, and has exactly one completion, which is the answer:

    {"prompt": "Square: . 2 . . / 4 . . 3 / . . . . / . . 1 . =", "response": " 3 2 4 1 / 4 1 2 3 / 1 3 ..."}

The cell that is forced first may be anywhere. From left to right one has to see through the whole square before its
first cell; in the order of certainty one step follows from the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SIZE = 4
PATIENCE = 100_000  # draws without a new puzzle, after which there are hardly any left


def latin_squares(size: int = SIZE) -> np.ndarray:
    """All Latin squares of an order, `[S, size * size]` of numbers from 1; there are 576 of order 4."""
    rows = list(itertools.permutations(range(1, size + 1)))
    squares: list[tuple[int, ...]] = [()]
    for _ in range(size):
        squares = [square + row for square in squares for row in rows if _fits(square, row)]
    return np.array(squares)


def _fits(square: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether no number of a row is in the same column above it."""
    above = (square[start : start + len(row)] for start in range(0, len(square), len(row)))
    return all(number != other for earlier in above for number, other in zip(row, earlier, strict=True))


def puzzles(count: int, givens: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Different puzzles with this many cells given, each with exactly one completion.

    Raises:
        ValueError: fewer than 4 cells or more than 15: of those no square is known, or nothing is left to find; or
            there are fewer puzzles than asked for, such as 9,216 of 15 cells.
    """
    if not 4 <= givens < SIZE * SIZE:
        raise ValueError(f"a square of {SIZE * SIZE} cells has one completion from 4 givens on, got {givens}")
    draws, squares = np.random.default_rng(seed), latin_squares()
    seen: set[str] = set()
    in_vain = 0
    while len(seen) < count:
        if in_vain == PATIENCE:
            raise ValueError(f"only {len(seen):,} different puzzles with {givens} givens were found; lower the count")
        in_vain += 1
        square = squares[draws.integers(len(squares))]
        given = draws.permutation(SIZE * SIZE)[:givens]
        puzzle = show(np.where(np.isin(np.arange(SIZE * SIZE), given), square, 0))
        if puzzle not in seen and (squares[:, given] == square[given]).all(1).sum() == 1:
            in_vain = 0
            seen.add(puzzle)
            yield {"prompt": f"Square: {puzzle} =", "response": f" {show(square)}"}


def show(cells: np.ndarray) -> str:
    """A square as text, row by row, with a dot for each 0."""
    rows = cells.reshape(SIZE, SIZE)
    return " / ".join(" ".join(str(cell) if cell else "." for cell in row) for row in rows)


def is_solved(prompt: str, answer: str) -> bool:
    """Whether an answer is a Latin square that keeps the cells given in its prompt."""
    given, cells = (re.findall(r"[\d.]", text) for text in (prompt, answer))
    if len(cells) != SIZE * SIZE or "." in cells:
        return False
    square = np.array(cells, dtype=int).reshape(SIZE, SIZE)
    whole = all(sorted(line) == list(range(1, SIZE + 1)) for line in (*square, *square.T))
    return whole and all(cell in (".", own) for cell, own in zip(given, cells, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes Latin squares to complete, as prompt/answer pairs.")
    parser.add_argument("out", type=Path, help="a .jsonl file, which must not exist")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--givens", type=int, default=7, help="cells that are shown, of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; name another file")
    lines = [json.dumps(puzzle) + "\n" for puzzle in puzzles(options.count, options.givens, options.seed)]
    with options.out.open("x") as file:  # only now, so that a refusal leaves no file in the way
        file.writelines(lines)
    print(f"{options.count:,} puzzles in {options.out}")


if __name__ == "__main__":
    main()
