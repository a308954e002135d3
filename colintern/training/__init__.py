"""From rows to an adapter: batches, loss, the contrastive step, checkpoints."""
