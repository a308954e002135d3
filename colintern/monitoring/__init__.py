"""Observe a training run: rules on its curve, throughput, progress, trackers."""
