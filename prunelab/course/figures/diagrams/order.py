"""What comes after what: layers that are refitted at once or in order, cuts and training at once or in steps."""

from __future__ import annotations

from prunelab.course.figures.diagrams.sheet import Diagram, tint
from prunelab.drawing.style import BLUE, GREEN, GREY, PALE, SKY, VERMILLION
from prunelab.pruning.schedule import shares

LAYERS = 3


def refits() -> Diagram:
    """Draw where each layer's refit takes its inputs from: at once from the whole network, in order from the cut one.

    Both are fitted to the outputs of the whole network's layer.
    """
    sheet = Diagram(7.8, 4.35)
    for place, (title, color) in enumerate((("At once", BLUE), ("In order", VERMILLION))):
        left, whole, cut = 0.15 + 3.9 * place, 0.9, 2.7
        once = place == 0
        sheet.words(left, 0.22, title, ha="left", fontsize=12, weight="bold")
        words = "inputs from the whole network" if once else "inputs from the cut network"
        sheet.words(left + 1.0, 0.22, words, ha="left", color=color)
        sheet.words(left, whole - 0.25, "whole network", ha="left", fontsize=10)
        sheet.words(left, cut + 0.78, "cut network", ha="left", fontsize=10)
        for layer in range(LAYERS):
            x = left + 0.5 + 1.08 * layer
            sheet.box(x, whole, 0.5, 0.62, f"{layer + 1}", fill=PALE)
            start = left + 0.1 if layer == 0 else x - 0.58
            sheet.arrow((start, whole + 0.31), (x - 0.02, whole + 0.31), color=GREY)
            sheet.box(x, cut + 0.1, 0.5, 0.42, f"{layer + 1}", fill=tint(color, 0.25))
            sheet.arrow(
                (start, cut + 0.31), (x - 0.02, cut + 0.31), color=GREY if once else color, width=1.4 if once else 2
            )
            y = whole + 0.31
            sheet.arrow(
                (x + 0.62, y), (x + 0.62, cut - 0.2), (x + 0.42, cut - 0.2), (x + 0.42, cut + 0.08), color=GREEN
            )
            if once:
                sheet.arrow(
                    (x - 0.2, y), (x - 0.2, cut - 0.45), (x + 0.1, cut - 0.45), (x + 0.1, cut + 0.08), color=color
                )
            sheet.words(x - 0.3, (y if once else cut + 0.31) - 0.16, f"$u_{layer + 1}$", color=color, fontsize=10.5)
            sheet.words(x + 0.76, y + 0.62, f"$y_{layer + 1}$", color=GREEN)
        end = left + 0.5 + 1.08 * (LAYERS - 1) + 0.5
        sheet.arrow((end, whole + 0.31), (end + 0.4, whole + 0.31), color=GREY)
        sheet.arrow((end, cut + 0.31), (end + 0.4, cut + 0.31), color=GREY)
        text = "one pass serves all layers;\n$u$ is out of date behind the first cut"
        if not once:
            text = "layer after layer;\nit also corrects what earlier layers got wrong"
        sheet.words(left + 1.85, 4.0, text, fontsize=10)
    sheet.alt = (
        "Two panels, each with a whole network of three layers above and the cut network below. In both, every cut "
        "layer is fitted to the outputs y of the same layer of the whole network. Left, at once: the inputs u come "
        "from the whole network too. Right, in order: the inputs u are what the cut network delivers at that place, "
        "with everything before it cut and refitted."
    )
    return sheet


def cuts_and_training(steps: int = 3, flops: float = 0.3) -> Diagram:
    """Draw one cut with all training after it, and several cuts with a part of the same training after each.

    Args:
        steps: cuts of the second row.
        flops: share of the FLOPs that both keep in the end.
    """
    sheet = Diagram(7.8, 2.95)
    rows = {"at once": shares("geometric", 1, flops), f"in {steps} steps": shares("geometric", steps, flops)}
    left, right, side, gap = 1.3, 7.65, 0.24, 0.04
    legend = [("S", "score the units", SKY, 0.5), ("C", "cut to this share of FLOPs", VERMILLION, 0.5)]
    legend += [("", "train, on this share of images", GREEN, 0.3)]
    for (sign, words, color, share), x in zip(legend, (left, left + 1.6, left + 3.95), strict=True):
        sheet.box(x, 0.14, side, 0.26, sign, fill=tint(color, share), fontsize=10)
        sheet.words(x + side + 0.06, 0.27, words, ha="left", fontsize=9.5)
    told = []
    long = right - left - steps * 2 * (side + gap) - (steps - 1) * gap  # of all training, in both rows
    for place, (title, kept) in enumerate(rows.items()):
        x, y, many = left, 0.8 + 1.1 * place, len(kept)
        sheet.words(0.15, y + 0.25, title, ha="left", fontsize=12, weight="bold")
        for share in kept:
            sheet.box(x, y, side, 0.5, "S", fill=tint(SKY, 0.5), fontsize=10)
            sheet.box(x + side + gap, y, side, 0.5, "C", fill=tint(VERMILLION, 0.5), fontsize=10)
            sheet.words(x + 1.5 * side + gap, y + 0.64, f"{100 * share:.0f} %", fontsize=10)
            part = "all" if many == 1 else f"1/{many}"
            sheet.box(x + 2 * (side + gap), y, long / many, 0.5, part, fill=tint(GREEN, 0.3))
            x += 2 * (side + gap) + long / many + gap
        told.append(f"{title}, " + ", ".join(f"{100 * share:.0f} %" for share in kept))
    sheet.alt = (
        "Two rows of boxes on one scale of time. In the first: score, cut, and train on all images. In the second "
        f"score, cut and train {steps} times, each time on 1/{steps} of the images, so that both train equally long. "
        f"Share of the FLOPs after every cut: {'; '.join(told)}."
    )
    return sheet
