"""Stand-ins for a model on a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args

import torch

from engine.attention.triton import TritonAttention
from engine.dry_run import LayerAttention
from engine.fused.gpu_layer import GpuDecoderLayer
from engine.fused.gpu_linear import GpuLinear
from engine.fused.gpu_mlp import GpuMLP
from engine.fused.gpu_norm import GpuRMSNorm
from engine.fused.kit import is_alike
from engine.fused.shape import has_shape, is_gated_mlp
from engine.kernels.gate import Activation

_PROOF_ROWS = 3


class GpuKit:
    """`Kit` of Triton's kernels and cuBLAS's products; of Triton's products alone in batch-invariant mode."""

    layers_attend = False

    def __init__(self, dtype: torch.dtype, *, batch_invariant: bool) -> None:
        self.backend = TritonAttention(batch_invariant=batch_invariant)
        self._batch_invariant = batch_invariant

    def make_layer(self, layer: Any, attention: LayerAttention, *, last: bool) -> torch.nn.Module | None:
        if not has_shape(layer, attention, summed=True):
            return None
        return GpuDecoderLayer(layer, attention, self.backend, last=last, batch_invariant=self._batch_invariant)

    def replace_rest(self, module: torch.nn.Module) -> None:
        """RMS norms and gated MLPs wherever kernels answer as they do; in batch-invariant mode linear layers too.

        Raises:
            ValueError: in batch-invariant mode, a module has no stand-in whose rows do not depend on each other.
        """
        self._replace_below(module)
        if self._batch_invariant and (others := _dependent(module)):
            raise ValueError(
                f"model.batch_invariant: what {', '.join(others)} would compute depends on the batch; there are "
                "kernels for linear layers and RMS norms alone"
            )

    def _replace_below(self, parent: torch.nn.Module) -> None:
        for name, child in list(parent.named_children()):
            stand_in = self._stand_in(child)
            if stand_in is None:
                self._replace_below(child)
            else:
                setattr(parent, name, stand_in)
            if isinstance(stand_in, GpuMLP):
                # What others before it have left: see `engine.fused.replace.fuse`.
                torch.cuda.empty_cache()

    def _stand_in(self, module: torch.nn.Module) -> torch.nn.Module | None:
        if type(module) is torch.nn.Linear:
            return GpuLinear([module], batch_invariant=True) if self._batch_invariant else None
        if is_gated_mlp(module, summed=True):
            return self._proved(module, self._mlps(module))
        if _is_norm(module):
            return self._proved(module, _norms(module))
        return None

    def _mlps(self, module: Any) -> Iterator[torch.nn.Module]:
        for activation in get_args(Activation):
            yield GpuMLP(module, activation, batch_invariant=self._batch_invariant)

    @torch.inference_mode()
    def _proved(self, module: Any, stand_ins: Iterator[torch.nn.Module]) -> torch.nn.Module | None:
        """The first that answers as `module` does to a few random rows, if any."""
        weight = next(module.parameters())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_PROOF_ROWS, weight.shape[-1], generator=generator).to(weight)
        wanted = module(x)
        return next((stand_in for stand_in in stand_ins if is_alike(wanted, stand_in(x))), None)


def _is_norm(module: Any) -> bool:
    """Whether it may be an RMS norm with weights, of rows and of nothing else."""
    return (
        type(module).__name__.endswith("RMSNorm")
        and len(inspect.signature(module.forward).parameters) == 1
        and [parameter.dim() for parameter in module.parameters()] == [1]
        and hasattr(module, "weight")
    )


def _norms(module: Any) -> Iterator[torch.nn.Module]:
    epsilon: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is not None:
        for offset in (0.0, 1.0):
            yield GpuRMSNorm(module.weight.detach(), epsilon, offset)


def _dependent(module: torch.nn.Module) -> list[str]:
    """Kinds of modules that multiply matrices or normalise by themselves: how torch does that depends on the rows."""
    return sorted({type(each).__name__ for each in module.modules() if _has_matrix(each) or _is_norm(each)})


def _has_matrix(module: torch.nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, torch.nn.Embedding) and any(parameter.dim() > 1 for parameter in own)
