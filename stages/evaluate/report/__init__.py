"""Results for people: pages, tables, evaluations compared pair by pair."""
