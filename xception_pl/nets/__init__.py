"""Networks: pure torch, importable without Lightning and without datasets."""
