"""The tests; they mirror `moejax/` one to one, by path."""
