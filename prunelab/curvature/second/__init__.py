"""Second derivatives: products of the Hessian or the Gauss-Newton matrix with vectors (``hvp``).

``dual*`` goes forward on dual numbers, ``double_backward`` twice back, ``vjp`` from any tensor to any other;
``layer_pairs`` holds a layer's output against another one's, ``unit_slopes`` is one derivative per unit.
"""
