"""What the settings of a new student may be: refused by name, before any weight is made, where they are none or make no model."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ..errors import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WITHOUT_EFFECT = {"use_cache", "torch_dtype", "name_or_path", "num_labels", "use_return_dict", "pretraining_tp"}
"""Beside what the configurations of all architectures hold."""
_SIZES = re.compile(r"num_\w*(layers|heads)|(hidden|intermediate|embedding)_size|head_dim|max_position_embeddings")
_MOST = {"num_hidden_layers": 1000}
_PROBABILITIES = re.compile(r"drop|_prob$")
_WRITTEN = {"transformers_version", "dtype", "architectures"}
_FULL_ATTENTION = "full_attention"
_SHORTEST_ROW = 8
"""Rows are padded to a multiple of it."""


def new_config(model_type: Any, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of an architecture by its name in transformers, with its library's defaults beside `settings`."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"student.model_type={model_type!r} is not an architecture that transformers knows.")
    return CONFIG_MAPPING[model_type](**(settings or {}))


def changed_config(base: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """`base` with `overrides`, made anew: what its class derives from other settings, such as head_dim, follows them.

    Raises `ValueError`, naming the key, for what is no setting of its architecture, has no effect, has a value of another kind or a
    size that cannot be, or contradicts the others.
    """
    given = {_canonical(base, name): value for name, value in overrides.items()}
    _check_each(base, overrides)
    settings = {**_not_derived(base), **given}
    layers = given.get(_canonical(base, "num_hidden_layers"))
    for name, types in settings.items():
        if name.endswith("layer_types") and isinstance(types, list) and layers is not None and name not in given:
            settings[name] = [types[i % len(types)] for i in range(layers)]
    try:
        config = type(base)(**copy.deepcopy(settings))  # some configurations change what they are given
    except Exception as error:  # a library's, of any kind: it says what it has against the settings
        raise ValueError(f"{_named(overrides)} makes no {base.model_type} model: {_told(error)}") from error
    for name, value in given.items():
        if value is not None and not _holds(getattr(config, name), value):
            raise ValueError(
                f"student.{name}={value!r} has no effect: {type(config).__name__} makes {getattr(config, name)!r} of it, by its other "
                "settings. Leave it out, or set those too."
            )
    _check_heads(config, overrides)
    before, after = (getattr(each, "layer_types", None) or [] for each in (base, config))
    if _FULL_ATTENTION in before and _FULL_ATTENTION not in after and "layer_types" not in given:
        spread = [before[math.ceil((i + 1) * len(before) / len(after)) - 1] for i in range(len(after))]
        raise ValueError(
            f"{_named(overrides)} leaves no layer with {_FULL_ATTENTION}, so that no token would see one far away; set "
            f"student.layer_types, such as {spread if _FULL_ATTENTION in spread else [*spread[1:], _FULL_ATTENTION]}."
        )
    return config


def check_builds(
    config: PretrainedConfig, base: PretrainedConfig, overrides: Mapping[str, Any], make: Callable[[PretrainedConfig], PreTrainedModel]
) -> None:
    """Refuse, by a ValueError that names the keys, a configuration that is another once saved, or of which `make` makes no model that
    runs, or none that fits into memory."""
    error = _failure(config, make)
    if error is None:
        return
    guilty = [name for name in overrides if hasattr(base, name) and _failure(config, make, {name: getattr(base, name)}) is None]
    named = {name: overrides[name] for name in guilty or overrides}
    raise ValueError(f"{_named(named)} makes no {config.model_type} model: {error}")


@contextmanager
def building(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Name the settings in what a library raises in the block, where a model is made and tried."""
    try:
        yield
    except (ValueError, TypeError):
        raise
    except Exception as error:  # a library's, of any kind
        raise ValueError(f"{_named(overrides)} makes a model that does not run: {_told(error)}") from error


def _check_each(base: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Refuse names and values that are wrong whatever the others are."""
    from transformers import PretrainedConfig

    config = copy.deepcopy(base)
    known = config.to_dict().keys() | config.attribute_map.keys() | {"rope_scaling"}
    of_all = PretrainedConfig().to_dict().keys() - {"chunk_size_feed_forward"} | _WITHOUT_EFFECT
    common = {own: name for name, own in config.attribute_map.items()}
    for name, value in overrides.items():
        if name == "vocab_size":
            raise ValueError("student.vocab_size has no effect: the vocabulary is the tokenizer's, or what `vocabulary` keeps of it.")
        if name in of_all:
            raise ValueError(f"student.{name} has no effect: it is no part of the architecture; leave it out.")
        if name not in known:
            settings = sorted(known - of_all - {"vocab_size"})
            near = nearest(name, settings)
            hint = f"; did you mean student.{near}? Its settings" if near else "; its settings"
            raise ValueError(f"student.{name} is not a setting of {type(config).__name__}{hint}: {', '.join(settings)}.")
        _check_value(name, value, getattr(config, name, None))
        try:
            setattr(config, name, copy.deepcopy(value))
        except Exception as error:  # a library's, of any kind: it says what it has against the value
            raise ValueError(f"student.{name} cannot be {value!r}: {_told(error)}") from error
        is_size, most = _SIZES.fullmatch(common.get(name, name)), _MOST.get(common.get(name, name), math.inf)
        if is_size and isinstance(value, int | float) and not 1 <= value <= most:
            raise ValueError(f"student.{name} is {value}; it must be at least 1{f' and at most {most}' if most < math.inf else ''}.")


def _check_value(name: str, value: Any, before: Any) -> None:
    """Refuse what a library would meet in the first step alone, or tell in its own words: no probability, an unknown activation."""
    from transformers.activations import ACT2FN

    if _PROBABILITIES.search(name) and isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1:
        raise ValueError(f"student.{name} is {value}; it is a probability, from 0 to below 1.")
    if "act" in name and isinstance(before, str) and before in ACT2FN and isinstance(value, str) and value not in ACT2FN:
        near = nearest(value, ACT2FN)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(ACT2FN))}."
        raise ValueError(f"student.{name} is {value!r}, which is no activation that transformers knows; {hint}")


def _check_heads(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Refuse heads of keys and values that those of queries cannot share."""
    queries, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(queries, int) and isinstance(keys, int) and queries % keys:
        raise ValueError(
            f"{_named(overrides)} makes no {config.model_type} model: its {queries} attention heads cannot share its {keys} heads of "
            "keys and values evenly. Set num_attention_heads to a multiple of num_key_value_heads."
        )


def _canonical(config: PretrainedConfig, name: str) -> str:
    """The name by which a setting is given to the configuration's class."""
    own: str = {**config.attribute_map, "rope_scaling": "rope_parameters"}.get(name, name)
    return own


def _not_derived(config: PretrainedConfig) -> dict[str, Any]:
    """The fewest settings of `config` of which its class makes the same: without those that it derives from others."""
    settings = config.to_dict()
    wanted = type(config)(**copy.deepcopy(settings)).to_dict()
    for name in reversed([*settings]):
        fewer = {other: value for other, value in settings.items() if other != name}
        try:
            if type(config)(**copy.deepcopy(fewer)).to_dict() == wanted:
                settings = fewer
        except Exception:  # a library's, of any kind: the setting is needed
            continue
    return settings


def _failure(
    config: PretrainedConfig, make: Callable[[PretrainedConfig], PreTrainedModel], other: Mapping[str, Any] | None = None
) -> str | None:
    """What goes wrong with the configuration, with `other` settings, when it is saved and a model made of it runs; None if nothing."""
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    try:
        for name, value in (other or {}).items():
            setattr(config, name, value)
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            opened = AutoConfig.from_pretrained(folder)
        if changed := [name for name, value in _plain(config).items() if _plain(opened).get(name) != value]:
            return f"{', '.join(changed)} would be another once the student is saved."
        with torch.device("meta"):
            shortage = _shortage(make(opened).parameters())
        if shortage is None:
            with torch.no_grad(), no_init_weights():  # what the memory holds: without any, models that look at values do not run
                # In training mode: what dropout does not take shows there alone.
                make(opened).train()(input_ids=torch.ones(1, _SHORTEST_ROW, dtype=torch.int64))
    except Exception as error:  # a library's, of any kind: it says what it has against the settings
        return _told(error)
    return shortage


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration's settings as JSON has them, without what saving writes into them."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in settings.items() if name not in _WRITTEN and not name.startswith("_")}


def _holds(made: Any, given: Any) -> bool:
    """Whether a setting is what was given; the library may add entries to a mapping."""
    if isinstance(given, Mapping):
        return isinstance(made, Mapping) and all(name in made and _holds(made[name], value) for name, value in given.items())
    if isinstance(given, list | tuple):
        return isinstance(made, list | tuple) and [*made] == [*given]
    return bool(made == given)


def _named(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"student.{name}={value!r}" for name, value in overrides.items()) or "The configuration of the student"


def _shortage(parameters: Iterable[torch.Tensor]) -> str | None:
    needed = 4 * sum(math.prod(parameter.shape) for parameter in parameters)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= available:
        return None
    return f"its weights take {needed / 2**30:.1f} GiB in float32, and this machine has {available / 2**30:.1f} GiB."


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
