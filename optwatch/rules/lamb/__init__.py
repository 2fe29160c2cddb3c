"""LAMB: AdamW with a rate for each tensor, by the norms of its weights and of its update."""
