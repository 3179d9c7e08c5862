"""Weights from anywhere, to anywhere: one file a format."""
