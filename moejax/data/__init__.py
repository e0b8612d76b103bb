"""Text and tokens: where text comes from, how it becomes tokens, and how tokens become training batches."""
