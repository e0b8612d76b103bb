"""Serving: the decode engine."""
