"""Real data sets -> true upright episodes; one file per layout."""
