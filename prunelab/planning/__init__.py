"""From scores and a budget to a plan.

``choose`` decides which units go: ``pools`` says who competes with whom, ``fit`` how many go for a budget that can be
counted, ``timing`` for one that must be measured.  ``plan`` is what was decided, as plain data.
"""
