"""Schedules, optimisers and weight averaging, with the semantics of the paper's TensorFlow."""
