"""Record what made a model, in a file in its own folder, for its model card and for whoever finds the folder.

The folder may be published, so what lies on this machine is told by the last part of its path, and what a run made there by those
from the run's folder on; `run.json` has the whole ones.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..methods.registry import METHODS
from ..sealed import read_json
from .config import RunConfig, StageArguments
from .loop import StageResult
from .output import PROVENANCE_FILE, RESULT_FILE
from .ranks import Ranks

if TYPE_CHECKING:
    from .run import PlannedStage

log = logging.getLogger("fastkd")
_TRAINING = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "dropout")


def provenance(config: RunConfig, planned: PlannedStage, result: StageResult, ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """The contents of `PROVENANCE_FILE` for what this stage has made: the run, and every stage that it has finished, this one last."""
    before = [read_provenance(found.parent) for found in output_dir.glob(f"*/*/{PROVENANCE_FILE}")]
    last = {record["stages"][-1]["stage"]: record["stages"][-1] for record in before if record is not None}
    names = [spec.name for spec in METHODS[config.method].stages]
    earlier = [last[name] for name in names[: names.index(planned.spec.name)] if name in last]
    return {
        "method": config.method,
        "seed": config.seed,
        "student": {
            "from": source(config.model_name_or_path),
            "layers": config.student_layers,
            "settings": config.student,
            "vocabulary": None if config.vocabulary is None else _told(asdict(config.vocabulary)),
        },
        "stages": [*earlier, _stage(planned, result, ranks)],
    }


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """Read what `provenance` has left in a model's folder; None where there is none, as beside a model that no run made.

    A file that cannot be read, or is no such record, is told once and counts as none: no model depends on it.
    """
    path = Path(folder) / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path, "method", "stages")
        last = record["stages"][-1]["stage"]
        if record["method"] not in METHODS or not isinstance(last, str):
            raise ValueError(f"method {record['method']!r} with last stage {last!r} is not known")
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        _warn_once(f"{path} does not tell what made the model, and is passed over: {error!r}.")
        return None
    return record


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning the first time that this process has reason to: every later stage reads the same file again."""
    log.warning("%s", message)


def source(name: str | None) -> dict[str, Any] | None:
    """Name a model or a corpus, and say whether it is the hub's; of a place on this machine, the last part of its path.

    A model that a stage has made is named by its run and its stage too: those of all are called `student`.
    """
    if name is None:
        return None
    on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not os.path.exists(name) and name != "stdlib"
    return {"name": name if on_hub else _local_name(Path(name)), "hub": on_hub}


def _local_name(path: Path) -> str:
    made_here = (path / PROVENANCE_FILE).is_file() and (path.parent / RESULT_FILE).is_file()
    return "/".join(path.absolute().parts[-3:]) if made_here else path.absolute().name


def versions() -> dict[str, str]:
    """List the versions of fastkd, Python and the packages that compute."""
    return {"fastkd": __version__, "python": platform.python_version(), **{name: _version(name) for name in ("torch", "transformers")}}


def _version(package: str) -> str:
    """Tell the version of a package; "unknown", with one warning, where it cannot be imported or has none."""
    try:
        return str(import_module(package).__version__)
    except Exception as error:
        _warn_once(f"The version of {package} is not known ({type(error).__name__}: {error}).")
        return "unknown"


def _stage(planned: PlannedStage, result: StageResult, ranks: Ranks) -> dict[str, Any]:
    spec, arguments = planned.spec, planned.arguments
    taught = spec.needs_teacher or spec.trains == "teacher"
    return {
        **asdict(result),
        "trains": spec.trains,
        "teacher": source(arguments.teacher_model_name_or_path) if taught else None,
        "data": {"kind": planned.data, **_data(arguments, planned.data)},
        "options": _told(asdict(planned.options)),
        "training": {
            "rows_per_step": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * ranks.world_size,
            "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "float32",
            **{name: getattr(arguments, name) for name in _TRAINING},
        },
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
        "processes": ranks.world_size,
        "versions": versions(),
    }


def _data(arguments: StageArguments, kind: str) -> dict[str, Any]:
    settings = asdict(getattr(arguments, kind))
    return _told(settings) | {key: source(settings[key]) for key in ("path", "eval_path") if settings.get(key)}


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that have a value, folders by their names."""
    named = {key: Path(value).name if isinstance(value, str) and os.path.isdir(value) else value for key, value in settings.items()}
    return {key: value for key, value in named.items() if value is not None}
