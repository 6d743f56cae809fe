"""Two pieces of code beside each other: ``{beside}`` blocks, whose halves are separated by a line of ``===``.

Flows in: a page.  Flows out: two columns on the site, one on a phone; and, for the tests, the code of each side.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive

NAMES = ("Torch-Pruning", "prunelab")
BLOCK = re.compile(r"^```\{beside\}([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOTHING = "# nothing to write"


def halves(text: str) -> tuple[str, str]:
    """Return the code on the left and on the right.

    Raises:
        ValueError: the block does not have two halves.
    """
    left, line, right = text.partition("\n===\n")
    if not line:
        raise ValueError(f"a beside block needs a line of === between its halves: {text[:60]!r}")
    return left.strip("\n"), right.strip("\n")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return what every block of a page is about (its argument), and its two halves."""
    return [(about.strip(), *halves(body)) for about, body in BLOCK.findall(page)]


class Beside(Directive):
    """The directive; its argument says what the block is about, for tests."""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return a container of two containers."""
        both = nodes.container(classes=["beside"])
        for name, code in zip(NAMES, halves("\n".join(self.content)), strict=True):
            side = nodes.container(classes=["beside-half"])
            side += nodes.paragraph(name, name, classes=["beside-name"])
            block = nodes.literal_block(code, code, language="python")
            side += block
            both += side
        return [both]


def setup(app: Any) -> None:
    """Make the directive known."""
    app.add_directive("beside", Beside)
