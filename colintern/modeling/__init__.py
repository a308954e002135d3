"""What is done to a model: LoRA and its count, bases and adapters read and checked, page features and embeddings."""
