"""Tokens <-> stored arrays; one file per codec."""
