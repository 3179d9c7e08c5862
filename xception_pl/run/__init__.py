"""What happens around training: the run folder, signals, progress, figures."""
