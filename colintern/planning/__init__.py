"""Before a run: what it will cost, what fits, what would go wrong."""
