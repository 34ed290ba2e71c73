"""Interventions: prompt pairs, sites, and what is patched, as objects and as arrays."""
