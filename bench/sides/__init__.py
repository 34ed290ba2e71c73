"""A side of a comparison: its process, its work, how it is timed, and whether what it found is right."""
