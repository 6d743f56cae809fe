"""Words and phrases at which a reader stumbles: none is in a text that people read; with what to write instead.

The texts are Markdown pages, the cells of notebooks, and comments, docstrings and messages of the code.  This finds
what was translated word by word; style and grammar are left to people.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ = ("*.md", "bench/*.md", "data/*.md", "docs/*.md", "docs/api/*.md", "notebooks/*.md", "notebooks/*.ipynb")
READ += ("sweeps/*.md", "sweeps/*.yaml", "bench/**/*.py", "binder/*.py", "data/*.py", "docs/**/*.py", "examples/*.py")
READ += ("prunelab/**/*.py", "sweeps/*.py")

NO = r"(?<!there\s)\b(is|are|was|were) no (?!(long|larg|small)er\b|(more|less|better|one|need|such|other|way)\b)\w+"
OF_WHAT = r"\bwhat (is|was|are|were) [^.,;:()|`]{0,60}\bof what (is|was|are|were)\b|\bwhat is left of what\b"
INSTEAD = {
    r"\banew\b": "again, re-estimated, fresh",
    r"\b(stands?|standing|stood)\b(?! (for|in for|out)\b)(?!-in)": "is, is below, is next to, is compared with",
    r"\bdear(er|est)?\b": "expensive, costs more",
    r"\berrs\b": "is wrong; its mistakes",
    NO: "is not a …; of an argument: must be a positive integer",
    r"\b(is|are) none of\b": "is not one of",
    r"\bshall\b": "should, will; heads to remove",
    r"\b(is|are) to (go|stay|stand)\b": "goes, should stay, must be removed",
    r"\bwithout (a )?rest\b": "exactly, with nothing left over",
    r"\bdivided up\b": "shared out",
    r"\btakes? [^.,;:()]{1,30} along\b": "takes … with it",
    r"\bon both ways\b|\bthe ways? of (the |one |a )?(network|unit|run|criterion)s?\b": "path, strategy, schedule",
    r"\b(to|can|cannot|could) be had\b": "is available, is possible; download …",
    OF_WHAT: "name the thing",
    r"\b(comes?|came) about\b": "arises, was measured",
    r"\bwhat (came|comes|has come) of (it|each|that|a)\b": "the result, the report",
    r"\bthousand million\b": "billion",
    r"\bgives? (it|them|a function|the \w+) back\b": "returns",
    r"\bso that\b[^.;:|]*\bso that\b": "two sentences",
    r"\b(left|leaves?|leaving|stay(s|ed)?) (\w+ ){0,2}as (it|they) (is|are|was|were)\b": "is unchanged, restores",
    r"\b(goes|go|went) on (where|there)\b": "resumes, continues",
    r"\b(held|holds?) (\w+ ){1,6}against\b": "compares … with",
    r"\bhand(s|ed)? on\b": "passes on",
    r"\bone and the same\b": "the same",
    r"\bcharge[sd]? (it|them|a unit|a weight) with\b|\bcharged with (its|their|the)\b": "charges … for",
    r"\b(is|was) turned round\b": "is reversed, is inverted",
    r"\bhow would one\b|\bas one reads\b|\bone estimates\b": "say who: you, we, the paper",
    r"\b(group|kernel|file|page|folder)s? of (its|their) own\b": "a separate …",
}
"""What not to write (a regular expression, of any case; a space may be a line break) -> what to write instead."""

ALLOWED = {
    # The setup cell is code that notebooks were saved with: a word in it is mended with the next change of that cell.
    "PyTorch stays as it is",
    # An idiom, and again in code that a notebook was saved with.
    "the truth about single units is no guide",
}
"""Parts of lines that may stay, each with its reason above it."""


class Text(NamedTuple):
    """A piece of text that somebody reads: a page, a cell, a docstring, a comment."""

    place: str
    first: int
    words: str


def of_code(place: str, source: str) -> Iterator[Text]:
    """Yield comments and strings of Python code; a string in several parts is one text."""
    source = re.sub(r"^ *[%!].*$", "", source, flags=re.MULTILINE)  # a notebook's commands to its shell
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(place, token.start[0], token.string)
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Text(place, node.lineno, node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield Text(place, node.lineno, "".join(map(str, parts)))
        else:
            waiting += ast.iter_child_nodes(node)


def texts(path: Path) -> Iterator[Text]:
    """Yield what people read in a file."""
    name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from of_code(name, source)
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(source)["cells"]):
            place, words = f"{name}, cell {number}", "".join(cell["source"])
            yield from [Text(place, 1, words)] if cell["cell_type"] == "markdown" else of_code(place, words)
    else:
        yield Text(name, 1, source)


def complaints(text: Text) -> list[str]:
    """Return what to mend, with place, words and what to write instead."""
    words = re.sub(r"(?<!\n)\n(?!\n)", " ", text.words)  # a sentence goes over lines, not over paragraphs
    found = []
    for pattern, instead in INSTEAD.items():
        for match in re.finditer(pattern.replace(" ", " +"), words, re.IGNORECASE):
            around = words[max(match.start() - 60, 0) : match.end() + 60]
            if not any(part in around for part in ALLOWED):
                line = text.first + text.words[: match.start()].count("\n")
                found.append(f"{text.place}, line {line}: «{match[0]}» in «… {around} …»; better: {instead}")
    return found


def paths() -> list[Path]:
    """Return what is read; without the copies that ``make docs`` gathers, which its ``.gitignore`` names."""
    copies = {(ROOT / "docs" / line.strip("/")) for line in (ROOT / "docs/.gitignore").read_text().split()}
    found = {path for pattern in READ for path in ROOT.glob(pattern)}
    return sorted(path for path in found if copies.isdisjoint((path, *path.parents)))


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_text_makes_a_reader_stumble(path):
    found = [complaint for text in texts(path) for complaint in complaints(text)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("scores are taken anew", "again"),
        ("what stands below", "is below"),
        ("OBS is never dearer", "costs more"),
        ("where it errs", "is wrong"),
        ("`samples` is no positive whole number", "must be a positive integer"),
        ("the mode is\n    none of these", "is not one of"),
        ("heads that shall go", "to remove"),
        ("divided up", "shared out"),
        ("takes nine columns along", "with it"),
        ("is not to be had here", "is available"),
        ("what is left of what was there", "name the thing"),
        ("how do they come about", "arises"),
        ("74 thousand million entries", "billion"),
        ("the model stays as it is", "is unchanged"),
    ],
)
def test_what_reads_like_a_translation_is_found(words, instead):
    (found,) = complaints(Text("a page", 1, words))
    assert instead in found


@pytest.mark.parametrize(
    "words", ["there is no data", "a stand-in", "z stands for all", "no longer", "they take turns"]
)
def test_plain_words_are_left_alone(words):
    assert not complaints(Text("a page", 1, words))


def test_every_exception_is_needed():
    everything = "\n".join(text.words for path in paths() if path.suffix == ".ipynb" for text in texts(path))
    assert all(part in everything for part in ALLOWED)
