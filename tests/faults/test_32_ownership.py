"""Fault 32: around and inside of a run's folders lies what is not fastkd's: files, links, other runs, processes that are at work.

    python -m tests.faults.test_32_ownership --trees 200 --seed 0

Whatever commands do there, finish, are killed at a durable call or are refused with a sentence, none of it changes by a byte. Every
tree is drawn from the seed and its number, and so are the commands.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.cli.main import main
from fastkd.train.config import read_config
from fastkd.train.schema import to_yaml
from tests import runs
from tests.faults.disturbed import SERVER, crashes, differences, leave_out_drawing
from tests.faults.kills import FORK, Durable, before_every_rename
from tests.faults.trees import OURS, PLAIN, Foreign, Look, look

STAGE = "distill"
COMMANDS = {"train": 4, "crash": 4, "other": 1, "overwrite": 3, "cache": 1, "count": 1, "prune": 1, "export": 1, "eval": 1}
"""With their weights."""
OUTCOMES: dict[int | None, str] = {0: "done", 2: "refused", -signal.SIGKILL: "killed"}
"""By exit code."""
LONGEST_COMMAND = 120.0
"""Seconds; commands take one or two."""
DURABLE_CALLS = 60
"""Calls of a run; some of the processes that are to be killed end before."""


@dataclass
class Report:
    seed: int
    trees: int = 0
    planted: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Commands by what became of them."""
    failures: list[str] = field(default_factory=list)


class Template:
    """What all trees share, made once: a teacher, texts, and a finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = runs.settings(
            folder,
            method="kd",
            output_dir=str(folder / "finished"),
            cache_dir=None,
            teacher_model_name_or_path=runs.llama_teacher(folder, num_hidden_layers=1),
            text=runs.write_text(folder, train=16, dev=4),
            vocabulary={"keep": 0.5, "multiple_of": 8},
            stages={STAGE: {}},
            max_steps=3,
            seed=99,  # no tree's run has it: what is copied into one is another's
            save_steps=1,
            save_total_limit=1,
        )
        self.finished = folder / "finished"
        self.student = self.finished / STAGE / "student"
        self.counts = folder / "counts"
        self.config = self.write("finished.yaml", self.finished)
        count = ["vocab", "count", "--model", self.teacher, "--data", str(folder / "train.txt"), "--output_dir", str(self.counts)]
        for argv in (["train", self.config], count):
            command = Command(argv, folder / "errors.txt")
            assert command.wait_for_end() == 0, command.errors

    @property
    def teacher(self) -> str:
        return str(self.configuration["teacher_model_name_or_path"])

    def write(self, name: str, output_dir: Path, **more: Any) -> str:
        path = self.folder / name
        path.write_text(to_yaml(read_config({**self.configuration, "output_dir": str(output_dir), **more})))
        return str(path)


class Command:
    """`fastkd` in a process of its own, forked from this one."""

    def __init__(self, argv: list[str], errors_file: Path, deadly: int = 0, pause: int = 0) -> None:
        """deadly: the durable call that kills it; pause: the rename before which it waits for `go`; 0: none."""
        self.errors_file, self.paused, self.go = errors_file, FORK.Event(), FORK.Event()

        def body() -> None:
            with errors_file.open("w") as file:
                os.dup2(file.fileno(), sys.stderr.fileno())
                os.dup2(file.fileno(), sys.stdout.fileno())
            faulthandler.enable()
            leave_out_drawing(pytest.MonkeyPatch())
            if deadly:
                durable = Durable()
                durable.deadly = deadly
                durable.patch()
            if pause:
                self._pause_at(pause)
            sys.exit(main(argv))

        self.process = FORK.Process(target=body)
        self.process.start()

    def wait_until_it_waits(self) -> bool:
        """Whether it does; else it has ended."""
        while not self.paused.wait(0.05):
            if not self.process.is_alive():
                return False
        return True

    def wait_for_end(self) -> int | None:
        """The exit code; one that hangs says where, and is aborted."""
        self.process.join(LONGEST_COMMAND)
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGABRT)
        self.process.join()
        return self.process.exitcode

    @property
    def errors(self) -> str:
        return self.errors_file.read_text(errors="replace").strip()

    def _pause_at(self, number: int) -> None:
        calls = itertools.count(1)

        def act() -> None:
            if next(calls) == number:
                self.paused.set()
                self.go.wait()

        before_every_rename(act)


class Tree:
    """One random tree, and what happens in it."""

    def __init__(self, template: Template, root: Path, chance: random.Random, report: Report) -> None:
        self.template, self.root, self.chance, self.report = template, root, chance, report
        root.mkdir()
        self.foreign = Foreign(root / "outside", chance)
        self.output_dir, self.cache_dir = root / "out", root / "cache"
        if chance.random() < 0.1:
            (root / "disk").mkdir()
            self.output_dir.symlink_to(root / "disk")
        self.seed = 0
        cache_dir = chance.choice([None, str(self.cache_dir)])
        self.config = template.write(f"{root.name}.yaml", self.output_dir, cache_dir=cache_dir)
        self.history: list[str] = []
        self.failed = False
        self.busy = root / "nowhere"
        """Where a neighbour is at work."""

    def grow(self, entries: int) -> None:
        """Plant here and there: into what there is, and into what there will be."""
        out, chance, template = self.output_dir, self.chance, self.template
        ours = [out, out / STAGE, out / "cache", out / "cache" / "tokens", self.cache_dir / "tokens", self.cache_dir / "counts"]
        copies = (template.finished, template.finished / STAGE, template.student, next(template.finished.glob(f"{STAGE}/check*")))
        for _ in range(entries):
            # What a killed process has left under its temporary name goes as a whole.
            folders = [path for path in out.rglob("*") if path.is_dir() and not path.is_symlink() and "@" not in str(path)]
            place = chance.choice([*ours, self.root, *folders])
            if os.path.lexists(place) and not place.is_dir():
                continue
            place.mkdir(parents=True, exist_ok=True)
            begun = (out / "run.json").exists() and place == out / STAGE
            names = PLAIN if chance.random() < 0.7 else ("checkpoint-1", "checkpoint-7", "student") if begun else OURS
            self.foreign.plant(place, names, copies)
        self.check("planting")

    def start_neighbour(self) -> tuple[Command, Path] | None:
        """A process that is in the middle of its work, in a folder of its own in the tree; none where that is taken."""
        chance = self.chance
        folder = chance.choice([self.output_dir / "b", self.output_dir / "deep" / "b", self.output_dir / STAGE, self.root / "b"])
        if os.path.lexists(folder) or any(path.is_symlink() for path in (self.output_dir, *self.output_dir.glob("*"))):
            return None
        kind = chance.choice(["train", "train", "cache", "export", "count"])
        # A cache of its own, whose lock nobody waits for.
        config = self.template.write(f"{self.root.name}-b.yaml", folder, cache_dir=str(self.root / "cache-of-b"))
        argv = ["train", config] if kind == "train" else self.argv(kind, folder, config)
        neighbour = Command(argv, self.template.folder / "neighbour.txt", pause=chance.randint(1, 12 if kind == "train" else 2))
        if not neighbour.wait_until_it_waits():
            return None
        self.busy = folder
        self.foreign.adopt(folder if folder.exists() else folder.parent)
        self.history.append(f"a running {kind} in {folder.relative_to(self.root)}")
        return neighbour, folder if kind == "train" else Path()

    def finish_neighbour(self, neighbour: Command, folder: Path) -> None:
        neighbour.go.set()
        if code := neighbour.wait_for_end():
            self.fail(f"the neighbour ended with {code}: {neighbour.errors}")
        elif folder != Path():
            for difference in differences(self.template.finished, folder, [STAGE]):
                self.fail(f"the neighbour: {difference}")

    def argv(self, kind: str, output: Path, config: str) -> list[str]:
        template = self.template
        text = [str(template.folder / name) for name in ("train.txt", "dev.txt")]
        return {
            "cache": ["cache", config, "--stage", STAGE, "--shard_rows", "7", "--output", str(output)],
            "count": ["vocab", "count", "--model", template.teacher, "--data", text[0], "--output_dir", str(output)],
            "prune": [
                *("vocab", "prune", "--model", template.teacher, "--counts", str(template.counts), "--keep", "0.5"),
                *("--output_dir", str(output)),
            ],
            "export": ["export", str(template.student), "--output_dir", str(output)],
            "eval": ["eval", str(template.student), "--text", text[1], "--use_cpu", "--output_dir", str(output)],
        }[kind]

    def act(self) -> None:
        """One command, and whether everything foreign is as it was."""
        chance = self.chance
        (kind,) = chance.choices(list(COMMANDS), list(COMMANDS.values()))
        deadly = chance.randint(1, DURABLE_CALLS) if kind == "crash" or chance.random() < 0.1 else 0
        if kind in ("train", "crash", "other", "overwrite"):
            seed = self.seed + (kind in ("other", "overwrite"))
            argv = ["train", self.config, "--seed", str(seed), "--overwrite_output_dir", str(kind == "overwrite").lower()]
            if chance.random() < 0.1:
                argv += ["--profile_steps", "1"]
            if kind == "overwrite":
                self.seed = seed
        else:
            new = [self.root / f"made-{len(self.history)}", self.output_dir / "made", self.output_dir]
            places = [*(new if chance.random() < 0.7 else self.foreign.looks), self.root]
            # Two that write one cache or count wait for each other, and the neighbour will not go on.
            output = chance.choice([place for place in places if self.busy not in (place, *place.parents)])
            argv = self.argv(kind, output, self.config)
        command = Command(argv, self.template.folder / "errors.txt", deadly)
        code = command.wait_for_end()
        outcome = OUTCOMES.get(code, "failed")
        self.report.outcomes[f"{kind} {outcome}"] += 1
        self.history.append(f"{' '.join(argv)} (killed at call {deadly or 'none'}): {outcome}")
        if outcome == "failed":
            self.fail(f"ended with {code}: {command.errors[-600:]}")
        self.check(kind)

    def check(self, what: str) -> None:
        if changes := self.foreign.changes():
            self.fail(f"{what} changed {len(changes)} entries: {'; '.join(changes[:3])}")

    def fail(self, what: str) -> None:
        self.failed = True
        self.report.failures.append(f"{self.root.name} of seed {self.report.seed}: {what}; so far: {' | '.join(self.history)}")


def run_trees(trees: int, folder: Path, seed: int = 0) -> Report:
    """So many trees in `folder`. The process that calls must have no threads."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be missing in every fork, which would wait for them
    report, template = Report(seed), Template(folder)
    for number in range(trees):
        chance = random.Random(f"{seed} {number}")
        tree = Tree(template, folder / f"tree-{number}", chance, report)
        tree.grow(chance.randint(2, 12))
        neighbour = tree.start_neighbour() if chance.random() < 0.4 else None
        for _ in range(4):
            tree.act()
            if tree.failed:
                break
            tree.grow(chance.randint(0, 3))
        if neighbour is not None:
            tree.finish_neighbour(*neighbour)
        report.trees += 1
        report.planted += len(tree.foreign.looks)
        shutil.rmtree(tree.root)
    return report


def run_and_report(trees: int, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(vars(run_trees(trees, folder))))


def test_nothing_foreign_changes_in_random_trees(tmp_path):
    harness = SERVER.Process(target=run_and_report, args=(25, tmp_path))  # it forks, so it has to be without threads
    harness.start()
    harness.join(1200)
    harness.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert report["trees"] == 25 and report["outcomes"].keys() >= {
        "train done",
        "crash killed",
        "train refused",
        "overwrite done",
        "count done",
    }


# ---- what random trees seldom hold


@pytest.fixture
def interrupted(tmp_path: Path) -> dict[str, Any]:
    """A run that was stopped behind its second of six steps."""
    start = runs.bert_teacher(tmp_path, num_hidden_layers=1)
    text = runs.write_text(tmp_path, train=16, dev=4)
    more = {"method": "lm", "model_name_or_path": start, "student": {}, "text": text, "stages": {"train": {}}}
    configuration = runs.settings(tmp_path, **more, max_steps=6, save_steps=1, save_total_limit=1)
    crashes(configuration, "train", "begin_step", 2)
    return configuration


def another(configuration: dict[str, Any], folder: Path) -> Path:
    """The stage of a run of another seed, with its first checkpoint and its student."""
    fastkd.distill({**configuration, "seed": 9, "max_steps": 1, "output_dir": str(folder)})
    return folder / "train"


def marked(*places: Path) -> dict[Path, Look]:
    return {path: look(path) for place in places for path in (place, *place.rglob("*"))}


@pytest.mark.parametrize("name", ["checkpoint-1", "student"])
def test_what_another_run_has_made_is_not_deleted_from_a_stage(tmp_path, interrupted, name):
    """Neither for room for its own checkpoints, nor to be replaced."""
    foreign = Path(interrupted["output_dir"]) / "train" / name
    shutil.copytree(another(interrupted, tmp_path / "other") / name, foreign)
    before = marked(foreign)
    with suppress(ValueError, OSError):
        fastkd.distill(interrupted)
    assert marked(foreign) == before


def test_a_trace_takes_the_place_of_no_link(tmp_path, interrupted):
    foreign, profile = tmp_path / "foreign.json", Path(interrupted["output_dir"]) / "train" / "profile"
    foreign.write_text("foreign")
    profile.mkdir()
    (profile / "trace.json").symlink_to(foreign)
    before = marked(foreign, profile)
    with suppress(ValueError, OSError):
        fastkd.distill({**interrupted, "profile_steps": 1})
    assert {path: look(path) for path in before} == before


def test_an_evaluation_is_not_written_over_what_is_there(tmp_path):
    teacher, text = runs.bert_teacher(tmp_path), runs.write_text(tmp_path, train=16, dev=4)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text("foreign")
    argv = ["eval", teacher, "--text", text["eval_path"], "--use_cpu", "--output_dir", str(tmp_path / "results")]
    assert main(argv) in (0, 2)
    assert (tmp_path / "results" / "results.json").read_text() == "foreign"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.test_32_ownership", description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = run_trees(arguments.trees, Path(place), arguments.seed)
    print(json.dumps(vars(found), indent=2))
    sys.exit(1 if found.failures else 0)
