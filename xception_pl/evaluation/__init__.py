"""How good weights are: exact scores over a held-out split, their statistics, and a report."""
