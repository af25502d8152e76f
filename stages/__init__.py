"""Stage one (extract), stage two (train), closed loop (evaluate), and the command line."""
