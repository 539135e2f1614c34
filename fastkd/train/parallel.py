"""The student on many devices by torch's own engines: whole on every rank (DDP), or in pieces (FSDP2).

The engines see one module, `StudentSide`, whose forward is everything that the student does in a step, the LM head's loss included,
which the head's own forward computes. So their hooks always fire, and wherever a weight is used it is whole and plain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..methods.objective import Objective
from ..models.capture import transformer_layers
from ..models.language_model import LanguageModel
from ..models.task_model import TaskModel
from .ranks import Ranks


class StudentSide(nn.Module):
    """An objective as the module that is wrapped: its forward runs any function over the objective's parameters."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Engine:
    """Runs functions of the objective's parameters, and sums their gradients over the ranks, after the last micro-batch alone."""

    def __init__(self, objective: nn.Module, ranks: Ranks, *, sharded: bool, keep_layers_whole: bool = False) -> None:
        """sharded: FSDP2. keep_layers_whole: from forward to backward, for losses on states inside of layers, whose gradients arrive
        before the layer is told that backward has come to it."""
        self.ranks = ranks
        side: nn.Module = StudentSide(objective)
        self.is_sharded = sharded and ranks.world_size > 1
        if self.is_sharded:
            mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
            for module in list(objective.modules()):
                if isinstance(module, LanguageModel | TaskModel):
                    _shard_parts(module, mesh, reshard_after_forward=not keep_layers_whole)
            fully_shard(side, mesh=mesh)
        elif ranks.world_size > 1:
            # Some methods leave the upper layers out of a forward: such parameters are found in every step.
            side = DistributedDataParallel(side, gradient_as_bucket_view=True, find_unused_parameters=True)
        self.side = side

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.side(function, *arguments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Both engines average over ranks; sums over one global denominator are wanted."""
        if isinstance(self.side, FSDPModule):
            self.side.set_requires_gradient_sync(last)
        (loss * self.ranks.world_size if self.ranks.world_size > 1 else loss).backward()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch."""
        if isinstance(self.side, DistributedDataParallel) and not last:
            return self.side.no_sync()
        return nullcontext()

    def evaluate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` runs the student without gradients, on every rank as often: in pieces, each of its forwards is a collective."""
        if not self.is_sharded:
            return function(*arguments)
        result = self.side(function, *arguments)
        for module in self.side.modules():  # no backward comes, after which whole weights would be in pieces again
            if isinstance(module, FSDPModule):
                module.reshard()
        return result


def place(objective: Objective, ranks: Ranks, *, fsdp: bool, fsdp_teacher: bool) -> None:
    """Put an objective that was made on the CPU, and what it holds, on the rank's device. What will be in pieces comes there in pieces:
    the student when its `Engine` is made, the teacher here."""
    if not fsdp or ranks.world_size == 1:
        objective.to(ranks.device)
    for name, module in objective.held.items():
        if name == "teacher" and fsdp_teacher and ranks.world_size > 1:
            assert isinstance(module, LanguageModel | TaskModel)
            _shard_frozen(module, ranks)
        else:
            module.to(ranks.device)
    objective.moved()


def _shard_frozen(model: LanguageModel | TaskModel, ranks: Ranks) -> None:
    """FSDP2 over a teacher, all but its LM head: losses read that whole."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    head = model.head.to(ranks.device) if isinstance(model, LanguageModel) else None
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh, ignored_params=set() if head is None else set(head.parameters()))


class WholeCopy:
    """A module as it is before it is sharded, on the CPU of rank 0, to be filled and saved when training has ended."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.module, self.ranks = module, ranks
        self.copy = copy.deepcopy(module).cpu() if ranks.is_main else None

    @torch.no_grad()
    def gathered(self) -> Any:
        """The copy with the module's values; None on the other ranks, all of which must call."""
        own = None if self.copy is None else dict(_tensors(self.copy))
        for name, tensor in _tensors(self.module):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if own is not None:
                own[name].copy_(whole)
        return self.copy


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients, which are clipped to `limit` (0: not clipped); 0-dim, the same on all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _shard_parts(model: LanguageModel | TaskModel, mesh: Any, *, reshard_after_forward: bool) -> None:
    """Each layer is a unit, and the head if it has a weight of its own; what is left belongs to whoever calls this."""
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if isinstance(model, LanguageModel) and model.head.weight is not model.model.get_input_embeddings().weight:
        fully_shard(model.head, mesh=mesh, reshard_after_forward=False)  # backward begins with it


def _layers(model: LanguageModel | TaskModel) -> Iterable[nn.Module]:
    try:
        return transformer_layers(model.model)
    except TypeError:  # an architecture whose layers are not known here is one unit
        return ()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
