"""What criteria measure on data: gradients now, curvature next."""

from prunelab.curvature.gradient import mean_gradient

__all__ = ["mean_gradient"]
