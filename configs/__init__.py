"""Configuration: YAML presets, and how a command's settings are put together."""
