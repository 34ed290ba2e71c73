"""Before the passes run: what they cost, how they are cut, and how long they will take."""
