"""What is left is refitted to make up for what went: least squares on the inputs that consumers keep.

``compensate`` chooses what to refit, ``solve`` does one consumer, ``in_order`` goes through a network in the order in
which it computes; ``options`` are what there is to choose, ``moments`` what it takes to know.
"""
