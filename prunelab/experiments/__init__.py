"""Experiments: one protocol for every criterion, network and data set, and grids of it.

``shootout`` is the protocol, ``sweeping`` runs a notebook over a grid on one machine or a cluster, ``figures`` draws
the results.  Neither the library nor the course imports anything from here.
"""
