"""The comparison of `teacher_mass` in miniature: every student, on the same slots, and gone on with where it stopped."""

from __future__ import annotations

import json

import pytest

from fastkd.benchmarks import teacher_mass
from fastkd.tasks import stdlib
from fastkd.train import quickstart
from fastkd.train.loop import StageTrainer

SIZE = teacher_mass.Size(seeds=(3,), documents=6, steps=3, teacher_steps=3, test_rows=4)


def test_stopped_and_gone_on_with_it_has_every_student(tmp_path, monkeypatch):
    whole = {split: stdlib.stdlib_files(split) for split in stdlib.SPLITS}
    monkeypatch.setattr(stdlib, "stdlib_files", lambda split: whole[split][:8])
    monkeypatch.setattr(quickstart, "VOCABULARY", 768)
    output = tmp_path / "teacher_mass.json"
    original, steps = StageTrainer._step, []

    def stop(*arguments, **named):
        steps.append(1)
        if len(steps) == 3 + 3 * 4 + 2:  # in the fifth student
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(StageTrainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        teacher_mass.measure(tmp_path / "runs", SIZE, output)
    before = json.loads(output.read_text())
    assert len(before["results"]) == 4
    teacher_mass.measure(tmp_path / "runs", SIZE, output)
    record = json.loads(output.read_text())
    assert len(steps) == 3 + 3 * 6 + 1  # that student's first step had been saved, and its second one was not made
    assert [(result["seed"], result["row"]) for result in record["results"]] == [(3, row) for row in teacher_mass.ROWS]
    assert record["results"][:4] == before["results"] and record["teacher"] == before["teacher"]
    assert len({result["perplexity"] for result in record["results"]}) == len(teacher_mass.ROWS)  # no two are the same training
    table = teacher_mass.table(record)
    assert all(row.title in table for row in teacher_mass.ROWS.values()) and "Mean of seeds 3 (each)" in table
