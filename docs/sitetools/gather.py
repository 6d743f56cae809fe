"""Copy what the site shows of the repository into git-ignored places here, so that nothing is written twice.

The copies lie as they do in the repository: ``notebooks/02_magnitude.ipynb`` links to ``../README.md``, and so does its
page.  Flows in: the repository.  Flows out: files beside the pages that are written by hand.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md")
FILES = ("LICENSE", "examples/*.py", "data/make_cifar10.py")
"""What pages link to that is no page; a reader downloads it."""
WIDGET = "(interactive: run this cell in Jupyter"
MOVE_IT = "A widget, as it was last drawn: run the notebook (`make lab`) to move it."
NO_PICTURE = "Here the notebook has a widget: run it (`make lab`) to move it."


def gather(root: Path, docs: Path) -> None:
    """Bring the copies in ``docs`` up to date with ``root``; what is not in the repository any more goes."""
    wanted = dict(_copies(root, docs))
    for path, content in wanted.items():
        write(docs / path, content)
    for folder in ("notebooks", "bench", "examples", "data"):
        for path in [path for path in (docs / folder).rglob("*") if path.is_file()]:
            if path.relative_to(docs).as_posix() not in wanted:
                path.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write a file, but only if it changes: Sphinx reads again what is new."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _copies(root: Path, docs: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield path in ``docs`` -> content."""
    pages = [*PAGES, *_names(root, "bench/*.md"), *_names(root, "notebooks/**/*.md")]
    for name in pages:
        yield name, page((root / name).read_text(encoding="utf-8"), name)
    for name in _names(root, "notebooks/*.ipynb"):
        pictures = sorted((docs / "widgets").glob(f"{Path(name).stem}*.png"))
        yield name, notebook((root / name).read_text(encoding="utf-8"), pictures)
    for name in (path for pattern in FILES for path in _names(root, pattern)):
        yield name, (root / name).read_bytes()
    yield "notebooks/solutions/index.md", _solutions(root)
    yield "notebooks/parameters/index.md", _parameters(root)


def _names(root: Path, pattern: str) -> list[str]:
    found = [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]
    return [name for name in found if ".ipynb_checkpoints" not in name]


def page(text: str, name: str) -> str:
    """Return a page with its links as the site needs them: ``docs/`` is the site's own root, a folder has an index."""
    text = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", text)
    text = re.sub(r"\]\((solutions|parameters)/?\)", r"](\1/index.md)", text)
    if name.startswith("bench/") and not text.lstrip().startswith("# "):
        text = f"# {Path(name).stem.replace('_', ' ').capitalize()}\n\n{text}"
    return text


def notebook(text: str, pictures: list[Path]) -> str:
    """Return a notebook with the widgets that were in it replaced by their pictures, in the order of their names."""
    book = json.loads(text)
    left = list(pictures)
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = page("".join(cell["source"]), "")
        for output in cell.get("outputs", []):
            if WIDGET in "".join(output.get("data", {}).get("text/plain", "")):
                cell["outputs"] = _widget(left.pop(0) if left else None)
                break
    return json.dumps(book, ensure_ascii=False, indent=1)


def _widget(picture: Path | None) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    if picture is not None:
        image = base64.b64encode(picture.read_bytes()).decode("ascii")
        shown.append({"data": {"image/png": image}, "metadata": {}, "output_type": "display_data"})
    note = re.sub(r"`(.*?)`", r"<code>\1</code>", MOVE_IT if picture else NO_PICTURE)
    html = f'<p class="widget-note">{note}</p>'
    return [*shown, {"data": {"text/html": html}, "metadata": {}, "output_type": "display_data"}]


def _solutions(root: Path) -> str:
    return "# Solutions to the exercises\n\n```{toctree}\n:glob:\n\n[0-9]*\n```\n"


def _parameters(root: Path) -> str:
    lines = ["# Other parameters", "", "`make papermill` runs every notebook once more with these.", ""]
    lines += ["| notebook | parameters |", "|---|---|"]
    for name in _names(root, "notebooks/parameters/*.json"):
        values = json.loads((root / name).read_text(encoding="utf-8"))
        stem = Path(name).stem
        shown = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in values.items())
        lines.append(f"| [{stem}](../{stem}.ipynb) | {shown} |")
    return "\n".join(lines) + "\n"
