"""The decode worker: reserves blocks, receives prompts' KV, and generates tokens by continuous batching."""
