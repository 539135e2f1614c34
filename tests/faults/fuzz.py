"""Random wrong input for every command, through `main` in one process: `python -m tests.faults.fuzz --cases 2000 --seconds 3`.

A case is a valid configuration or command line with one to three changes: other types, numbers that are none, unknown keys, junk. It
must end as a command or as a refusal in a sentence, with nothing half-written and nothing under the final name where it was refused.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before anything imports the hub's library

from fastkd.cli.failures import BAD_INPUT
from fastkd.cli.main import main
from fastkd.train.config import RunConfig
from fastkd.train.schema import key_rows
from tests import runs

KINDS = {key.replace("NAME", "pretrain"): kind for key, kind, *_ in key_rows(RunConfig)}
"""Every key of a configuration, and its type."""
FLAGS_OF_TRAIN = [f"--{key}" for key in KINDS]
SCALARS: list[Any] = [
    *(None, True, False, "", " ", "x", "~", "~no-such-user/x", "é", "a\nb", "\t", "\x07", "a\0b", "x" * 300, "\ud800"),
    *(-1, 0, 1, 2, 3, 7, 129, 10**6, 10**12, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *(
        "1e5",
        "0x10",
        "010",
        "1:30",
        "yes",
        "nan",
        "-inf",
        "1_000",
        "١٢",
        "{text}",
        "{mask}",
        "{",
        "%s",
        "--",
        "-1",
        "first:9",
        "every:0",
    ),
    *(
        "..",
        "../other",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/no/such",
        "no-such-organisation/no-such-model",
        "stdlib",
        "glue/rte",
    ),
]
NESTED: list[Any] = [[], [[]], [None], [1, "a"], {}, {"a": {}}, {"": ""}, {1: 2}, {None: None}, {"path": 3}, [{"kind": "x"}]]
JUNK = [
    "\t",
    "\x00",
    "{",
    "}",
    "[",
    "]",
    "- ",
    ": ",
    "&a ",
    "*a",
    "!!python/object:os.system",
    "? ",
    "|",
    ">",
    "'",
    '"',
    "%",
    "@",
    "<<: *a",
    "\ufeff",
]
FLAGS = {
    "eval": [
        "--teacher",
        "--baseline",
        "--task",
        "--text",
        "--path",
        "--name",
        "--text_column",
        "--split",
        "--max_rows",
        "--max_length",
    ],
    "export": ["--results", "--output_dir"],
    "cache": ["--stage", "--output", "--kind", "--k", "--dtype", "--shard_rows"],
    "vocab count": ["--model", "--data", "--name", "--split", "--text_column", "--max_rows", "--on_bad_row", "--num_proc"],
    "vocab prune": ["--model", "--counts", "--keep", "--protected", "--output_dir"],
    "doctor": ["--vocabulary", "--student_hidden", "--teacher_hidden", "--temperature", "--tokens", "--student_layers", "--batch_size"],
    "plot": ["--key", "--output"],
}
MEMORY = 8 * 2**30
"""Bytes of addresses that the script's process may take, so that no case takes all of a machine's."""


class Accepted(BaseException):
    """The input was taken, and what it asks for would take longer than a case may."""


class TooLong(BaseException):
    """A case has run for longer than it may."""


@dataclass
class Case:
    """One command line, and the files that it names."""

    folder: Path
    argv: list[str]
    text: bytes = b""
    code: int | None = None
    told: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{' '.join(map(repr, self.argv))}\n{self.text.decode(errors='backslashreplace')}\n{self.code}: {self.told}\n{self.faults}"
        )


class Models:
    """Tiny models, texts and counts, made once."""

    def __init__(self, folder: Path) -> None:
        self.bert, self.llama = runs.bert_teacher(folder), runs.llama_teacher(folder)
        self.classifier = runs.bert_classifier(folder)
        self.text, self.task, self.dataset = runs.write_text(folder, 12, 4), runs.write_task(folder, rows=8), runs.write_dataset(folder)
        self.counts, self.log = str(folder / "counts"), folder / "logs"
        assert main(["vocab", "count", "--model", self.bert, "--data", self.text["path"], "--output_dir", self.counts]) == 0
        self.log.mkdir()
        (self.log / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')


def configuration(random: random.Random, models: Models, folder: Path) -> dict[str, Any]:
    method = random.choice(["kd", "glmd", "crild", "ted", "lm", "finetune"])
    settings = runs.settings(folder, method=method, teacher_model_name_or_path=models.bert, max_steps=1)
    if method in ("kd", "lm"):
        return {**settings, "text": models.text, "vocabulary": random.choice([None, {"keep": 0.5, "multiple_of": 8}])}
    if method == "glmd":
        stages = {"stages": {"pretrain": {}, "task_words": {}}, "vocabulary": {"keep": 0.5, "multiple_of": 8}}
        return {**settings, **stages, "text": models.text, "task": models.task}
    named = {"teacher_model_name_or_path": models.classifier, "model_name_or_path": models.classifier, "student": {}}
    return {**settings, **named, "student_layers": "first:1", "dataset": models.dataset}


def value(random: random.Random, kind: str = "") -> Any:
    """Any value, and half of the time one of the kind that is wanted."""
    alike = [scalar for scalar in SCALARS if type(scalar).__name__ in kind.split(" | ")]
    if alike and random.random() < 0.5:
        return random.choice(alike)
    return copy.deepcopy(random.choice(NESTED if random.random() < 0.2 else SCALARS))


def changed(random: random.Random, config: dict[str, Any]) -> None:
    """Set, drop or invent a key at a random place."""
    more = {
        "student.hidden_size": "int",
        "student.hidden_act": "str",
        "student.num_attention_heads": "int",
        "options.temperature": "float",
    }
    key, kind = random.choice([*KINDS.items(), *more.items()])
    path = key.split(".")
    place: Any = config
    for name in path[:-1]:
        if not isinstance(place.get(name), dict):
            if random.random() < 0.7:
                path = [name]
                break
            place[name] = {}
        place = place[name]
    act = random.random()
    if act < 0.1:
        place.pop(path[-1], None)
    elif act < 0.2:
        place[random.choice(["nonsense", "", "é", 3, None, "max_step", path[-1] + "s"])] = value(random)
    else:
        place[path[-1]] = value(random, kind)


def damaged(random: random.Random, text: str) -> bytes:
    """A text with some of its characters or lines replaced by junk."""
    lines = text.splitlines(keepends=True)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        lines[at] = random.choice(
            [
                "",
                lines[at] * 2,
                f" {lines[at]}",
                f"\t{lines[at]}",
                lines[at].replace(":", "", 1),
                lines[at].replace(": ", f": {random.choice(JUNK)}", 1),
                f"{random.choice(JUNK)}{lines[at]}",
                f"{lines[at].rstrip()} {random.choice(JUNK)}\n",
            ]
        )
    content = "".join(lines).encode(errors="surrogatepass")
    if random.random() < 0.2:
        content = content[: random.randrange(len(content) + 1)]
    if random.random() < 0.1:
        at = random.randrange(len(content) + 1)
        content = content[:at] + random.randbytes(8) + content[at:]
    return content


def written(config: Any) -> str:
    """YAML by a library's own hand, which also writes what a configuration cannot hold."""
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def command(random: random.Random, models: Models, folder: Path) -> Case:
    """One case, by its own random numbers."""
    kind = random.choice(["train"] * 8 + [*FLAGS])
    out = str(folder / "out")
    if kind in ("train", "cache"):
        config, text = copy.deepcopy(configuration(random, models, folder)), None
        for _ in range(random.choice([0, 1, 1, 2, 3])):
            with contextlib.suppress(AttributeError, TypeError):  # a change below what an earlier one has replaced
                changed(random, config)
        with contextlib.suppress(yaml.YAMLError):
            text = written(config)
        content = (text or "a: b").encode(errors="surrogatepass")
        if random.random() < 0.25:
            content = damaged(random, text or "a: b\n")
        (folder / "run.yaml").write_bytes(content)
        argv = [kind, str(folder / "run.yaml")]
        argv += [] if kind == "train" else ["--stage", "distill", "--output", out]
        flags = FLAGS_OF_TRAIN if kind == "train" else FLAGS[kind]
    else:
        content = b""
        argv, flags = (
            {
                "eval": ["eval", models.bert, "--text", models.text["eval_path"], "--use_cpu", "--output_dir", out],
                "export": ["export", models.bert, "--output_dir", out],
                "vocab count": ["vocab", "count", "--model", models.bert, "--data", models.text["eval_path"], "--output_dir", out],
                "vocab prune": [
                    "vocab",
                    "prune",
                    "--model",
                    models.bert,
                    "--counts",
                    models.counts,
                    "--keep",
                    "0.9",
                    "--output_dir",
                    out,
                ],
                "doctor": [
                    "doctor",
                    "--vocabulary",
                    "16",
                    "--tokens",
                    "8",
                    "--teacher",
                    models.bert,
                    "--batch_size",
                    "1",
                    "--length",
                    "8",
                ],
                "plot": ["plot", str(models.log), "--output", f"{out}.png"],
            }[kind],
            FLAGS[kind],
        )
    for _ in range(random.choice([0, 1, 1, 2]) if kind != "train" else random.choice([0, 0, 1])):
        flag, given = random.choice([*flags, *flags, "--nonsense", "--use_cpu"]), random.choice(SCALARS)
        text = str(given).replace("\0", "")
        argv += random.choice([[flag, text], [f"{flag}={text}"], [flag], [flag, text, text], [text]])
    return Case(folder, argv, content)


@contextlib.contextmanager
def short_work() -> Iterator[None]:
    """What a case may take long for is left out: training of more than some steps, and the checks and measures of the doctor."""
    from fastkd.ops import selfcheck
    from fastkd.train import doctor, loop

    run = loop.StageTrainer.run

    def short(self: Any) -> Any:
        is_short = 1 <= self.arguments.max_steps <= 4 and self.arguments.gradient_accumulation_steps <= 4
        if not is_short or self.arguments.torch_compile:
            raise Accepted
        return run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StageTrainer, "run", short)
        patch.setattr(selfcheck, "check_ops", lambda problem: iter(()))
        patch.setattr(doctor, "PROBE_SECONDS", 0.01)
        for module in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, module, None)
        yield


def run_case(case: Case, limit: float | None = None) -> None:
    """Run a case and note what is wrong with how it ends."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    logging.getLogger("fastkd").addHandler(handler)
    started, before = time.monotonic(), Path.cwd()
    try:
        os.chdir(case.folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.ExitStack() as stack:
            if limit is not None:
                stack.enter_context(_within(limit))
            case.code = main(case.argv)
    except Accepted:
        case.code = 0
    except TooLong:
        case.faults.append(f"it ran for more than {limit} s")
    except BaseException:
        case.faults.append(f"an exception escaped: {traceback.format_exc()}")
    finally:
        os.chdir(before)
        logging.getLogger("fastkd").removeHandler(handler)
    case.seconds, case.told = time.monotonic() - started, err.getvalue()[-2000:]
    if case.code not in (0, 1, 2):
        case.faults.append(f"the exit code is {case.code}")
    for said in ("Traceback", "This is a bug in fastkd"):
        if said in err.getvalue():
            case.faults.append(f"{said!r} is told")
    if case.code and not err.getvalue().strip():
        case.faults.append("nothing is told")
    names = ["student", "result.json", "results.json", "config.json"] if case.code == BAD_INPUT else []
    left = [path for path in case.folder.rglob("*") if ".tmp-" in path.name or path.name in names]
    if left:
        case.faults.append(f"left are {', '.join(str(path.relative_to(case.folder)) for path in left)}")


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(cases: int, folder: Path, *, seed: int = 0, first: int = 0, limit: float | None = None) -> Iterator[Case]:
    """Run `cases` cases from number `first` on, each in a folder of its own below `folder`, which is removed behind it."""
    models = Models(folder)
    with short_work(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for number in range(first, first + cases):
            place = folder / f"case-{number}" / "here"
            place.mkdir(parents=True)
            case = command(random.Random(f"{seed} {number}"), models, place)
            run_case(case, limit)
            yield case
            shutil.rmtree(place.parent, ignore_errors=True)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="that a refusal may take")
    parser.add_argument("--show", action="store_true", help="print every case")
    known = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    io.TextIOWrapper.reconfigure(sys.stdout, errors="backslashreplace")  # type: ignore[arg-type]
    codes: Counter[int | None] = Counter()
    faulty = slow = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(
            fuzz(known.cases, Path(folder), seed=known.seed, first=known.first, limit=120), start=known.first
        ):
            codes[case.code] += 1
            if case.code != 0 and case.seconds > known.seconds:
                slow += 1
                case.faults.append(f"the refusal took {case.seconds:.1f} s")
            if case.faults or known.show or case.code == 1:
                print(f"--- {number} ({case.seconds:.1f} s)\n{case}", flush=True)
            faulty += bool(case.faults)
    print(f"{known.cases} cases, exit codes {dict(codes)}, {faulty} with faults, {slow} of them slow refusals.")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(_main())
