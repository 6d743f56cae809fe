"""Sums over samples, several in one pass: gradients, second moments, Kronecker factors, moments of inputs.

``collect`` is the front; ``one_pass`` goes over the batches, ``accumulators`` are what can be added up, ``statistics``
what one has then.
"""
