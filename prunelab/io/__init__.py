"""Keep a pruned model: weights and plans in one safetensors file, no pickle anywhere.

``keep`` saves and loads; ``header`` is what the file holds besides the weights, ``steps`` how a model is made again
from it, ``atomic`` how a file is written so that a crash leaves the old one.
"""

from prunelab.io.keep import load, save

__all__ = ["load", "save"]
