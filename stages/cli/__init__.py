"""The command line: one file per command; each loads a config and calls one run()."""
