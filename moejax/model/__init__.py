"""Flax modules: they declare weights and their logical axes, and call moejax.ops."""
