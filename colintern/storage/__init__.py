"""Bytes on disk: what is fetched from a hub, hashed, listed, locked."""
