"""A script that reads the docstrings of Python files: JSON paths on stdin, a JSON list of texts on stdout.

`documents.docstrings` runs it by its path in processes of its own. It imports nothing but the standard library, so it
starts in a few milliseconds, and never imports the program that started it.
"""

import ast
import gc
import json
import sys
import warnings

WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings_of(path: str) -> list[str]:
    """Every docstring of a file; none where it is not Python, such as a template that only looks like it."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        source = file.read()
    if '"""' not in source and "'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = (ast.get_docstring(node) for node in _statements(tree) if isinstance(node, WITH_DOCSTRINGS))
    return [text for text in found if text]


def _statements(tree: ast.Module) -> list[ast.AST]:
    """A module and its statements at every depth. Expressions, most of the tree, hold no docstrings."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # the list grows while it is read
        for branch in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, branch, ())
    return nodes


if __name__ == "__main__":
    gc.disable()  # syntax trees have no cycles, and looking for them takes a seventh of the time
    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
    json.dump([text for path in json.load(sys.stdin) for text in docstrings_of(path)], sys.stdout)
