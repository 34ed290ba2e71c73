"""The whole study of Stolfo, Belinkov and Sachan (2023) on any model, and what it left open."""
