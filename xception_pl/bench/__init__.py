"""Measurements of this machine: `python -m xception_pl.bench WHAT`."""
