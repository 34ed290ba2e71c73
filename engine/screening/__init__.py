"""Screened sweeps: estimates of all effects by gradients, and which are then computed exactly."""
