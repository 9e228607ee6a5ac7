"""Latin squares to complete: what is written can be solved in one way only, and the check knows a solution."""

import json
import sys

import numpy as np
import pytest

from dalm_utils.scripts import puzzles
from dalm_utils.scripts.puzzles import is_solved, latin_squares


@pytest.mark.parametrize("size, count", [(1, 1), (2, 2), (3, 12), (4, 576)])
def test_all_latin_squares_are_found(size, count):
    squares = latin_squares(size)
    assert len(squares) == len(np.unique(squares, axis=0)) == count
    for square in squares.reshape(-1, size, size):
        assert all(sorted(line) == list(range(1, size + 1)) for line in (*square, *square.T))


@pytest.mark.slow
@pytest.mark.parametrize("givens", [5, 8, 15])
def test_each_puzzle_has_one_completion_which_is_the_answer(givens):
    made = list(puzzles.puzzles(40, givens, seed=1))
    assert len({puzzle["prompt"] for puzzle in made}) == 40 and made == list(puzzles.puzzles(40, givens, seed=1))
    answers = [f" {puzzles.show(square)}" for square in latin_squares()]
    for puzzle in made:
        assert sum(sign.isdigit() for sign in puzzle["prompt"]) == givens
        assert [answer for answer in answers if is_solved(puzzle["prompt"], answer)] == [puzzle["response"]]


@pytest.mark.parametrize(
    "answer",
    ["", "1 2 3 4", "1 2 3 4 / 2 1 4 3 / 3 4 1 2 / 4 3 2", "1 2 3 4 / 1 2 3 4 / 1 2 3 4 / 1 2 3 4",
     "1 2 3 4 / 2 1 4 3 / 3 4 1 2 / 4 3 2 .", "2 1 3 4 / 1 2 4 3 / 3 4 1 2 / 4 3 2 1", "a b", "1 2 3 4 " * 5],
)  # fmt: skip
def test_what_is_no_solution_is_known(answer):
    prompt = "Square: 1 . . . / . . . . / . . . . / . . . . ="
    assert is_solved(prompt, " 1 2 3 4 / 2 1 4 3 / 3 4 1 2 / 4 3 2 1") and not is_solved(prompt, answer)


def test_more_puzzles_than_there_are_end_with_an_error_and_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(puzzles, "PATIENCE", 20)
    out = tmp_path / "squares.jsonl"
    monkeypatch.setattr(sys, "argv", ["puzzles", str(out), "--givens", "15"])
    with pytest.raises(
        ValueError, match=r"only \d,\d\d\d different puzzles with 15 givens were found; lower the count"
    ):
        puzzles.main()
    assert not out.exists()


def test_puzzles_are_written_to_a_new_file_only(tmp_path, monkeypatch, capsys):
    out = tmp_path / "squares.jsonl"
    monkeypatch.setattr(sys, "argv", ["puzzles", str(out), "--count", "12", "--givens", "9"])
    puzzles.main()
    assert "12 puzzles in" in capsys.readouterr().out
    assert [*map(json.loads, out.read_text().splitlines())] == list(puzzles.puzzles(12, 9))
    with pytest.raises(FileExistsError):
        puzzles.main()
    with pytest.raises(ValueError, match="from 4 givens on, got 3"):
        next(puzzles.puzzles(1, 3))
