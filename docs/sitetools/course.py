"""The page of the course: the notebooks in their order, what each is about, and what it proves.

Flows in: ``notebooks/README.md`` and ``notebooks/CLAIMS.md``.  Flows out: Markdown to include.
"""

from __future__ import annotations

import re
from pathlib import Path


def page(root: Path) -> str:
    """Return a section per notebook, and the table of contents that puts them into the site's sidebar.

    Raises:
        ValueError: a notebook is missing from the table in ``notebooks/README.md``.
    """
    about, claims = _about(root), _claims(root)
    lines, entries = [], []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        stem = path.stem
        if stem not in about:
            raise ValueError(f"notebooks/README.md has no row for {stem}")
        number, _, name = stem.partition("_")
        entries.append(f"{number} · {name.replace('_', ' ')} <notebooks/{stem}>")
        lines += [f"## [{stem}](notebooks/{stem}.ipynb)", "", about[stem][0].capitalize() + about[stem][1:] + ".", ""]
        if stem in claims:
            lines += ["```{dropdown} What it proves", *claims[stem], "```", ""]
    toctree = ["```{toctree}", ":hidden:", "", *entries, "```", ""]
    return "\n".join([*toctree, *lines])


def _about(root: Path) -> dict[str, str]:
    text = (root / "notebooks" / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| \[(\w+)\]\(\w+\.ipynb\) \| (.*?) \|", text, flags=re.MULTILINE))


def _claims(root: Path) -> dict[str, list[str]]:
    text = (root / "notebooks" / "CLAIMS.md").read_text(encoding="utf-8")
    sections = re.split(r"^## \[(\w+)\].*$", text, flags=re.MULTILINE)[1:]
    return {name: body.strip().splitlines() for name, body in zip(sections[::2], sections[1::2], strict=True)}
