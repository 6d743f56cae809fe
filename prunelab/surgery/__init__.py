"""From a model and a plan to a smaller model.

``apply`` is the door: it chooses between ``cut``, which keeps the model's class, and ``rebuilt``, which makes a model
of the operators that it calls; ``refit`` makes up for what went.  ``rehearsal`` checks a cut operator by
operator; ``constants`` keeps what code has written down, such as attention's scale; ``layers`` stands in for layers
that bake in sizes.  ``silence`` is the same function with nothing removed, which the cut model must equal, and
``agreement`` compares the two by value.
"""
