"""The explorer: a run as one page that opens from a file. collect.py: its numbers; page.py: the file."""
