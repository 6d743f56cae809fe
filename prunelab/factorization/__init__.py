"""EigenDamage's surgery: layers replaced by bottlenecks in the Kronecker-factored eigenbasis of the Fisher.

``factorize`` does it for a network; ``ranks`` decides how wide each bottleneck is, ``sites`` finds the layers,
``bottleneck`` is the module that takes a layer's place, ``factorized`` rebuilds it when a file is loaded.
"""
