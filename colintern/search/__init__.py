"""Search with a model: the pages of a folder or a PDF, indexed once, ranked for a query."""
