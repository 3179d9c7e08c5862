"""From a dataset to device batches: plan, stream, decode, augment."""
