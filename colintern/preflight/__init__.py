"""Before a run: what would go wrong on this machine, with these settings."""
