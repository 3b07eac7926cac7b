"""Real text without a download: the docstrings of Python's own standard library, and questions about them.

Parsed from the library's sources (nothing is imported or run), in a fixed order. Lengths vary as they do in documents:
from a few words to over a thousand tokens. Counts differ a little between Python versions; the answers are in all.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "argparse base64 bisect calendar cmd code collections configparser contextlib copy csv dataclasses difflib dis "
    "fileinput filecmp fnmatch fractions functools getpass gettext glob graphlib gzip heapq hmac imaplib inspect "
    "ipaddress json linecache logging mailbox mimetypes netrc operator pdb pkgutil plistlib pprint profile "
    "queue quopri random re sched secrets selectors shelve shlex shutil smtplib socket socketserver ssl statistics "
    "string subprocess symtable tempfile textwrap threading timeit tokenize traceback turtle types uuid wave weakref "
    "webbrowser zipfile"
).split()
"""In every Python from 3.10 on, as source, and about as unlike each other as documents are."""

PER_MODULE = 5
MIN_CHARS = 20

QUESTIONS = {
    "How can several sorted inputs be merged without reading them all into memory?": "heapq.merge",
    "Which function makes a random token that is safe in a URL?": "secrets.token_urlsafe",
    "How do I split a string with the syntax of a shell command line?": "shlex.split",
    "How do I delete a folder with everything in it?": "shutil.rmtree",
    "What is the most common value of some discrete data?": "statistics.mode",
    "How do I get a list of the best close matches of a misspelt word?": "difflib.get_close_matches",
    "How do I open the user's browser on a page?": "webbrowser.open",
}
"""Question -> the name of the passage that answers it. The demo asks the first three."""


@dataclass(frozen=True)
class Passage:
    """One docstring, headed by the name of what it describes."""

    name: str
    text: str


def load_passages() -> list[Passage]:
    """Return a few hundred passages: from each module what QUESTIONS ask for, and others from the longest to the shortest."""
    return [passage for module in MODULES for passage in _choose(list(_docstrings(module)))]


def _choose(found: list[Passage]) -> list[Passage]:
    wanted = set(QUESTIONS.values())
    chosen = [passage for passage in found if passage.name in wanted]
    others = [passage for passage in found if passage.name not in wanted and len(passage.text) >= MIN_CHARS]
    others.sort(key=lambda passage: (-len(passage.text), passage.name))
    places = PER_MODULE - len(chosen)
    return chosen + others[:: max(1, len(others) // places)][:places]


def _docstrings(module: str) -> Iterator[Passage]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return
    yield from _walk(ast.parse(Path(spec.origin).read_bytes()), module)


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Passage]:
    text = ast.get_docstring(node)
    if text:
        yield Passage(name, f"{name}\n\n{text}")
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
                yield from _walk(child, f"{name}.{child.name}")
