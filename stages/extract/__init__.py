"""Stage one: a frozen encoder over every row of a pack, on Ray."""
