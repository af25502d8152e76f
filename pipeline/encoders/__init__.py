"""Frozen geometry models; one file per encoder, its name is the plug-in's name."""
