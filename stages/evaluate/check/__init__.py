"""The contract check: the same moment as training sees it and as the closed loop sees it."""
