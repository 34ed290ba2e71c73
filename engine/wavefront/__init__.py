"""The pass itself: rows that are carried through the layers as differences, and what they say at the end."""
