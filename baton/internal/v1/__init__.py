"""Generated from proto/baton/internal/v1: what routers and workers say to each other."""
