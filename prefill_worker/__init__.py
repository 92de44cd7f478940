"""The prefill worker: computes prompts, samples their first tokens, and pushes their KV blocks to decode workers."""
