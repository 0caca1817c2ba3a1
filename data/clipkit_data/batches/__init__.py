"""Samples in batches: the computed order of training, the loader, evaluation, streams."""
