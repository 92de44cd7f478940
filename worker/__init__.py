"""What every worker is, whatever its role: an engine thread, a gRPC host, a watch stream, and attempts under lease."""
