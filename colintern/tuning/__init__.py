"""A search over settings: its space, its study, the trials that are DVC experiments, and what it found."""
