"""Generated from proto/baton/v1: the public API."""
