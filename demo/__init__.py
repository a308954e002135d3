"""The demo: its pages, its queries, and the pre-training of its base. The library imports nothing of it."""
