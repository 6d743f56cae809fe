"""Write where the repository is public into all places that need to know: ``python binder/address.py ADDRESS``.

The place to look it up is ``[project.urls]`` in pyproject.toml.  From it follow the badges in README.md, which open the
tour on Binder and on Colab, those above the setup cell of every notebook, and ``REPOSITORY`` in that cell.  Without an
address these are absent; a test compares them.  Saved outputs stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
TOUR = "notebooks/00_tour.ipynb"
URLS = re.compile(r'\n\[project\.urls\]\nRepository = "([^"]*)"\n')
BADGES = re.compile(r"(<!-- badges[^\n]*-->\n).*?(<!-- /badges -->)", re.DOTALL)
SETUP = re.compile(r'(REPOSITORY = )"[^"]*"')


def binder(address: str, notebook: str = TOUR) -> str:
    """Return the address at which Binder builds the repository and opens a notebook in JupyterLab."""
    github = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    where = f"gh/{github[1]}" if github else f"git/{quote(address, safe='')}"
    return f"https://mybinder.org/v2/{where}/HEAD?urlpath=lab/tree/{notebook}"


def colab(address: str, notebook: str = TOUR) -> str | None:
    """Return the address at which Colab opens a notebook; it knows repositories on GitHub only."""
    github = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    return f"https://colab.research.google.com/github/{github[1]}/blob/HEAD/{notebook}" if github else None


def badges(address: str, notebook: str = TOUR) -> str:
    """Return the lines between the marks in README.md or a notebook: none without an address."""
    if not address:
        return ""
    line = f"[![Open on Binder](https://mybinder.org/badge_logo.svg)]({binder(address, notebook)})"
    if place := colab(address, notebook):
        line += f"\n[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})"
    return f"{line}\n"


def published(root: Path = ROOT) -> str:
    """Return the address that pyproject.toml names, or nothing."""
    found = URLS.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    return found[1] if found else ""


def _addressed(text: str, address: str, name: str) -> str:
    """Return a notebook's file with badges above its setup cell, and the address in it."""
    book = json.loads(text)
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["id"] == "setup-text":
            source = BADGES.sub(lambda found: found[1] + badges(address, name) + found[2], source)
        elif cell["id"] == "setup":
            source = SETUP.sub(lambda found: f'{found[1]}"{address}"', source, count=1)
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def publish(address: str, root: Path = ROOT) -> None:
    """Write the address into pyproject.toml, README.md and the notebooks; an empty one removes it."""
    address = address.rstrip("/").removesuffix(".git")
    if address and not re.fullmatch(r"https://[\w.-]+/[\w./~-]+", address):
        raise SystemExit(f"{address} is not the address of a repository, such as https://HOST/OWNER/NAME.")
    project = URLS.sub("", (root / "pyproject.toml").read_text(encoding="utf-8"))
    if address:
        urls = f'\n[project.urls]\nRepository = "{address}"\n'
        project = project.replace(
            "\n[project.optional-dependencies]\n", f"{urls}\n[project.optional-dependencies]\n", 1
        )
    changed = {root / "pyproject.toml": project}
    readme = (root / "README.md").read_text(encoding="utf-8")
    changed[root / "README.md"] = BADGES.sub(lambda found: found[1] + badges(address) + found[2], readme)
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        changed[path] = _addressed(path.read_text(encoding="utf-8"), address, f"notebooks/{path.name}")
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    publish(sys.argv[1])
