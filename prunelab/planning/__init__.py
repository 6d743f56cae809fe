"""From scores and a budget to a plan.

``choose`` decides which units go: ``order`` says which is the next, ``pools`` who competes with whom, ``fit`` how many
go for a budget that can be counted, ``timing`` for one that must be measured.
"""
