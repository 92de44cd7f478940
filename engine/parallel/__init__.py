"""Tensor parallelism: one model over several ranks, each of which holds a shard of the weights and of the KV heads.

After Shoeybi et al., "Megatron-LM", 2019. The ranks' group is theirs alone: it needs no default group of
torch.distributed, which transformers' own machinery does, and so disturbs none that KV transfers make.
"""
