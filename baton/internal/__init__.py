"""Wire types between Baton's own processes."""
