"""Describe the data: counts, histograms, languages. Nothing here decides a result."""
