"""Train the zoo's checkpoints, fine-tune pruned networks, measure accuracy.

    recipe = Recipe(epochs=2, lr=0.02, weight_decay=5e-4)
    fit(small, images.train, recipe, distill=Distillation(model))  # towards the labels and the unpruned model
    evaluate(small, data.loader(images.test, 500))

``recipes`` says how a network is trained, ``loop`` does it, in mixed precision on a GPU, ``distillation`` learns from
another model, ``checkpoints`` trains from scratch and keeps the result: ``python -m prunelab.training NAME``.
"""

from prunelab.training.checkpoints import train_checkpoint
from prunelab.training.distillation import Distillation
from prunelab.training.loop import default_device, evaluate, fit, mixed_precision
from prunelab.training.recipes import PAPERS, RECIPES, Recipe

__all__ = [
    "PAPERS",
    "RECIPES",
    "Distillation",
    "Recipe",
    "default_device",
    "evaluate",
    "fit",
    "mixed_precision",
    "train_checkpoint",
]
