"""An ablation: variants of one recipe, each with the same seeds, run, compared and drawn."""
