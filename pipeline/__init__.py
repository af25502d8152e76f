"""Moves and transforms data; used by both stages and by evaluation. Start with interfaces.py."""
