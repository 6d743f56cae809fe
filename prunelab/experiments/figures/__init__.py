"""Figures of the shoot-out and of sweeps."""
