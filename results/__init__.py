"""Results: metrics, effects, and the run folders that keep them."""
