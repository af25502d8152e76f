"""A policy behind a WebSocket, for this and other harnesses."""
