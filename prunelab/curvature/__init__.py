"""What criteria measure on data: gradients and curvature; ``collect`` measures several at once."""

from prunelab.curvature.gradient import mean_gradient
from prunelab.curvature.statistics.collect import statistics_for
from prunelab.curvature.statistics.kronecker import Eigenbasis, Factors
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls

__all__ = ["Eigenbasis", "Factors", "LayerCall", "LayerCalls", "Statistics", "mean_gradient", "statistics_for"]
