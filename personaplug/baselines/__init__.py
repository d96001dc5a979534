"""The rivals of the plug: retrieval, profiles, LoRA, ROPG, regressions, heuristics."""
