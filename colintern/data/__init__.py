"""From sources to checked rows: the demo, PDFs, JSON lines, BEIR folders, parquet files, benchmarks."""
