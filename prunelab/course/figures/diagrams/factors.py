"""Matrices of matrices: a Kronecker product, and a weight between two rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunelab.course.figures.diagrams.sheet import Diagram, number, shaded, tint
from prunelab.drawing.style import BLUE, INK, VERMILLION

Vectors = Sequence[Sequence[float]]


def _factors(images: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, ...]:
    """Return S, A and F: the means over images of ssᵀ, aaᵀ and (s ⊗ a)(s ⊗ a)ᵀ."""
    s, a = (np.array(part, dtype=float) for part in zip(*images, strict=True))
    rows = np.einsum("ni,nj->nij", s, a).reshape(len(s), -1)
    return s.T @ s / len(s), a.T @ a / len(a), rows.T @ rows / len(rows)


def kronecker() -> Diagram:
    """Draw S ⊗ A of small blocks: a copy of A in place of every entry of S, times that entry; and what it forgets.

    Above, one image, where S ⊗ A is the Fisher.  Below, the two images of notebook 07, where it is not.
    """
    one = [((1.0, 2.0), (3.0, -1.0))]
    two = [((1.0, 0.0), (1.0, 0.0)), ((0.0, 1.0), (0.0, 1.0))]
    sheet, cell = Diagram(7.8, 5.5), 0.44
    told = []
    for place, images in enumerate((one, two)):
        S, A, F = _factors(images)
        product = np.kron(S, A)
        top = 0.7 + 2.7 * place
        title = ("One image: $S \\otimes A$ is $F$", "The two images: $S \\otimes A$ is not $F$")[place]
        sheet.words(0.15, top - 0.48, title, ha="left", fontsize=12, weight="bold")
        middle = top + 2 * cell
        fills = np.empty((2, 2), dtype=object)
        whole = np.empty((4, 4), dtype=object)
        for index in range(4):
            row, column = divmod(index, 2)
            fills[row, column] = tint(BLUE, 0.5 * S[row, column] / S.max())
            for inner in range(4):
                whole[2 * row + inner // 2, 2 * column + inner % 2] = fills[row, column]
        sheet.numbers(0.3, top + cell, S, cell, fills=fills)
        sheet.words(0.3 + cell, top + cell - 0.13, "$S$", fontsize=11.5)
        sheet.words(1.38, middle, "$\\otimes$", fontsize=13)
        sheet.numbers(1.6, top + cell, A, cell)
        sheet.words(1.6 + cell, top + cell - 0.13, "$A$", fontsize=11.5)
        sheet.words(2.72, middle, "=", fontsize=13)
        sheet.numbers(2.97, top, product, cell, fills=whole)
        for block in range(4):
            row, column = divmod(block, 2)
            sheet.frame(2.97 + 2 * column * cell, top + 2 * row * cell, 2 * cell, 2 * cell, line=2)
            x = 2.97 + (2 * column + 1) * cell
            text = f"{number(S[row, column])} · $A$"
            sheet.words(x, top - 0.13 if row == 0 else top + 4 * cell + 0.14, text, fontsize=10.5)
        same = np.allclose(product, F)
        sheet.words(5.05, middle, "=" if same else "≠", fontsize=13, color=INK if same else VERMILLION)
        wrong = ~np.isclose(product, F)
        sheet.numbers(5.4, top, F, cell, fills=np.where(wrong, "#F4C7A6", "white"))
        sheet.words(5.4 + 2 * cell, top - 0.13, "$F$", fontsize=11.5)
        told.append((S, A, product, F, int(wrong.sum())))
    (S, A, *_), (_, _, product, F, wrong_) = told
    sheet.alt = (
        "Two Kronecker products of 2 by 2 matrices. Above, one image: S with the entries "
        f"{_row(S)} times A with {_row(A)} is a 4 by 4 matrix of four copies of A, each times one entry of S, and "
        f"equals the Fisher F. Below, two images: S times A has the diagonal {_row(np.diag(product))}, F has "
        f"{_row(np.diag(F))}; {wrong_} entries differ."
    )
    return sheet


def _row(values: np.ndarray) -> str:
    return ", ".join(number(value) for value in values.flatten())


def rotated_layer(width: int = 16, ranks: tuple[int, int] = (6, 8), kernel: int = 9) -> dict[str, np.ndarray]:
    """Return a made-up layer and its rotation: ``W``, ``S``, ``A``, ``Q_S``, ``core``, ``Q_A`` and its ``scores``.

    Then the ``damage`` of the cut, and ``macs``: multiply-adds per position before and after it.

    Rows and columns of the core are in the order of the sums of their scores, the largest first.

    Args:
        width: inputs and outputs.
        ranks: rows and columns that are kept.
        kernel: entries of the kernel, which the cost counts.
    """
    random = np.random.default_rng(3)
    bases, values, factors = [], [], []
    for _ in range(2):
        mixed = random.normal(size=(width, width)) * 0.7 ** np.arange(width)
        factors.append(mixed @ mixed.T)
        bends, basis = np.linalg.eigh(factors[-1])
        bases.append(basis)
        values.append(bends)
    weight = random.normal(size=(width, width))
    core = bases[0].T @ weight @ bases[1]
    scores = 0.5 * core**2 * np.outer(*values)
    rows, columns = (np.argsort(-scores.sum(axis)) for axis in (1, 0))
    scores, core = scores[rows][:, columns], core[rows][:, columns]
    macs = width * ranks[1] + ranks[0] * ranks[1] * kernel + ranks[0] * width
    return {
        "W": weight,
        "S": factors[0],
        "A": factors[1],
        "Q_S": bases[0][:, rows],
        "core": core,
        "Q_A": bases[1][:, columns],
        "scores": scores,
        "damage": np.array(scores.sum() - scores[: ranks[0], : ranks[1]].sum()),
        "macs": np.array([width * width * kernel, macs]),
    }


def bottleneck(width: int = 16, ranks: tuple[int, int] = (6, 8), kernel: int = 9) -> Diagram:
    """Draw a weight between its two rotations, and the three thin layers that are left when its core is cut.

    Args:
        width: inputs and outputs of the layer.
        ranks: rows and columns of the core that are kept.
        kernel: entries of the kernel; one of them is drawn.
    """
    layer = rotated_layer(width, ranks, kernel)
    sheet, cell = Diagram(7.8, 5.1), 0.088
    side, (r_out, r_in) = width * cell, ranks
    x = [0.25, 2.1, 4.05, 6.0]
    sheet.words(0.15, 0.2, "Rotate: nothing changes", ha="left", fontsize=12, weight="bold")
    top = 0.78
    core: Any = np.array(shaded(np.sign(layer["core"]) * np.sqrt(layer["scores"])))
    shown = [shaded(layer["W"]), shaded(layer["Q_S"]), core, shaded(layer["Q_A"].T)]
    names = ("$W$", "$Q_S$", "$W^*$", "$Q_A^\\top$")
    for place, (matrix, name) in enumerate(zip(shown, names, strict=True)):
        sheet.cells(x[place], top, matrix, cell)
        sheet.words(x[place] + side / 2, top - 0.15, name, fontsize=12)
    for place, sign in enumerate("=··"):
        sheet.words((x[place] + side + x[place + 1]) / 2, top + side / 2, sign, fontsize=16)
    sheet.frame(x[1], top, r_out * cell, side, color=VERMILLION, line=2.4)
    sheet.frame(x[2], top, r_in * cell, r_out * cell, color=VERMILLION, line=2.4)
    sheet.frame(x[3], top, side, r_in * cell, color=VERMILLION, line=2.4)

    sheet.words(0.15, 2.65, "Cut: three thin layers", ha="left", fontsize=12, weight="bold")
    low = 3.25
    thin = {"out": 5.75, "mid": 3.85, "in": 1.4}
    sheet.words(0.45, low + 0.5, "inputs")
    sheet.arrow((0.75, low + 0.5), (thin["in"] - 0.08, low + 0.5))
    sheet.cells(thin["in"], low + 0.5 - r_in * cell / 2, np.array(shown[3])[:r_in], cell)
    sheet.arrow((thin["in"] + side + 0.08, low + 0.5), (thin["mid"] - 0.08, low + 0.5))
    sheet.cells(thin["mid"], low + 0.5 - r_out * cell / 2, core[:r_out, :r_in], cell)
    middle = thin["mid"] + r_in * cell
    sheet.arrow((middle + 0.08, low + 0.5), (thin["out"] - 0.08, low + 0.5))
    sheet.cells(thin["out"], low + 0.5 - side / 2, np.array(shown[1])[:, :r_out], cell)
    sheet.arrow((thin["out"] + r_out * cell + 0.08, low + 0.5), (6.85, low + 0.5))
    sheet.words(7.2, low + 0.5, "outputs")
    sheet.words((thin["in"] + side + thin["mid"]) / 2, low + 0.33, f"{r_in}", fontsize=10)
    sheet.words((middle + thin["out"]) / 2, low + 0.33, f"{r_out}", fontsize=10)
    before, after = (int(value) for value in layer["macs"])
    parts = (width * r_in, r_in * r_out * kernel, r_out * width)
    places = (thin["in"] + side / 2, thin["mid"] + r_in * cell / 2, thin["out"] + r_out * cell / 2)
    sizes = (r_in * cell, r_out * cell, side)
    for where, size, name, text in zip(places, sizes, reversed(names[1:]), ("1×1", "k×k", "1×1"), strict=True):
        sheet.words(where, low + 0.5 - size / 2 - 0.16, name, fontsize=12)
        sheet.words(where, low + 0.5 + size / 2 + 0.14, text, fontsize=10)
    total = f"multiply-adds: {' + '.join(map(str, parts))} = {after} instead of {before}"
    sheet.words(3.9, low + 1.62, total, weight="bold")
    share = 1 - float(layer["damage"]) / float(layer["scores"].sum())
    sheet.alt = (
        f"A {width} by {width} weight W is the product of Q_S, the core W* and Q_A transposed. The scores of the core "
        f"are concentrated in its upper left corner; {r_out} rows and {r_in} columns with {share:.0%} of them are "
        f"framed. Below, what is left when only these stay: inputs, a 1 by 1 layer from {width} to {r_in}, the small "
        f"core from {r_in} to {r_out}, a 1 by 1 layer from {r_out} to {width}, outputs. For a kernel of {kernel} "
        f"entries {after} multiply-adds remain of {before}."
    )
    return sheet
