"""The runs that test_33_identity stops or finishes, one of every kind, with all that decides what they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from fastkd.cli.main import main
from fastkd.methods.registry import METHODS
from fastkd.train.cache import write_cache
from fastkd.train.config import read_config
from tests import runs

SHORT: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "seed": 3}


def glmd(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = {"pretrain": {}, "task_scores": {}}
    return {**runs.glmd(folder, runs.bert_teacher(folder, num_hidden_layers=1)), **SHORT, "stages": stages}


def kd(folder: Path) -> dict[str, Any]:
    teacher, text = runs.llama_teacher(folder), runs.write_text(folder)
    count(teacher, text["path"], folder / "counts")
    vocabulary = {"keep": 0.5, "multiple_of": 8, "counts": str(folder / "counts")}
    more = {"method": "kd", "teacher_model_name_or_path": teacher, "text": text, "vocabulary": vocabulary, "stages": {"distill": {}}}
    return runs.settings(folder, **more, **SHORT)


def cached(folder: Path) -> dict[str, Any]:
    """kd from a cache."""
    configuration = kd(folder)
    cache(configuration, folder / "answers")
    return {**configuration, "teacher": {"kind": "cache", "path": str(folder / "answers")}}


def lm(folder: Path) -> dict[str, Any]:
    text, start = runs.write_text(folder), runs.bert_teacher(folder)
    return runs.settings(folder, method="lm", model_name_or_path=start, student={}, text=text, stages={"train": {}}, **SHORT)


def labelled(folder: Path, method: str, stages: tuple[str, ...], **more: Any) -> dict[str, Any]:
    data, start = runs.write_dataset(folder), runs.bert_classifier(folder)
    shared = {"method": method, "model_name_or_path": start, "student": {}, "dataset": data, "stages": {stage: {} for stage in stages}}
    return runs.settings(folder, **shared, **SHORT, **more)


def finetune(folder: Path) -> dict[str, Any]:
    (stage,) = METHODS["finetune"].stages
    return labelled(folder, "finetune", (stage.name,))


def crild(folder: Path) -> dict[str, Any]:
    return labelled(folder, "crild", ("teacher", "ild"), teacher_model_name_or_path=runs.bert_classifier(folder, 2))


def ted(folder: Path) -> dict[str, Any]:
    stages = ("teacher_filters", "student_filters", "distill")
    return labelled(folder, "ted", stages, teacher_model_name_or_path=runs.bert_classifier(folder, 2))


MAKERS = {maker.__name__: maker for maker in (glmd, kd, cached, lm, finetune, crild, ted)}


def count(model: str, text: str, folder: Path) -> None:
    assert main(["vocab", "count", "--model", model, "--data", text, "--output_dir", str(folder)]) == 0


def cache(configuration: dict[str, Any], folder: Path, **options: Any) -> None:
    form = {"kind": "dense", "dtype": "float32", "shard_rows": 7}
    write_cache(read_config({**configuration, "max_steps": -1}), "distill", folder, **{**form, **options})


@dataclasses.dataclass(frozen=True)
class Made:
    """Inputs, and beside them the run as it was stopped in its last stage, and as it ended undisturbed."""

    folder: Path
    pristine: Path
    """A copy of that folder, which nobody changes."""
    configuration: dict[str, Any]

    def restored(self, state: str = "stopped") -> dict[str, Any]:
        """The run whose output_dir is in that state, everything where it was and as it was."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.pristine, self.folder, symlinks=True)
        return {**self.configuration, "output_dir": str(self.folder / state)}

    def moved(self, target: Path, state: str = "stopped") -> dict[str, Any]:
        """The same with everything elsewhere."""
        shutil.copytree(self.pristine, target, symlinks=True)
        text = json.dumps(self.configuration).replace(str(self.folder), str(target))
        return {**json.loads(text), "output_dir": str(target / state)}

    @property
    def stages(self) -> list[str]:
        return list(self.configuration["stages"])
