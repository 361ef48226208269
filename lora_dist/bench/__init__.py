"""How fast a run is, what bounds it, and how it compares."""
