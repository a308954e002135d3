"""MaxSim scores and ranking metrics, for loss, dev set, evaluation and search."""
