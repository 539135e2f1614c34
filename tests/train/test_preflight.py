"""What a stage is said to need, counted by hand, and what is refused of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.methods.objective import Objective
from fastkd.models.language_model import LanguageModel
from fastkd.ops.plan import plan_chunks
from fastkd.train import preflight
from fastkd.train.config import StageArguments
from fastkd.train.preflight import (
    MemoryEstimate,
    check_disk,
    check_memory,
    checkpoint_bytes,
    explaining_shortage,
    memory_estimate,
)
from fastkd.train.state import module_tensors
from tests import tiny

CPU = torch.device("cpu")
VOCABULARY, WIDTH, LAYERS = 600, 32, 2


class Distillation(Objective):
    """A student with a frozen running average beside it, and a projection that is trained with it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = LanguageModel(tiny.bert())
        self.average = LanguageModel(tiny.bert(seed=1)).requires_grad_(False)
        self.projection = nn.Linear(WIDTH, 48)


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) * 4


def buffers_of(*models: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for model in models for b in model.buffers())


@pytest.fixture(scope="module")
def objective() -> Distillation:
    return Distillation()


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return LanguageModel(tiny.bert(seed=2, num_hidden_layers=3)).requires_grad_(False)


def estimate(doing: Any, objective: Objective, teacher: nn.Module | None, **more: Any) -> MemoryEstimate:
    sharing = {key: more.pop(key) for key in ("sequences", "shards", "teacher_shards") if key in more}
    arguments = StageArguments(per_device_train_batch_size=8, per_device_eval_batch_size=2, **more)
    return memory_estimate(doing, objective, teacher, arguments, 64, CPU, **sharing)


def test_a_step_is_counted_part_by_part(objective: Distillation, teacher: LanguageModel) -> None:
    trained = size_of(objective.student) + size_of(objective.projection)
    beside = size_of(objective.average) + buffers_of(objective)
    needed = estimate("training", objective, teacher)
    assert list(needed.certain.values()) == [trained, beside, size_of(teacher) + buffers_of(teacher), trained, 2 * trained]
    logits = plan_chunks(8 * 64, VOCABULARY).buffer_bytes
    assert list(needed.rough.values()) == [0, logits, 17 * LAYERS * 8 * 64 * WIDTH * 4]
    assert needed.total == sum((*needed.certain.values(), *needed.rough.values()))
    halved = estimate("training", objective, teacher, bf16=True, sequences=3).rough
    matrices = [p.numel() for p in objective.parameters() if p.requires_grad and p.dim() > 1]
    assert (halved["weights in 16 bits, for autocast"], halved["activations"]) == (
        sum(matrices) * 2,
        3 * 17 * LAYERS * 8 * 64 * WIDTH * 2,
    )


def test_an_evaluation_has_no_gradients_and_one_layer_at_a_time(objective: Distillation, teacher: LanguageModel) -> None:
    training, evaluation = (estimate(doing, objective, teacher) for doing in ("training", "evaluation"))
    assert evaluation.certain == {**training.certain, "gradients": 0}
    assert evaluation.rough["activations"] == 17 * 2 * 64 * WIDTH * 4
    assert evaluation.rough["logits of a chunk"] == plan_chunks(2 * 64, VOCABULARY, has_teacher=False).buffer_bytes
    assert "per_device_eval_batch_size" in evaluation.knobs and "per_device_train_batch_size" in training.knobs


def test_a_cached_teacher_and_one_inside_the_objective_are_not_counted_twice(objective: Distillation) -> None:
    assert estimate("training", objective, None).certain["teacher"] == 0
    assert estimate("training", objective, objective.average).certain["teacher"] == 0


def test_what_is_split_over_ranks_is_counted_once(objective: Distillation, teacher: LanguageModel) -> None:
    whole, split = (estimate("training", objective, teacher, shards=n, teacher_shards=2 * n).certain for n in (1, 4))
    for part in ("weights that are trained", "gradients", "moments of AdamW"):
        assert split[part] == whole[part] // 4
    assert split["teacher"] == whole["teacher"] // 4


def test_modules_that_are_no_transformers_have_no_guesses() -> None:
    plain = Objective()
    plain.student = nn.Linear(10, 10)
    assert set(estimate("training", plain, None).rough.values()) == {0}


def test_the_table_has_a_line_a_part(objective: Distillation, teacher: LanguageModel) -> None:
    lines = str(estimate("training", objective, teacher)).splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "weights that are trained",
        "copies, frozen weights and buffers beside them",
        "teacher",
        "gradients",
        "moments of AdamW",
        "logits of a chunk (roughly)",
        "activations (roughly)",
        "together",
    ]
    assert lines[0].endswith(f"{(size_of(objective.student) + size_of(objective.projection)) / 2**20:.1f} MiB")
    assert len({len(line) for line in lines}) == 1


NEEDED = MemoryEstimate("training", {"teacher": 3 << 30, "gradients": 1 << 30}, {"activations": 2 << 30}, "max_length")


@pytest.mark.parametrize(("memory", "verdict"), [(4 << 30, "warned"), (6 << 30, "fine"), ((4 << 30) - 1, "refused")])
def test_only_what_is_certain_is_refused(
    memory: int, verdict: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "device_memory", lambda device: memory)
    if verdict == "refused":
        with pytest.raises(
            ValueError, match=r"Stage pretrain needs more .*4\.00 GiB that cpu has(?s:.*)teacher +3\.00 GiB(?s:.*)lower max_length"
        ):
            check_memory(NEEDED, "pretrain", CPU)
    else:
        check_memory(NEEDED, "pretrain", CPU)
    assert ("may need more in training" in caplog.text) == (verdict == "warned")


def test_this_machine_has_memory() -> None:
    assert 1 << 30 < preflight.device_memory(CPU) < 1 << 50


def test_a_shortage_is_explained() -> None:
    with pytest.raises(MemoryError) as error, explaining_shortage(NEEDED, "pretrain"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
    first, *table = str(error.value).splitlines()
    assert first.startswith(
        "Stage pretrain ran out of memory in training: CUDA out of memory. Tried to allocate 9 GiB. Lower max_length."
    )
    assert table == str(NEEDED).splitlines()
    with pytest.raises(RuntimeError, match=r"^another$"), explaining_shortage(NEEDED, "pretrain"):
        raise RuntimeError("another")


def test_a_checkpoint_is_as_large_as_its_tensors(objective: Distillation) -> None:
    held = sum(
        t.numel() * t.element_size() for m in (objective.student, *objective.auxiliary().values()) for t in module_tensors(m).values()
    )
    moments = 2 * (size_of(objective.student) + size_of(objective.projection))
    without = checkpoint_bytes(objective, keeps_best=False)
    assert held + moments <= without <= held + moments + buffers_of(objective)
    assert checkpoint_bytes(objective, keeps_best=True) - without == size_of(objective.student) + buffers_of(objective.student)


def test_a_full_disk_is_refused_with_both_figures(tmp_path: Path, objective: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    one, student = checkpoint_bytes(objective, keeps_best=True), size_of(objective.student) + buffers_of(objective.student)

    def check(free: int, **more: Any) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        check_disk(folder, objective, **{"save_total_limit": 2, "keeps_best": True, **more})

    check(3 * one + student)
    with pytest.raises(
        ValueError,
        match=r"pretrain has \d.* MiB of free disk, and stage pretrain needs .*: 3 more checkpoints .*lower save_total_limit",
    ):
        check(3 * one + student - 1)
    check(2 * one + student, save_total_limit=1)
    (folder / "checkpoint-5").mkdir()  # is there already: one less to come
    check(2 * one + student)
    with pytest.raises(ValueError, match="2 more checkpoints"):
        check(2 * one + student - 1)
