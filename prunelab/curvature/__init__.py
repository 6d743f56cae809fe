"""What criteria measure on data: gradients and curvature; ``collect`` measures several at once."""

from prunelab.curvature.collect import statistics_for
from prunelab.curvature.gradient import mean_gradient
from prunelab.curvature.kronecker import Eigenbasis, Factors
from prunelab.curvature.statistics import Statistics
from prunelab.curvature.taps import LayerCall, Taps

__all__ = ["Eigenbasis", "Factors", "LayerCall", "Statistics", "Taps", "mean_gradient", "statistics_for"]
