"""Hidden states and Q, K, V of chosen layers, read while a transformers model runs its own forward with its own kernels.

Hidden states come from forward hooks. Q, K and V come from the attention interface of transformers: as an attention module starts, its
config is exchanged for one that names the function below as the kernel, and that function puts the config back before it calls the
kernel that the model would have called. The model's own config, by which masks are made, is never touched.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNEL_NAME = "fastkd_capture"


@dataclass(frozen=True, eq=False)
class Projections:
    """Q, K, V (B, heads, S, d) as attention uses them: after rotary embedding and q/k norms. K and V may have fewer heads (grouped)."""

    q: Tensor
    """(B, heads, S, d)."""
    k: Tensor
    """(B, heads or fewer, S, d)."""
    v: Tensor
    """(B, heads or fewer, S, d)."""


@dataclass(eq=False)
class Captured:
    """What a `capture` has seen, by layer: hidden states (B, S, H) and projections."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Projections] = field(default_factory=dict)


class Heads(NamedTuple):
    """Numbers of heads: of Q, and of K and V, which may have fewer."""

    query: int
    key_value: int


@dataclass(frozen=True)
class _Architecture:
    """Where things are: `layers`, `embeddings` and `after_first` from the base model, `attention` from a layer."""

    layers: str
    attention: str
    embeddings: str | None = None  # the module whose output enters the first layer; None: read as the first layer's input
    after_first: str | None = None  # what works on the first layer's output before it is handed on, if the model has it
    own_attention: bool = False  # query_proj, key_proj and value_proj instead of the attention interface


_BERT = _Architecture("encoder.layer", "attention.self", "embeddings")
_LLAMA = _Architecture("layers", "self_attn")
_ARCHITECTURES = {
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": _Architecture("encoder.layer", "attention.self", "embeddings", after_first="encoder.conv", own_attention=True),
    "modernbert": _Architecture("layers", "attn", "embeddings"),
    "gpt2": _Architecture("h", "attn"),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def _architecture(model: nn.Module) -> _Architecture:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.model_type not in _ARCHITECTURES:
        raise TypeError(
            f"The layers of {type(model).__name__} are not known here. Pass a transformers model (unwrapped from DDP, compile or PEFT) "
            f"of one of these types: {', '.join(_ARCHITECTURES)}."
        )
    return _ARCHITECTURES[model.config.model_type]


def transformer_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The model's layers, first to last; TypeError for a model whose layers are not known here."""
    layers: nn.ModuleList = attrgetter(_architecture(model).layers)(model.base_model)
    return layers


def num_layers(model: "PreTrainedModel") -> int:
    """How many layers the model has."""
    return len(transformer_layers(model))


def attention_heads(model: "PreTrainedModel") -> Heads:
    """Heads of Q, and of K and V, in every layer; TypeError for a model whose layers are not known here."""
    _architecture(model)
    config = model.config.get_text_config()
    query = config.num_attention_heads
    return Heads(query, getattr(config, "num_key_value_heads", query))


def check_capture(model: "PreTrainedModel", *, hidden: Iterable[int] = (), attention: Iterable[int] = ()) -> None:
    """Refuse what `capture` could not do, by name.

    Raises:
        TypeError: a model whose layers are not known here.
        ValueError: a layer that the model does not have; a model that recomputes its layers in backward (gradient checkpointing).
    """
    layers = transformer_layers(model)
    for kind, first, wanted in (("hidden", 0, hidden), ("attention", 1, attention)):
        if outside := [layer for layer in wanted if layer not in range(first, len(layers) + 1)]:
            raise ValueError(
                f"{kind}={outside}: {type(model).__name__} has {len(layers)} layers, and {kind} takes layers {first} to {len(layers)}."
            )
    if any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers):
        raise ValueError(
            f"{type(model).__name__} trains with gradient checkpointing, which runs layers again in backward: no state is read there. "
            "Call model.gradient_checkpointing_disable(), or model.eval() if it is not trained."
        )


class _Stop(Exception):
    """Everything that the capture of `seen` asked for is there: the rest of the forward is left."""

    def __init__(self, seen: Captured) -> None:
        super().__init__("A capture with stop=True ended this forward; its with-block takes this exception.")
        self.seen = seen


@contextmanager
def capture(
    model: "PreTrainedModel",
    *,
    hidden: Iterable[int] = (),
    attention: Iterable[int] = (),
    stop: bool = False,
    embeddings: Callable[[Tensor], Tensor] | None = None,
    at_hidden: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Captured]:
    """Read chosen states of the one forward that is run inside the with-block, which computes what it would have computed.

    `with capture(model, hidden=(0, 12), attention=(12,)) as seen: model(**inputs)`. Layers count from 1. The states are part of the
    forward's graph. Nothing stays on the model after the block, even if the forward fails.

    Args:
        model: a transformers model of a known architecture.
        hidden: layers l whose output, before any final norm, becomes `seen.hidden[l]` (B, S, H); 0 is what enters the first layer,
            after the LayerNorm and dropout of the embeddings where the model has them.
        attention: layers whose Q, K, V become `seen.attention[l]`.
        stop: leave the forward, and with it the with-block, as soon as all that is asked for is there: at the last layer's attention,
            before its softmax, if that is what is last. A model in pieces (FSDP) is run to its end all the same.
        embeddings: (B, S, H) -> (B, S, H), replaces what enters the first layer, which is also what `hidden` 0 shows.
        at_hidden: called with (layer, state) in place of storing the state, in the order of the layers.

    Yields:
        What is read, complete when the block ends: states in the model's dtype.

    Raises:
        TypeError, ValueError: see `check_capture`; or stop=True and nothing to wait for.
        RuntimeError: the block ended, and something asked for was never computed.
    """
    hidden, attention = frozenset(hidden), frozenset(attention)
    check_capture(model, hidden=hidden, attention=attention)
    if stop and not hidden and not attention:
        raise ValueError("stop=True leaves the forward once what was asked for is there: name layers in hidden or attention.")
    architecture, layers = _architecture(model), transformer_layers(model)
    if hasattr(layers[0], "unshard"):
        stop = False  # FSDP has to see the end of every forward that it saw the beginning of
    after_first = attrgetter(architecture.after_first)(model.base_model) if architecture.after_first else None
    seen = Captured()
    missing = {("hidden", layer) for layer in hidden} | {("attention", layer) for layer in attention}

    def arrived(kind: str, layer: int) -> None:
        missing.discard((kind, layer))
        if stop and not missing:
            raise _Stop(seen)

    def take_hidden(layer: int, state: Tensor) -> None:
        if at_hidden is None:
            seen.hidden[layer] = state
        else:
            at_hidden(layer, state)
        arrived("hidden", layer)

    def take_projections(layer: int, projections: Projections) -> None:
        seen.attention[layer] = projections
        arrived("attention", layer)

    def enter(state: Tensor) -> Tensor:
        if embeddings is not None:
            state = embeddings(state)
        if 0 in hidden:
            take_hidden(0, state)
        return state

    with ExitStack() as hooks:
        if embeddings is not None or 0 in hidden:
            if architecture.embeddings:
                module = attrgetter(architecture.embeddings)(model.base_model)
                hooks.enter_context(module.register_forward_hook(lambda module, inputs, output: enter(output)))
            else:
                hooks.enter_context(layers[0].register_forward_pre_hook(lambda module, inputs: (enter(inputs[0]), *inputs[1:])))
        for layer in hidden - {0}:
            module = after_first if layer == 1 and after_first is not None else layers[layer - 1]
            hooks.enter_context(module.register_forward_hook(_output_hook(partial(take_hidden, layer))))
        read_attention = _read_own_attention if architecture.own_attention else _read_interface
        for layer in attention:
            read_attention(attrgetter(architecture.attention)(layers[layer - 1]), partial(take_projections, layer), hooks)
        try:
            yield seen
        except _Stop as stopped:
            if stopped.seen is not seen:
                raise
            return
    if missing:
        raise RuntimeError(
            f"{type(model).__name__} did not compute {sorted(missing)} inside the with-block. Call the model itself there, and let it "
            "run all its layers."
        )


def _output_hook(take: Callable[[Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    return hook


def _read_own_attention(module: Any, take: Callable[[Projections], None], hooks: ExitStack) -> None:
    """DeBERTa's attention calls query_proj, key_proj and value_proj on its states in this order, later maybe two on positions."""
    latest: dict[str, Tensor] = {}

    def split_heads(projected: Tensor) -> Tensor:
        return torch.unflatten(projected, -1, (module.num_attention_heads, -1)).transpose(1, 2)

    def take_value(value: Tensor) -> None:
        take(Projections(split_heads(latest["query"]), split_heads(latest["key"]), split_heads(value)))

    projections: dict[str, Callable[[Tensor], None]] = {
        "query_proj": partial(latest.__setitem__, "query"),
        "key_proj": partial(latest.__setitem__, "key"),
        "value_proj": take_value,
    }
    for name, receive in projections.items():
        hooks.enter_context(module.get_submodule(name).register_forward_hook(_output_hook(receive)))


def _read_interface(module: Any, take: Callable[[Projections], None], hooks: ExitStack) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KERNEL_NAME, _captured_attention)  # the same function under the same name every time
    hooks.callback(setattr, module, "config", module.config)  # for a forward that fails between the hook and the kernel

    def announce(module: Any, inputs: Any) -> None:
        module.config = _CapturingConfig(module.config, take)

    hooks.enter_context(module.register_forward_pre_hook(announce))


class _CapturingConfig:
    """Stands for the config of an attention module from the module's start until it calls its kernel."""

    _attn_implementation = KERNEL_NAME

    def __init__(self, config: Any, take: Callable[[Projections], None]) -> None:
        self.config, self.take = config, take

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _captured_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
    """Hand over Q, K and V, then call the kernel that `module` would have called, with its own config in place."""
    capturing: _CapturingConfig = module.config
    module.config = capturing.config
    capturing.take(Projections(query, key, value))
    return _kernel(module)(module, query, key, value, *arguments, **options)


def _kernel(module: Any) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if module.config._attn_implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return _upcast_and_reordered
    # The forward of every supported attention finds its eager kernel under this name, in the file it is written in.
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)


def _upcast_and_reordered(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """GPT-2's other eager kernel, a method, which its forward calls only if its config says "eager"."""
    return module._upcast_and_reordered_attn(query, key, value, mask)
