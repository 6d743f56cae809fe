"""Which cells of a notebook a widget needs, so that a browser's test does not run the others again.

A cell is needed if it gives a name its value, or changes what the name stands for, that a needed cell below reads.
``make notebooks`` runs them all.
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator
from typing import TypeGuard

from nbformat import NotebookNode

ALWAYS = ("setup", "parameters", "validate", "injected")


def keep_needed(book: NotebookNode, last: str) -> None:
    """Cut a notebook down to its text and code up to one cell, and the code to what that one needs and all imports.

    Args:
        book: a notebook; it changes.
        last: the id of the cell that is to run.
    """
    place = next(place for place, cell in enumerate(book.cells) if cell.id == last)
    del book.cells[place + 1 :]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    lines = {cell.id: [line for line in ast.parse(cell.source).body if _imports(line)] for cell in code}
    imported = {as_.asname or as_.name for found in lines.values() for line in found for as_ in line.names}
    functions = {f.name for cell in code for f in ast.parse(cell.source).body if isinstance(f, ast.FunctionDef)}
    kept = {cell.id for cell in code if any(map(_registers, ast.parse(cell.source).body))}
    missing: set[str] = set()
    while True:  # a function may call one that a later cell defines: what nobody above gives is looked for once more
        before, needed = len(kept), missing
        for cell in reversed(code):
            given, changed, read = names(cell.source)
            if cell.id in (last, *ALWAYS) or cell.id in kept or needed & (given | changed):
                kept.add(cell.id)
                needed = (needed - given | read) - imported
        missing = needed & functions
        if len(kept) == before:
            break
    for cell in code:
        if cell.id not in kept:
            cell.source = "\n".join(map(ast.unparse, lines[cell.id]))
    book.cells = [cell for cell in book.cells if cell.source]


def names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Return the names that a cell gives a value, those whose object it changes, and those that it needs from above.

    What is imported is none of these: imports are always kept.

    >>> [sorted(part) for part in names("total = 1\\ntotal += part\\nfound.append(total)")]
    [['total'], ['found'], ['found', 'part']]
    """
    given: set[str] = set()
    changed: set[str] = set()
    read: set[str] = set()
    for statement in ast.parse(source).body:
        if _imports(statement):
            continue
        symbols = symtable.symtable(ast.unparse(statement), "cell", "exec")
        bound = {symbol.get_name() for symbol in symbols.get_symbols() if symbol.is_assigned()}
        altered = {name for node in ast.walk(statement) for name in _altered(node)}
        used = set(_used(symbols)) | altered
        if isinstance(statement, ast.If | ast.While | ast.Try | ast.AugAssign):
            used |= bound  # it may keep the value that it had
        else:
            used -= {name for node in ast.walk(statement) for name in _targets(node)}
        read |= used - given
        changed |= altered - given
        given |= bound
    return given, changed, read


def _registers(statement: ast.stmt) -> bool:
    """Tell whether a statement puts something into a table that cells above read: by a decorator, or with ``|=``."""
    if isinstance(statement, ast.AugAssign):
        return isinstance(statement.target, ast.Name) and statement.target.id.isupper()
    return isinstance(statement, ast.FunctionDef) and bool(statement.decorator_list)


def _imports(statement: ast.stmt) -> TypeGuard[ast.Import | ast.ImportFrom]:
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _used(symbols: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names of the cell that a statement reads, also from within functions that it defines."""
    for symbol in symbols.get_symbols():
        if symbol.is_referenced() and (symbols.get_type() == "module" or symbol.is_global()):
            yield symbol.get_name()
    for inner in symbols.get_children():
        yield from _used(inner)


def _altered(node: ast.AST) -> Iterator[str]:
    """Yield the name whose object a node changes: ``name.append(…)`` on a line of its own, or ``name[…] = …``."""
    changes = isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        node, changes = node.value.func, isinstance(node.value.func, ast.Attribute)
    while changes and isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if changes and isinstance(node, ast.Name):
        yield node.id


def _targets(node: ast.AST) -> Iterator[str]:
    """Yield the names that a loop or a ``with`` sets before its body reads them."""
    found = [node.target] if isinstance(node, ast.For) else []
    found += [item.optional_vars for item in node.items if item.optional_vars] if isinstance(node, ast.With) else []
    yield from (inner.id for target in found for inner in ast.walk(target) if isinstance(inner, ast.Name))
