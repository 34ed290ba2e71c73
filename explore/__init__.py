"""The explorer: a run as one page that opens from a file.

collect.py and collect_edges.py: its numbers; page.py: the file.
"""
