"""The tracer: which slices of which parameters can only go together.

``trace`` runs a model on tensors without data; ``recorder`` writes down what it calls; ``rules`` has one equation per
operator in the algebra of ``axes``; ``groups`` is what these equations leave free.  ``calls`` follows the same
equations on a model that computes with data.
"""
