"""The output folder of a run: one process at a time holds it, and `run.json` records which run it is and what that run has made.

`run.json` has the settings that all stages share, and for every stage that was begun its identity: what decides its result, by content
(`identity.py`). A stage's folder is claimed before anything is written into it. What lies there and is not recorded is not this run's:
it is refused, never adopted and never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.folder import VOCAB_MAP_FOLDER
from ..sealed import Damaged, foreign_files, read_json, read_manifest, remove_sealed, verify
from ..store import InUse, Lock, lock, sweep, write_json_atomic
from .log import LOG_FILE

RUN_FILE = "run.json"
RESULT_FILE = "result.json"
RESULTS_FILE = "results.json"
LOCK_FILE = ".fastkd.lock"
PROVENANCE_FILE = "fastkd.json"
FILTERS_FOLDER = "filters"
CURVES = ("loss", "perplexity", "accuracy")
LABEL_WORDS = "label_words"
"""In the identity of a vocabulary: the ids that it keeps for the sake of tasks."""
FORMAT = 2
_SEALED = re.compile(rf"checkpoint-\d+|student|teacher|{FILTERS_FOLDER}")
_FILES = re.compile(rf"{re.escape(LOG_FILE)}|{re.escape(RESULT_FILE)}|({'|'.join(CURVES)})\.png")
Identities = Mapping[str, Mapping[str, Any] | None]
_VIEWS = {"tensorboard": re.compile(r"events\.out\.tfevents\..*"), "profile": re.compile(r"trace\.json|shares\.json")}


class OutputFolder:
    """An output folder that this process holds the lock of, until `close` or the process's end, a kill included."""

    def __init__(self, path: Path, held: Lock, record: dict[str, Any]) -> None:
        self.path, self._held, self._record = path, held, record

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def recorded(self, stage: str) -> dict[str, Any] | None:
        """The identity of a stage that was claimed here."""
        found: dict[str, Any] | None = self._record["stages"].get(stage)
        return found

    def digest(self, stage: str) -> str:
        """Hex SHA-256 of what decides the result of a claimed stage, which everything that the stage makes bears."""
        identity = {"run": self._record["settings"], "stage": self._record["stages"][stage]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def claim(self, settings: Mapping[str, Any], identities: Identities, *, overwrite: bool = False) -> None:
        """Record that stages of these identities are this run's, before anything of them is written.

        settings: what all stages of the run share. identities: by stage; None where it is not known yet: such a stage is not recorded,
        and refused only where its folder holds what this run did not make.

        Raises `ValueError`, saying what differs, where the folder belongs to another run; with `overwrite`, what that one recorded as
        its own is deleted first. A folder of the same run is never emptied, so a restarted job resumes whatever `overwrite` says.
        """
        settings, identities = json.loads(json.dumps([settings, identities]))  # as they will be read back
        conflict = self._conflict(settings, identities)
        if conflict is not None and overwrite:
            if foreign := self._foreign({**self._record["stages"], **identities}):
                raise ValueError(
                    f"output_dir={str(self.path)!r} holds {foreign[0]}, and {RUN_FILE} does not say that this run made it. "
                    f"overwrite_output_dir deletes what is recorded there and nothing else; move the rest away, or choose another "
                    f"output_dir."
                )
            self._delete()
            conflict = self._conflict(settings, identities)
        if conflict is not None:
            raise ValueError(
                f"output_dir={str(self.path)!r} {conflict}. Put back what it was, choose another output_dir, or set "
                f"overwrite_output_dir to delete what that run left in it.{self._train_on()}"
            )
        begun = {stage: identity for stage, identity in self._record["stages"].items() if self._has_begun(stage)}
        known = {stage: identity for stage, identity in identities.items() if identity is not None}
        # What has begun keeps its identity, which its checkpoints bear, though tasks may have come since.
        record = {**self._record, "settings": settings, "stages": {**self._record["stages"], **known, **begun}}
        if record != self._record:
            if not begun:
                self._delete_vocabulary_map()  # chosen by settings that were refused before the first step
            self._record = record
            write_json_atomic(self.path / RUN_FILE, record)

    def check_finished(self, stage: str, made: str) -> None:
        """Refuse a finished stage whose result, or the folder `made` that goes on from it, is another run's, damaged or gone."""
        folder, identity = self.path / stage, self.digest(stage)
        if not os.path.lexists(folder / RESULT_FILE):
            if os.path.lexists(folder / made) and not _is_own(folder / made, identity):
                raise ValueError(f"{folder / made} was not made by this run, and stage {stage} would put its own there; move it away.")
            return
        try:
            if read_json(folder / RESULT_FILE, "identity")["identity"] != identity:
                raise Damaged(f"{folder / RESULT_FILE} is of a run with other settings, models or rows.")
            if verify(folder / made, leave_out={PROVENANCE_FILE}).get("identity") != identity:
                raise Damaged(f"{folder / made} is of a run with other settings, models or rows.")
        except (Damaged, OSError) as error:
            raise ValueError(
                f"Stage {stage} is finished, and what it made is not there as it was: {error} Put back a copy, or move "
                f"{folder / RESULT_FILE} and {folder / made} away: the stage then goes on from its newest checkpoint."
            ) from error

    def _conflict(self, settings: Mapping[str, Any], identities: Identities) -> str | None:
        """Why this folder cannot be such a run's, as a part of a sentence. A stage refused before its first step binds nothing."""
        recorded = self._record["stages"]
        begun = [stage for stage in recorded if self._has_begun(stage)]
        stages: dict[str, list[str]] = {}
        for stage, identity in identities.items():
            if stage in begun and identity is not None:
                for phrase in differences(recorded[stage], identity):
                    stages.setdefault(phrase.removeprefix("settings."), []).append(stage)
            elif stage not in recorded and (found := self._contents(stage)):
                return f"holds {found[0]}, and {RUN_FILE} does not say that this run made it"
        phrases = differences(self._record["settings"], settings) if begun else []
        phrases += [f"{phrase} in {', '.join(names)}" for phrase, names in stages.items()]
        return f"belongs to a run with other settings: {'; '.join(phrases)}" if phrases else None

    def _train_on(self) -> str:
        """Say how to train a student of this run for longer than it was set to; nothing where no stage has begun."""
        stages = [self.path / stage for stage in self._record["stages"] if self._has_begun(stage)]
        made = [stage / "student" for stage in stages if (stage / RESULT_FILE).is_file() and (stage / "student").is_dir()]
        if not stages:
            return ""
        if not made:
            return " To train on, let it end as it was set, then start another run from its student."
        return f" To train its student on, set model_name_or_path to {made[-1]} in a run of another output_dir."

    def _has_begun(self, stage: str) -> bool:
        return bool(self._contents(stage))

    def _contents(self, stage: str) -> list[str]:
        """What lies in a stage's folder under names that a stage uses."""
        folder = self.path / stage
        if (folder / RUN_FILE).exists():
            raise ValueError(f"{folder} is the output_dir of another run, and a stage here has its name; choose another output_dir.")
        if folder.is_symlink() and not folder.exists():
            raise ValueError(f"{folder} is a link that leads nowhere: put back what it led to, or remove it.")
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [f"{stage}/{name}" for name in names if _SEALED.fullmatch(name) or _FILES.fullmatch(name) or name in _VIEWS]

    def _foreign(self, stages: Iterable[str]) -> list[str]:
        """What lies in the folders of `stages` under names that a stage uses, and would not be deleted with the run."""
        recorded = self._record["stages"]
        return [
            name
            for stage in stages
            for name in self._contents(stage)
            if stage not in recorded or not _is_own(self.path / name, self.digest(stage))
        ]

    def _delete(self) -> None:
        """Delete what the record says that the run has made, and the record."""
        for stage in self._record["stages"]:
            _delete_stage(self.path / stage, self.digest(stage))
        self._delete_vocabulary_map()
        self._record = _empty()
        with suppress(FileNotFoundError):
            (self.path / RUN_FILE).unlink()

    def _delete_vocabulary_map(self) -> None:
        """The map of the student's vocabulary, if a recorded stage made it."""
        folder = self.path / VOCAB_MAP_FOLDER
        made = [identity["vocabulary"] for identity in self._record["stages"].values() if identity.get("vocabulary")]
        with suppress(OSError, Damaged):
            found = read_manifest(folder).get("vocabulary")
            if found in made:
                remove_sealed(folder)


def prepare_output_dir(output_dir: str | Path) -> OutputFolder:
    """Create and lock `output_dir`, read its record, and clear what killed processes left half-written in its own places.

    Raises `ValueError` when the folder cannot be written, is in use, or has a record that cannot be read.
    """
    if not str(output_dir):
        raise ValueError(
            "output_dir is empty, which would be the current folder; name the folder of the run ('.' if you mean this one)."
        )
    path = Path(output_dir)
    refuse_model_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = lock(path / LOCK_FILE)
    except InUse as error:
        raise ValueError(f"output_dir={str(path)!r}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"output_dir={str(path)!r} cannot be written ({error.filename}: {error.strerror}): name a folder that this user may "
            f"write to."
        ) from error
    try:
        record = _read_record(path)
        sweep(path, lambda name: name in (RUN_FILE, VOCAB_MAP_FOLDER))
        for stage in record["stages"]:
            sweep(path / stage, lambda name: bool(_SEALED.fullmatch(name) or _FILES.fullmatch(name)))
            sweep(path / stage / "profile", lambda name: bool(_VIEWS["profile"].fullmatch(name)))
        return OutputFolder(path, held, record)
    except BaseException:
        held.close()
        raise


def refuse_model_folder(folder: Path) -> None:
    """Refuse a folder that holds a model, which what is written there would become a part of."""
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        raise ValueError(f"{str(folder)!r} is the folder of a model; name one of its own for what is written now.")


def check_results(folder: Path, keys: Iterable[str], pictures: Iterable[str]) -> None:
    """Refuse, with `FileExistsError`, a folder whose results and pictures would be overwritten and are not an earlier call's.

    keys: of the `results.json` that such a call writes beside its pictures.
    """
    results = folder / RESULTS_FILE
    taken = [results] if os.path.lexists(results) else [folder / name for name in pictures if os.path.lexists(folder / name)]
    with suppress(Damaged, OSError):
        if not results.is_symlink() and read_json(results, *keys):
            return
    if taken:
        raise FileExistsError(
            f"{taken[0]} is there, and was not made by an earlier run of this command; move it away, or name another folder."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase per key, dotted where nested, whose value is not the same in both; long digests are cut.

    Label words may be added to those that a vocabulary keeps: what was chosen without them stands.
    """
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            phrases += differences(before, after, f"{prefix}{key}.")
        elif f"{prefix}{key}" == f"vocabulary.{LABEL_WORDS}" and isinstance(before, list) and isinstance(after, list):
            if gone := sorted({*before} - {*after}):
                phrases.append(f"{prefix}{key} (the ids {gone} are not kept any more)")
        elif before != after:
            phrases.append(f"{prefix}{key} ({_shown(before)} there, {_shown(after)} here)")
    return phrases


def _shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


def _empty() -> dict[str, Any]:
    return {"format": FORMAT, "fastkd": __version__, "settings": {}, "stages": {}}


def _read_record(path: Path) -> dict[str, Any]:
    file = path / RUN_FILE
    remedy = "Put back a copy of it, or choose another output_dir."
    if file.is_symlink():
        raise ValueError(f"{file} is a link, and a run's record is a file of its own. {remedy}")
    try:
        record = read_json(file, "fastkd")
    except FileNotFoundError:
        return _empty()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}), so what lies there is not known to be of this run. {remedy}"
        ) from error
    except Damaged as damage:
        raise ValueError(f"{damage} So what lies beside it may be another run's. {remedy}") from damage
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{file} was written by fastkd {record['fastkd']}, and fastkd {__version__} does not go on with its runs: finish this one "
            f"with that version, or choose another output_dir."
        )
    stages = record.get("stages")
    if not isinstance(stages, dict) or not isinstance(record.get("settings"), dict) or not all(map(_is_stage, stages.items())):
        raise ValueError(f"{file} is damaged: it does not say which stages the run has begun. {remedy}")
    return record


def _is_stage(entry: tuple[str, Any]) -> bool:
    return isinstance(entry[1], dict) and re.fullmatch(r"\w+", entry[0]) is not None


def _delete_stage(folder: Path, identity: str) -> None:
    """Delete what the stage of that identity has made in its folder; what somebody else put there, links included, stays."""
    for path in _children(folder):
        if path.is_symlink():
            continue
        if _SEALED.fullmatch(path.name):
            with suppress(OSError, Damaged):
                if read_manifest(path).get("identity") == identity:
                    remove_sealed(path)
        elif _FILES.fullmatch(path.name) and path.is_file():
            path.unlink()
        elif path.name in _VIEWS:
            for view in _children(path):
                if _VIEWS[path.name].fullmatch(view.name) and view.is_file() and not view.is_symlink():
                    view.unlink()
            with suppress(OSError):  # not empty
                path.rmdir()


def _is_own(path: Path, identity: str) -> bool:
    """Whether `_delete_stage` would delete all of `path`."""
    if path.is_symlink():
        return False
    if path.name in _VIEWS:
        return path.is_dir() and all(_VIEWS[path.name].fullmatch(view.name) and not view.is_symlink() for view in _children(path))
    if _FILES.fullmatch(path.name):
        return path.is_file()
    with suppress(OSError, Damaged):
        return read_manifest(path).get("identity") == identity and not foreign_files(path)
    return False


def _children(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
