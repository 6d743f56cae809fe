"""Names of prunelab are links: in annotations, and in words that are set as code (``pl.plan``, ``Statistics``).

autodoc writes where a class was defined (``prunelab.plans.Plan``); readers know it by where it is documented
(``prunelab.Plan``).  Flows in: pages and docstrings as Sphinx reads them.  Flows out: the same, with links.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import Any, TypeVar

from docutils import nodes
from sphinx import addnodes
from sphinx.util.nodes import make_refnode

LABELS = re.compile(r"^(Source|Cost|Cost per batch):")
TIDY = (
    (r"<function (\w+)(?: at 0x[0-9a-f]+)?>", r"\1"),
    (r"<factory>", "..."),
    (r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1"),  # an alias in a union
)
CALL = re.compile(r"^(?:pl|prunelab)((?:\.\w+)+)(?:\(.*\))?$|^([A-Z]\w+)(?:\(.*\))?$", re.DOTALL)


def setup(app: Any) -> None:
    """Listen to Sphinx."""
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("missing-reference", _missing)
    app.connect("doctree-resolved", _link)
    app.connect("html-page-context", _back)


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Set labels in bold; a paragraph that ends with a colon before an indented one announces code."""
    for number, line in enumerate(lines):
        lines[number] = LABELS.sub(r"**\1:**", line)
        rest = lines[number + 1 :]
        after = next((later for later in rest if later.strip()), "")
        indent = len(line) - len(line.lstrip())
        announces = line.endswith(":") and not line.endswith("::") and rest and not rest[0].strip()
        if announces and len(after) - len(after.lstrip()) >= indent + 4 and not after.lstrip().startswith(">>>"):
            lines[number] += ":"


def _signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, back: str | None) -> Any:
    """Show the default of an option by its name, not by where it is in memory."""
    if signature is None:
        return None
    for wanted, put in TIDY:
        signature, back = re.sub(wanted, put, signature), back and re.sub(wanted, put, back)
    return signature, back


@cache
def _object(dotted: str) -> Any:
    """Return what a dotted name names; ``None`` if it names nothing."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def _home(dotted: str) -> str | None:
    """Return where the object of a dotted name was defined, as a dotted name; ``None`` where that is not known."""
    found = _object(dotted)
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    return f"{module}.{name}" if module and name else None


def _table(env: Any) -> dict[str, str]:
    """Return every name under which something is documented, or was defined -> the name that it is documented by."""
    documented = env.get_domain("py").objects
    table = {name: name for name in documented}
    for name in documented:
        home = _home(name)
        if home:
            table.setdefault(home, name)
    return table


def _missing(app: Any, env: Any, node: addnodes.pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Resolve a reference to where something was defined; a type variable is not a link."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    if isinstance(_object(target), TypeVar):
        return content
    table = _table(env)
    name = table.get(target)
    if name is None and "." not in target:  # an annotation as written in the code: `Plan`
        ends = sorted((known for known in table if known.endswith(f".{target}")), key=len)
        name = table[ends[0]] if ends else None
    return _reference(app.builder, env, node["refdoc"], name, content) if name else None


def _reference(builder: Any, env: Any, here: str, name: str, content: nodes.Node) -> nodes.Element:
    entry = env.get_domain("py").objects[name]
    return make_refnode(builder, here, entry.docname, entry.node_id, content, name)


def _link(app: Any, doctree: nodes.document, here: str) -> None:
    """Make links of names that are set as code in running text."""
    env = app.builder.env
    documented = env.get_domain("py").objects
    classes: dict[str, str] = {}
    for name, entry in sorted(documented.items(), key=lambda item: len(item[0])):
        if entry.objtype in ("class", "exception"):
            classes.setdefault(name.rpartition(".")[2], name)
    for node in list(doctree.findall(nodes.literal)):
        found = CALL.match(node.astext().strip())
        inside = node.parent
        while inside is not None and not isinstance(inside, nodes.reference | nodes.title | addnodes.desc_signature):
            inside = inside.parent
        if found is None or inside is not None:
            continue
        name = f"prunelab{found[1]}" if found[1] else classes.get(found[2])
        if name in documented:
            node.replace_self(_reference(app.builder, env, here, name, node.deepcopy()))


def _back(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Mend the links from pages of source code back to the reference.

    viewcode takes it that all names of a module are documented under the same one; here `prunelab.Scores` and
    `prunelab.criteria.base.GroupwiseCriterion` are of one module.
    """
    if not page.startswith("_modules/prunelab") or "body" not in context:
        return
    table, documented = _table(app.builder.env), app.builder.env.get_domain("py").objects
    module = page.removeprefix("_modules/").replace("/", ".")

    def mended(found: re.Match[str]) -> str:
        parts = found[1].split(".")
        ends = (f"{module}.{'.'.join(parts[cut:])}" for cut in range(len(parts)))
        return "#" + next((documented[table[end]].node_id for end in ends if end in table), found[1])

    context["body"] = re.sub(r"#(prunelab[\w.]+)", mended, context["body"])
