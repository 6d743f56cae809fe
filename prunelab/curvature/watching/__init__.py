"""Watching a forward pass: which layer is called on what.

``layer_calls`` sees the calls of layers with a weight matrix, whose layout is a ``weight_view``; ``parameter_calls``
those of norms, embeddings and arithmetic with parameters too.  ``samples`` says which row belongs to which sample,
``patches`` unfolds the inputs of convolutions, ``checkpoints`` refuses what recomputes a layer behind our back.
"""
