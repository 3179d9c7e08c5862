"""Faster ways to compute the same network: same weights, same state dict, same results within the precision."""
