"""Copy what the site shows of the repository into git-ignored places here, so that nothing is written twice.

The copies lie as they do in the repository: ``notebooks/02_magnitude.ipynb`` links to ``../README.md``, and so does its
page.  Flows in: the repository.  Flows out: files beside the pages that are written by hand.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md", "sweeps/README.md")
LINK = re.compile(r"\]\((?![\w+]+:)([^)#\s]+)")
WIDGET = "(interactive: run this cell in Jupyter"
MOVE_IT = "A widget, as it was last drawn: run the notebook (`make lab`) to move it."
NO_PICTURE = "Here the notebook has a widget: run it (`make lab`) to move it."


def gather(root: Path, docs: Path) -> None:
    """Bring the copies in ``docs`` up to date with ``root``; what is not in the repository any more goes."""
    wanted = dict(_copies(root))
    wanted |= dict(_linked(root, docs, wanted))
    for path, content in wanted.items():
        write(docs / path, content)
    for folder in folders(docs) - {"generated"}:
        for path in [path for path in (docs / folder).rglob("*") if path.is_file()]:
            if path.relative_to(docs).as_posix() not in wanted:
                path.unlink()


def folders(docs: Path) -> set[str]:
    """Return the folders that are copies: those that git ignores."""
    lines = (docs / ".gitignore").read_text(encoding="utf-8").splitlines()
    return {line.strip("/") for line in lines if line.startswith("/") and line.endswith("/")}


def write(path: Path, content: str | bytes) -> None:
    """Write a file, but only if it changes: Sphinx reads again what is new."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _copies(root: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield path in ``docs`` -> content."""
    pages = [*PAGES, *_names(root, "bench/*.md"), *_names(root, "notebooks/**/*.md")]
    for name in pages:
        yield name, page((root / name).read_text(encoding="utf-8"), name)
    for name in _names(root, "notebooks/*.ipynb"):
        yield name, notebook((root / name).read_text(encoding="utf-8"))
    yield "notebooks/parameters/index.md", _parameters(root)


def _linked(root: Path, docs: Path, pages: Mapping[str, str | bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield what pages link to that is not a page itself, such as code or the licence; a reader downloads it.

    Raises:
        ValueError: it would lie where git does not ignore it.
    """
    written = {path.relative_to(docs).as_posix(): path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    for name, text in {**written, **pages}.items():
        for link in LINK.findall(text) if isinstance(text, str) else []:
            target = os.path.normpath(Path(name).parent / link)
            if target in pages or target.startswith("..") or not (root / target).is_file():
                continue
            if target != "LICENSE" and Path(target).parts[0] not in folders(docs):
                raise ValueError(f"{name} links to {target}: add its folder to docs/.gitignore")
            yield target, (root / target).read_bytes()


def _names(root: Path, pattern: str) -> list[str]:
    found = [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]
    return [name for name in found if ".ipynb_checkpoints" not in name]


def page(text: str, name: str) -> str:
    """Return a page with its links as the site needs them: ``docs/`` is the site's own root, a folder has an index."""
    text = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", text)
    text = re.sub(r"\]\(parameters/?\)", r"](parameters/index.md)", text)
    if name.startswith("bench/") and not text.lstrip().startswith("# "):
        text = f"# {Path(name).stem.replace('_', ' ').capitalize()}\n\n{text}"
    return text


def notebook(text: str) -> str:
    """Return a notebook whose widgets are shown as the picture that was saved of each, or as a note.

    Alt text that was saved with an image goes where the site's renderer looks for it, in the cell's metadata.
    """
    book = json.loads(text)
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = page("".join(cell["source"]), "")
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
            if WIDGET in "".join(output.get("data", {}).get("text/plain", "")):
                cell["outputs"] = _widget(output["data"].get("image/png"))
                break
    return json.dumps(book, ensure_ascii=False, indent=1)


def _widget(picture: str | None) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    if picture is not None:
        shown.append({"data": {"image/png": picture}, "metadata": {}, "output_type": "display_data"})
    note = re.sub(r"`(.*?)`", r"<code>\1</code>", MOVE_IT if picture else NO_PICTURE)
    html = f'<p class="widget-note">{note}</p>'
    return [*shown, {"data": {"text/html": html}, "metadata": {}, "output_type": "display_data"}]


def _parameters(root: Path) -> str:
    lines = ["# Other parameters", "", "`make papermill` runs every notebook with these, too.", ""]
    lines += ["| notebook | parameters |", "|---|---|"]
    for name in _names(root, "notebooks/parameters/*.json"):
        values = json.loads((root / name).read_text(encoding="utf-8"))
        stem = Path(name).stem
        shown = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in values.items())
        lines.append(f"| [{stem}](../{stem}.ipynb) | {shown} |")
    return "\n".join(lines) + "\n"
