"""Generates load on a server and measures what its clients see; loads no torch.

requests    what is sent: a prompt, how much to generate, when, and what follows in the same conversation
workloads   random lengths, shared prefixes, conversations
traces      the published traces of Mooncake and of Azure
arrivals    when requests arrive: Poisson, gamma, fixed intervals
targets     who is asked: an OpenAI-compatible server (http_target) or Baton over gRPC (grpc_target)
outcome     what happened to one request
runner      sends the requests at their times
measures    latencies, throughput and goodput of what happened
"""
