"""What a Python file does, apart from what it says about it."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from functools import cache


@cache
def code_digest(text: str) -> str:
    """md5 of a file's code: the same while only docstrings, comments and blank lines change. Not of its syntax tree, which each Python
    writes down in a way of its own.
    """
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno or node.body[0].lineno
            lines[first:last] = [""] * (last - first)
    plain = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.md5(plain.encode(), usedforsecurity=False).hexdigest()
