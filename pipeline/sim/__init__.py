"""The real LIBERO simulator, the scripted expert, and recording demonstrations."""
