"""Closed loop: the checkpoint's policy in the real simulator, tokens made live."""
