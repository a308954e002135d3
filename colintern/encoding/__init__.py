"""Encode pages and queries: page features, their caches, pooling; check that an adapter encodes."""
