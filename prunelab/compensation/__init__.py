"""What is left is refitted to make up for what went: least squares on the inputs that consumers keep.

``compensate`` chooses what to refit, ``refit`` solves for one consumer, ``sequential`` goes through a network in the
order in which it computes.
"""
