"""What criteria measure on data: gradients now, curvature next."""

from prunelab.curvature.gradient import mean_gradient
from prunelab.curvature.taps import LayerCall, Taps

__all__ = ["LayerCall", "Taps", "mean_gradient"]
