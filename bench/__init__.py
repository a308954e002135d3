"""Measurements; each script prints one table and ends with one line `RESULT name=value ...`."""
