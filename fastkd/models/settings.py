"""What the settings of a new student may be: refused by name, before any weight is made, where they are none or make no model."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WITHOUT_EFFECT = {"use_cache", "torch_dtype", "name_or_path", "num_labels", "use_return_dict", "pretraining_tp"}
"""Beside what the configurations of all architectures hold."""
_SIZES = re.compile(r"num_\w*(layers|heads)|(hidden|intermediate|embedding)_size|head_dim|max_position_embeddings")
_MOST = {"num_hidden_layers": 1000}


def new_config(model_type: Any, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of an architecture by its name in transformers, with its library's defaults beside `settings`."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"student.model_type={model_type!r} is not an architecture that transformers knows.")
    return CONFIG_MAPPING[model_type](**(settings or {}))


def set_all(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Set `overrides` in `config`.

    Raises `ValueError`, naming the key, for what is no setting of its architecture, has no effect, or has a value of another kind or a
    size that cannot be.
    """
    from transformers import PretrainedConfig

    known = config.to_dict().keys() | config.attribute_map.keys() | {"rope_scaling"}
    of_all = PretrainedConfig().to_dict().keys() - {"chunk_size_feed_forward"} | _WITHOUT_EFFECT
    canonical = {own: name for name, own in config.attribute_map.items()}
    for name, value in overrides.items():
        if name == "vocab_size":
            raise ValueError("student.vocab_size has no effect: the vocabulary is the tokenizer's, or what `vocabulary` keeps of it.")
        if name in of_all:
            raise ValueError(f"student.{name} has no effect: it is no part of the architecture; leave it out.")
        if name not in known:
            settings = ", ".join(sorted(known - of_all - {"vocab_size"}))
            raise ValueError(f"student.{name} is not a setting of {type(config).__name__}; its settings: {settings}.")
        try:
            setattr(config, name, copy.deepcopy(value))  # some configurations change what they are given
        except Exception as error:  # a library's, of any kind: it says what it has against the value
            raise ValueError(f"student.{name} cannot be {value!r}: {_told(error)}") from error
        is_size, most = _SIZES.fullmatch(canonical.get(name, name)), _MOST.get(canonical.get(name, name), math.inf)
        if is_size and value is not None and not 1 <= value <= most:
            raise ValueError(f"student.{name} is {value}; it must be at least 1{f' and at most {most}' if most < math.inf else ''}.")


def check_builds(config: PretrainedConfig, base: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Refuse, by a ValueError that names the keys, a configuration that no model can be built of, or none that fits into memory."""
    error = _failure(config)
    if error is None:
        return
    guilty = [name for name in overrides if hasattr(base, name) and _failure(config, {name: getattr(base, name)}) is None]
    named = ", ".join(f"student.{name}={overrides[name]!r}" for name in guilty or overrides)
    raise ValueError(f"{named or 'The configuration of the student'} makes no {config.model_type} model: {error}")


def _failure(config: PretrainedConfig, other: Mapping[str, Any] | None = None) -> str | None:
    """What goes wrong when the backbone is built, with `other` settings; None if nothing does. No weight is made for that."""
    from transformers import AutoModel

    config = copy.deepcopy(config)
    try:
        for name, value in (other or {}).items():
            setattr(config, name, value)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as error:  # a library's, of any kind: it says what it has against the settings
        return _told(error)
    return _shortage(model.parameters())


def _shortage(parameters: Iterable[torch.Tensor]) -> str | None:
    needed = 4 * sum(math.prod(parameter.shape) for parameter in parameters)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= available:
        return None
    return f"its weights take {needed / 2**30:.1f} GiB in float32, and this machine has {available / 2**30:.1f} GiB."


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
