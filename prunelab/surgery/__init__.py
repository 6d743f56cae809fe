"""From a model and a plan to a smaller model of the same class.

``apply`` cuts, after ``rehearsal`` has checked the cut operator by operator; ``constants`` keeps what code has written
down, such as attention's scale; ``modules`` stands in for layers that bake in sizes; ``silence`` is the same function
with nothing removed, which the cut model must equal.
"""
