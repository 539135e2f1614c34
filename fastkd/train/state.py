"""The state of modules and optimizers as named tensors, which is how checkpoints hold it.

Random generators have no state here: whatever is drawn in a step is drawn from counters (see `batches.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from .checkpoint import Piece, StoredTensors

State = dict[str, Tensor | Piece]
Stored = Mapping[str, Tensor]


def module_tensors(module: nn.Module) -> State:
    """Every parameter once (tied ones under their first name), and the persistent buffers."""
    return {name: _held(value) for name, value in _named(module).items()}


def own_tensors(module: nn.Module, stored: Stored) -> State:
    """What of `stored`, whatever number of ranks it was split over, belongs to `module` on this one."""
    own = _named(module)
    if own.keys() != set(stored):
        raise ValueError(f"The checkpoint holds other weights than the student: {sorted(own.keys() ^ set(stored))[:5]}.")
    parts = {name: _own_part(stored, name, value) for name, value in own.items()}
    return {name: Piece(part) if isinstance(own[name], DTensor) else part for name, part in parts.items()}


def set_module_tensors(module: nn.Module, state: State) -> None:
    """Give `module` the values of `state`, as `module_tensors` or `own_tensors` gave it."""
    with torch.no_grad():
        for name, value in _named(module).items():
            given = state[name]
            (value.to_local() if isinstance(value, DTensor) else value).copy_(given.rows if isinstance(given, Piece) else given)


def _named(module: nn.Module) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {name: value.detach() for name, value in {**dict(module.named_parameters()), **buffers}.items()}


def _held(tensor: Tensor) -> Tensor | Piece:
    return Piece(tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def _own_part(stored: Stored, name: str, tensor: Tensor) -> Tensor:
    """What of the stored tensor belongs where `tensor` is: all of it, or the rows of this rank."""
    if not isinstance(tensor, DTensor):
        return stored[name]
    # FSDP2 splits the first dimension as torch.chunk does: equal parts, rounded up, and the last ranks may have none.
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    part = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * part, rows)
    stop = min(start + part, rows)
    return stored.rows(name, start, stop) if isinstance(stored, StoredTensors) else stored[name][start:stop]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]) -> State:
    """The state of `optimizer` as `{"<parameter name>.<state key>": tensor}`, `step` included as a 0-dim tensor.

    `names` gives each parameter its name: `{p: n for n, p in model.named_parameters()}`. Hyper-parameters (learning rate,
    betas, ...) are not state: they come from the configuration and the schedule.
    """
    tensors: State = {}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{names[parameter]}.{key}"
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer state {name} is a {type(value).__name__}, and only tensors are checkpointed: "
                    f"use an optimizer whose state is tensors, as torch.optim.AdamW's is."
                )
            tensors[name] = _held(value.detach())
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str], tensors: Stored) -> None:
    """Replace the whole state of `optimizer` by `tensors`, as `optimizer_tensors` gave them: the same bits and dtypes.

    Unlike `Optimizer.load_state_dict`, the moments are not cast to the parameter's dtype.
    """
    groups = {names[parameter]: (parameter, group) for group in optimizer.param_groups for parameter in group["params"]}
    unknown = sorted({name.rpartition(".")[0] for name in tensors} - groups.keys())
    if unknown:
        raise ValueError(
            f"the checkpoint has optimizer state for {', '.join(unknown)}, which this optimizer does not train: "
            f"resume with the model and the method that wrote it."
        )
    optimizer.state.clear()
    for name in tensors:
        parameter_name, _, key = name.rpartition(".")
        parameter, group = groups[parameter_name]
        if key == "step":
            # torch.optim keeps `step` on the CPU unless its kernel reads it on the device.
            on_device = group.get("fused") or group.get("capturable")
            optimizer.state[parameter][key] = tensors[name].to(parameter.device if on_device else "cpu", copy=True)
            continue
        value = _own_part(tensors, name, parameter.detach()).to(parameter.device, copy=True)
        if isinstance(parameter, DTensor):
            value = DTensor.from_local(
                value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(), run_check=False
            )
        optimizer.state[parameter][key] = value
