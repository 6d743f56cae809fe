"""The tracer: which slices of which parameters can only go together.

``trace`` runs a model on tensors without data; ``recorder`` writes down what it calls; ``rules`` has one equation per
operator in the algebra of ``axes``; ``groups`` is what these equations leave free; ``drawing`` makes a picture of it.
"""
