"""The second way to cut: a model rebuilt from the operators that it calls, for code that writes down sizes.

``tape`` records the operators, ``rebuild`` puts them into an ``fx.GraphModule``; ``graph``, ``ops``, ``step``,
``sizes``, ``inputs`` and ``calls`` are its parts.
"""
