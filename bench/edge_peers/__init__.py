"""Other tools at work on the effects of edges, each in a process that prints JSON lines."""
