"""The fused path's kernels, in Triton: one file a family, each with the functions that launch it."""
