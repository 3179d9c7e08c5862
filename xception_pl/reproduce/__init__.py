"""The reproduction ledger: each claim of the paper, the recipe that runs it, the paper's number and ours."""
