"""Single weights instead of units: ``sparsify`` chooses which stay, ``masks`` keeps the others zero in training."""
