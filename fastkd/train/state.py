"""Floor 5, train: the state of optimizers and random generators as named tensors, which is how checkpoints hold it."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]) -> dict[str, Tensor]:
    """The state of `optimizer` as `{"<parameter name>.<state key>": tensor}`, `step` included as a 0-dim tensor.

    `names` gives each parameter its name: `{p: n for n, p in model.named_parameters()}`. Hyper-parameters (learning rate,
    betas, ...) are not state: they come from the configuration and the schedule.
    """
    tensors = {}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{names[parameter]}.{key}"
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer state {name} is a {type(value).__name__}, and only tensors are checkpointed: "
                    f"use an optimizer whose state is tensors, as torch.optim.AdamW's is."
                )
            tensors[name] = value.detach()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str], tensors: Mapping[str, Tensor]) -> None:
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
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        parameter, group = groups[parameter_name]
        # torch.optim keeps `step` on the CPU unless its kernel reads it on the device.
        on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
        optimizer.state[parameter][key] = tensor.to("cpu" if on_cpu else parameter.device, copy=True)


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's global CPU generator and, once CUDA is in use, of the current device's, as uint8 tensors.

    fastkd never draws from Python's or NumPy's global generator.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Undo every draw since `rng_tensors` gave `states`. A CUDA state is passed over on a machine without CUDA."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
