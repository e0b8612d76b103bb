"""Checkpoints: our own on disk (store), published ones (torch_files), and the names that connect them (names)."""
