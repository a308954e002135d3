"""Stores of page vectors: parquet files, Qdrant and LanceDB, behind one protocol."""
