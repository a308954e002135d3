"""Turn a source (PDFs, JSON lines, parquet files, a hub's repository) into checked rows and a manifest."""
