"""KDTrainer: the lean loop's gradients at any accumulation, and what is Trainer's: callbacks, evaluation, saving, resuming."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastkd.integrations.hf import AUXILIARY_FILE, KDTrainer, TrainedSide
from fastkd.integrations.hf_objectives import make_objective
from fastkd.methods.crild import CRILDOptions, IntermediateLayerDistillation
from fastkd.methods.glmd import GLMDOptions, WordPrediction
from fastkd.methods.objective import Objective, Position, Stage
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import load_language_model
from fastkd.models.prune import prune_model
from fastkd.models.task_model import TaskModel
from fastkd.tasks.encoded import TaskBatch
from fastkd.tasks.text import TextBatch
from fastkd.train.config import StageArguments
from fastkd.train.loop import NonFiniteError, StageTrainer
from fastkd.vocab.map import VocabMap
from tests import ranks, tiny

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'fastkd[hf]'")
from transformers import TrainerCallback, TrainingArguments

ROWS, WIDTH, VOCABULARY = 8, 12, 200
DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
NO_DROPOUT = {"bert": DROPOUT, "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
HEADS = {"bert": "MaskedLM", "gpt2": "CausalLM"}
PAIRS = [("bert", "kd"), ("bert", "glmd"), ("gpt2", "kd"), ("gpt2", "lm")]


def pair(name: str, head: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """(student, teacher), of half the width."""
    head = HEADS[name] if head is None else head
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    student, teacher = (
        tiny.transformer(name, head, seed=seed, **NO_DROPOUT[name], **{**more, **settings}) for seed, more in ((1, small), (2, {}))
    )
    return student, teacher


def text_rows() -> list[dict[str, Tensor]]:
    """Rows as transformers' collators give them: of very different lengths, and half of the tokens have labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (12, 3, 5, 12, 4, 7, 2, 9):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.where(torch.rand(length, generator=generator) < 0.5, ids, -100)})
    return rows


def task_rows() -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(text_rows())]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    ids, mask = torch.zeros(len(rows), WIDTH, dtype=torch.int64), torch.zeros(len(rows), WIDTH, dtype=torch.int64)
    labels = torch.full((len(rows), WIDTH), -100)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length], mask[i, :length] = row["input_ids"], 1
        if isinstance(row["labels"], Tensor):
            labels[i, :length] = row["labels"]
    if not isinstance(rows[0]["labels"], Tensor):
        labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_batch(rows: Sequence[dict[str, Any]], *, causal: bool) -> TextBatch | TaskBatch:
    """The same for the lean loop, whose labels are those that a position predicts."""
    inputs = collate(rows)
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    if labels.dim() == 1:
        return TaskBatch(ids, mask, None, labels)
    if causal:
        following = torch.full_like(labels, -100)
        following[:, :-1] = labels[:, 1:]
        labels = following
    return TextBatch(ids, mask, labels)


def arguments(folder: Path | str, **more: Any) -> TrainingArguments:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": 3,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**settings, **more})


class Keep(TrainerCallback):
    """The student's gradients before every optimizer step, and how many steps there were."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.gradients.append(gradients(model.objective))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.steps += 1


def gradients(objective: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def error(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


def lean(objective: Objective, rows: list[dict[str, Any]], folder: Path, accumulation: int) -> tuple[Tensor, list[Any]]:
    """The gradients of the lean loop's first step, and the rows in the order in which it took them."""
    folder.mkdir()
    causal = isinstance(objective.student, LanguageModel) and objective.student.causal
    stage = Stage(
        "test",
        objective,
        np.array([len(row["input_ids"]) for row in rows]),
        lambda indices, generator: own_batch([rows[int(i)] for i in indices], causal=causal),
        None,
        "none",
        True,
    )
    settings = StageArguments(
        max_steps=1,
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    trainer = StageTrainer(stage, settings, folder, seed=0)
    found: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: found.append(gradients(objective)))
    trainer.run()
    order = [rows[i] for number in range(accumulation) for i in trainer.order.batch(number)]
    return found[0], order


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("name", "method"), [*PAIRS, ("bert", "crild"), ("bert", "finetune")])
def test_gradients_are_the_lean_loops(name: str, method: str, accumulation: int, tmp_path: Path):
    on_task = method in ("crild", "finetune")
    student, teacher = pair(name, "SequenceClassification" if on_task else None)
    other = None if method in ("lm", "finetune") else teacher
    objective = make_objective(copy.deepcopy(student), other, method, {})
    expected, rows = lean(objective, task_rows() if on_task else text_rows(), tmp_path / "lean", accumulation)

    kept = Keep()
    size = ROWS // accumulation
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    KDTrainer(
        copy.deepcopy(student), args, teacher=other, method=method, train_dataset=rows, data_collator=collate, callbacks=[kept]
    ).train()
    assert error(kept.gradients[0], expected) < 1e-6

    if accumulation == 4 and not on_task:  # examples are as many in every micro-batch, tokens are not
        mean_of_means = make_objective(copy.deepcopy(student), other, method, {}).train()
        for i in range(accumulation):
            batch = own_batch(rows[i * size : (i + 1) * size], causal=name == "gpt2")
            (mean_of_means(batch, mean_of_means.weight(batch)) / accumulation).backward()
        assert error(gradients(mean_of_means), expected) > 0.01


def test_a_last_step_of_fewer_micro_batches_has_its_own_count(tmp_path: Path):
    student, teacher = pair("gpt2")
    kept = Keep()
    rows = text_rows()
    args = arguments(
        tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-30, weight_decay=0.0
    )
    KDTrainer(student, args, teacher=teacher, method="kd", train_dataset=rows, data_collator=collate, callbacks=[kept]).train()
    objective = make_objective(pair("gpt2")[0], teacher, "kd", {}).train()
    batch = own_batch(rows[6:], causal=True)
    objective(batch, objective.weight(batch)).backward()
    assert error(kept.gradients[1], gradients(objective)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_run_trains_logs_evaluates_and_saves_what_from_pretrained_opens(name: str, tmp_path: Path):
    student, teacher = pair(name)
    before = copy.deepcopy(teacher.state_dict())
    kept, tokenizer = Keep(), tiny.wordpiece()
    args = arguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=6,
        include_num_input_tokens_seen="non_padding",
    )
    trainer = KDTrainer(
        student,
        args,
        teacher=teacher,
        method="kd",
        options={"temperature": 1.0},
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[kept],
        compute_metrics=lambda p: {"shape": list(p.predictions.shape), "labels": list(p.label_ids.shape)},
    )
    trainer.train()
    assert kept.steps == 12
    logs = trainer.state.log_history
    losses = [line["loss"] for line in logs if "loss" in line]
    assert losses[-1] < losses[0] and trainer.state.num_input_tokens_seen == 6 * sum(len(row["input_ids"]) for row in text_rows())
    scores = [line for line in logs if "eval_loss" in line]
    assert len(scores) == 2 and scores[1]["eval_loss"] < scores[0]["eval_loss"]
    assert scores[0]["eval_shape"] == [ROWS, WIDTH, VOCABULARY] and scores[0]["eval_labels"] == [ROWS, WIDTH]
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())

    trainer.save_model(str(tmp_path / "model"))
    opened = type(student).from_pretrained(tmp_path / "model")
    assert {key for key, _ in opened.named_parameters()} == {key for key, _ in student.named_parameters()}
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in opened.state_dict().items())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | (
        {"generation_config.json"} if name == "gpt2" else set()
    )


def test_eval_loss_is_the_mean_of_the_batches_losses(tmp_path: Path):
    student, teacher = pair("gpt2")
    objective = make_objective(copy.deepcopy(student), teacher, "kd", {}).eval()
    trainer = KDTrainer(student, arguments(tmp_path, per_device_eval_batch_size=4), teacher=teacher, method="kd", data_collator=collate)
    rows = text_rows()
    with torch.no_grad():
        batches = [own_batch(part, causal=True) for part in (rows[:4], rows[4:])]
        expected = np.mean([float(objective(batch, objective.weight(batch))) for batch in batches])
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_questions_are_predicted_as_transformers_does(tmp_path: Path):
    student, teacher = pair("bert", "QuestionAnswering")
    trainer = KDTrainer(student, arguments(tmp_path), teacher=teacher, method="crild", options={"label_weight": 1.0})
    rows = [{"input_ids": torch.arange(1, 9) + i, "start_positions": i, "end_positions": i + 1} for i in range(4)]
    predicted = trainer.predict(rows)
    with torch.no_grad():
        expected = student.eval()(input_ids=torch.stack([row["input_ids"] for row in rows]))  # type: ignore[arg-type]
    np.testing.assert_allclose(predicted.predictions[0], expected.start_logits.numpy(), rtol=1e-5)
    np.testing.assert_allclose(predicted.predictions[1], expected.end_logits.numpy(), rtol=1e-5)
    assert [ids.tolist() for ids in predicted.label_ids] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert math.isfinite(predicted.metrics["test_loss"])
    unlabelled = trainer.predict([{"input_ids": row["input_ids"]} for row in rows])
    assert "test_loss" not in unlabelled.metrics and np.array_equal(unlabelled.predictions[0], predicted.predictions[0])


def mapped_student() -> LanguageModel:
    student, _ = pair("gpt2", vocab_size=VOCABULARY)
    vocab_map = VocabMap(torch.arange(0, VOCABULARY, 2), torch.arange(VOCABULARY) // 2)
    return prune_model(student, vocab_map)


def test_a_student_on_a_kept_vocabulary_is_saved_with_its_map(tmp_path: Path):
    """Saving again replaces what is there, also the bias of a student that answered for all ids."""
    from fastkd.models.load import load_frozen

    for method in ("glmd", "kd", "glmd"):
        student, (_, teacher) = mapped_student(), pair("gpt2")
        trainer = KDTrainer(
            student, arguments(tmp_path), teacher=teacher, method=method, train_dataset=text_rows(), data_collator=collate
        )
        trainer.train()
        trainer.save_model()
        opened = load_frozen(str(tmp_path))
        ids = torch.tensor([[5, 17, 120]])
        with torch.no_grad():
            assert torch.equal(opened(ids), student.eval()(ids))
        if method == "kd":  # every slot is two ids
            torch.testing.assert_close(opened.slot_bias, torch.full((VOCABULARY // 2,), math.log(2)))
        else:
            assert opened.slot_bias is None


@pytest.mark.parametrize("mapped", [False, True])
def test_callbacks_are_given_what_generates_and_saves_as_the_student_does(mapped: bool, tmp_path: Path):
    """With a kept vocabulary the ids are those of the rows, and the map is saved as well."""
    student, (plain, teacher) = mapped_student() if mapped else None, pair("gpt2")
    student = LanguageModel(plain) if student is None else student
    prompt = torch.tensor([[5, 18, 121]])
    found: list[Tensor] = []

    class Asking(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            model.eval()
            found.append(model.generate(prompt, max_new_tokens=4, do_sample=False))
            found.append(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False))
            model.save_pretrained(tmp_path / "saved")
            assert model.dtype is torch.float32 and model.generation_config is student.model.generation_config
            with pytest.raises(AttributeError, match="no attribute 'wheels'"):
                _ = model.wheels

    trainer = KDTrainer(
        student,
        arguments(tmp_path),
        teacher=teacher,
        method="kd",
        train_dataset=text_rows(),
        data_collator=collate,
        callbacks=[Asking()],
    )
    trainer.train()
    expected = student.eval().generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert torch.equal(trainer.model.generate(prompt, max_new_tokens=4, do_sample=False), expected)  # type: ignore[union-attr]
    opened = load_language_model(str(tmp_path / "saved"))
    assert torch.equal(opened.eval()(prompt), student(prompt)) and (opened.vocab_map is None) is not mapped
    copied = copy.deepcopy(trainer.model)
    assert torch.equal(copied.generate(prompt, max_new_tokens=4, do_sample=False), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("stop", [3, 4])
def test_trainers_own_checkpoint_goes_on_where_it_stopped(stop: int, tmp_path: Path):
    """Also what is beside the student (a layer, a running average), and what is drawn for a micro-batch."""

    def trainer(folder: str, callbacks: Sequence[Any] = ()) -> KDTrainer:
        student, teacher = pair("bert", "SequenceClassification")
        options = CRILDOptions(ema_decay=0.9)
        own, other = TaskModel(student), TaskModel(teacher).eval().requires_grad_(False)
        objective = IntermediateLayerDistillation(own, other, options, seed=0)
        args = arguments(
            tmp_path / folder,
            max_steps=6,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=stop,
            train_sampling_strategy="random",
        )
        return KDTrainer(objective, args, train_dataset=task_rows(), data_collator=collate, callbacks=list(callbacks))

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = state.global_step == stop

    whole = trainer("whole")
    whole.train()
    trainer("cut", [Stop()]).train()
    again = trainer("cut")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name
    checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    assert (checkpoint / AUXILIARY_FILE).is_file()
    from transformers import BertForSequenceClassification

    _, loading = BertForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_the_objective_hears_of_every_step(tmp_path: Path):
    heard: list[Any] = []

    class Listening(WordPrediction):
        def begin_step(self, at: Position) -> None:
            heard.append((at.step, at.total_steps, at.epoch, at.total_epochs))

        def end_step(self) -> None:
            heard.append("end")

    student, teacher = pair("bert")
    objective = Listening(LanguageModel(student), LanguageModel(teacher).eval().requires_grad_(False), GLMDOptions())
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    KDTrainer(objective, args, train_dataset=text_rows(), data_collator=collate).train()
    assert heard == [(0, 4, 0, 2), "end", (1, 4, 0, 2), "end", (2, 4, 1, 2), "end", (3, 4, 1, 2), "end"]


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path):
    student, teacher = pair("gpt2")
    scores = iter([1.0, 3.0, 2.0])
    args = arguments(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer = KDTrainer(
        student,
        args,
        teacher=teacher,
        method="kd",
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        data_collator=collate,
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    best = type(student).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in best.state_dict().items())


def test_bfloat16_runs(tmp_path: Path):
    student, teacher = pair("gpt2")
    kept = Keep()
    args = arguments(tmp_path, bf16=True)
    KDTrainer(student, args, teacher=teacher, method="kd", train_dataset=text_rows(), data_collator=collate, callbacks=[kept]).train()
    objective = make_objective(pair("gpt2")[0], teacher, "kd", {}).train()
    batch = own_batch(text_rows(), causal=True)
    objective(batch, objective.weight(batch)).backward()
    assert 0 < error(kept.gradients[0], gradients(objective)) < 0.05


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path):
    student, teacher = pair("gpt2")
    before = copy.deepcopy(student.state_dict())
    trainer = KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd", train_dataset=text_rows(), data_collator=collate)
    with torch.no_grad():
        teacher.transformer.wte.weight[:] = math.nan
    with pytest.raises(NonFiniteError, match="Step 1 has gradient norm nan; the weights were not updated"):
        trainer.train()
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_what_would_be_left_out_is_refused(tmp_path: Path):
    student, teacher = pair("bert")
    args = arguments(tmp_path)

    def refused(message: str, model: Any = student, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            KDTrainer(model, **{"args": args, "method": "kd", "teacher": teacher, **given})

    refused("method='ted' is none of kd, glmd, lm", method="ted")
    refused("method=None is none of crild, finetune", model=tiny.transformer("bert"), method=None)
    refused("method='kd' needs a teacher", teacher=None)
    refused("method='lm' has no teacher", method="lm")
    refused("options has temprature, which method kd does not know; it has temperature", options={"temprature": 2})
    refused("The student is a masked language model and the teacher a decoder", teacher=pair("gpt2")[1])
    refused("label_smoothing_factor=0.1", args=arguments(tmp_path, label_smoothing_factor=0.1))
    refused("compute_loss_func is set", compute_loss_func=lambda *_: None)
    refused("one object", teacher=student)
    objective = make_objective(student, teacher, "kd", {})
    refused("model is an objective", model=objective)
    classifier = tiny.transformer("bert", problem_type="multi_label_classification")
    refused("multi_label_classification", model=classifier, method="finetune", teacher=None)

    def training(rows: list[dict[str, Any]], collator: Any = collate) -> None:
        KDTrainer(student, args, teacher=teacher, method="kd", train_dataset=rows, data_collator=collator).train()

    with pytest.raises(ValueError, match="The collator gives position_ids, of which fastkd makes nothing"):
        training(text_rows(), lambda rows: {**collate(rows), "position_ids": torch.zeros(len(rows), WIDTH)})
    with pytest.raises(ValueError, match="The collator gives no labels, which KnowledgeDistillation reads"):
        training(text_rows(), lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"})
    with pytest.raises(ValueError, match="token_type_ids other than 0"):
        training(text_rows(), lambda rows: {**collate(rows), "token_type_ids": torch.ones(len(rows), WIDTH, dtype=torch.int64)})


def train_on_a_rank(rank: int, folder: str, expected: Tensor) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update({**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})  # accelerate asks, and takes the group that is there
    student, teacher = pair("gpt2")
    kept = Keep()
    args = arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = KDTrainer(student, args, teacher=teacher, method="kd", train_dataset=text_rows(), data_collator=collate, callbacks=[kept])
    trainer.train()
    assert trainer.args.world_size == 2 and isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert error(kept.gradients[0], expected) < 1e-5
    if rank == 0:
        (Path(folder) / "loss.json").write_text(json.dumps(trainer.state.log_history[0]["loss"]))
    assert error(gradients_under_fsdp(rank), expected) < 1e-5


def gradients_under_fsdp(rank: int) -> Tensor:
    """With accelerate's own FSDP2 wrapping, which it has for accelerators only; tied embeddings, so that the head's unit matters."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    student, teacher = pair("gpt2")
    objective = make_objective(student, teacher, "kd", {}).train()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu"), is_main_process=rank == 0
    )
    side = fsdp2_prepare_model(accelerator, TrainedSide(objective))
    whole, own = (own_batch(text_rows()[part], causal=True) for part in (slice(None), slice(rank, None, 2)))
    (2 * side(objective, own, objective.weight(whole))).backward()
    units = [module for module in side.modules() if isinstance(module, FSDPModule)]
    assert len(units) > len(student.transformer.h)
    return torch.cat([p.grad.full_tensor().flatten() for p in objective.parameters() if p.grad is not None])


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path):
    student, teacher = pair("gpt2")
    kept = Keep()
    trainer = KDTrainer(
        student, arguments(tmp_path), teacher=teacher, method="kd", train_dataset=text_rows(), data_collator=collate, callbacks=[kept]
    )
    trainer.train()
    ranks.spawn(train_on_a_rank, str(tmp_path), kept.gradients[0])
    assert json.loads((tmp_path / "loss.json").read_text()) == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-4)


def test_the_wrapped_modules_tensors_are_saved_as_the_students(tmp_path: Path):
    """What FSDP hands over when it saves."""
    student, teacher = pair("gpt2")
    trainer = KDTrainer(student, arguments(tmp_path), teacher=teacher, method="kd")
    changed = {name: tensor + 1 for name, tensor in trainer.model.state_dict().items()}  # type: ignore[union-attr]
    trainer._save(str(tmp_path / "model"), state_dict=changed)
    opened, loading = type(student).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    torch.testing.assert_close(opened.transformer.wte.weight, student.transformer.wte.weight + 1)
