"""`fastkd doctor` as people call it: what it shows and writes, its exit codes, and that it needs neither weights nor a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli.main import main
from fastkd.models.language_model import LanguageModel
from fastkd.models.truncate import keep_layers
from fastkd.ops import backend_torch
from fastkd.ops.plan import plan_chunks
from fastkd.ops.row_call import RowCall
from fastkd.train import doctor
from tests import tiny

SMALL = ["--vocabulary", "301", "--student_hidden", "24", "--teacher_hidden", "32", "--tokens", "16"]


@pytest.fixture(autouse=True)
def _no_network_and_short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the doctor asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.bert(num_hidden_layers=4).config.save_pretrained(folder)
    return folder


def test_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *SMALL, "--dtype", "bfloat16", "--temperature", "4", "--json", str(tmp_path / "seen.json")]) == 0
    shown = capsys.readouterr().out
    assert "Healthy." in shown and "FAILED" not in shown and "training step" not in shown
    assert f"torch          {torch.__version__}" in shown and "torch    live" in shown
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["healthy"] and seen["machine"]["torch"] == torch.__version__ and seen["backends"]["torch"] == ""
    assert seen["tolerances"] == {"value": 1e-4, "gradient": 5e-3}
    assert (seen["problem"]["vocabulary"], seen["problem"]["dtype"], seen["problem"]["temperature"]) == (301, "bfloat16", 4.0)
    for check in seen["checks"]:
        assert check["passed"] and f"{check['op']}" in shown
        assert 0 < check["errors"]["value"] <= 1e-4 and len(check["errors"]) >= 2
        assert all(f"{name} {error:.1e}" in shown for name, error in check["errors"].items() if name != "value")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_gradient_that_is_off_is_marked_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = backend_torch.run

    def wrong(call: RowCall) -> None:
        right(call)
        if call.gradient is not None:
            call.gradient.mul_(factor)

    monkeypatch.setattr(backend_torch, "run", wrong)
    assert main(["doctor", *SMALL, "--json", str(tmp_path / "seen.json")]) == 1
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.split()[:2] == ["kl_div", "torch"]]
    assert "FAILED" in line and line.endswith("(!)") and line.count("(!)") == 1
    assert "Healthy" not in shown and "A check FAILED" in shown
    seen = json.loads((tmp_path / "seen.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (check,) = [check for check in seen["checks"] if (check["op"], check["backend"]) == ("kl_div", "torch")]
    assert not seen["healthy"] and not check["passed"] and check["wrong"] == ["student_logits"]
    assert check["errors"]["student_logits"] == (pytest.approx(0.01, rel=0.01) if factor == 1.01 else None)


def test_a_pair_is_counted_and_timed_without_weights(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--teacher", str(bert), "--student_layers", "every:2", "--batch_size", "3", "--length", "20"]
    assert main(["doctor", *SMALL, *pair, "--json", str(tmp_path / "seen.json")]) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())["pair"]
    teacher = tiny.bert(num_hidden_layers=4)
    student = keep_layers(teacher, "every:2")
    trained = sum(p.numel() for p in student.parameters()) * 4
    of_teacher = [*teacher.parameters(), *teacher.buffers()]
    assert list(seen["memory"]["certain"].values()) == [
        trained,
        sum(b.numel() * b.element_size() for b in student.buffers()),
        sum(t.numel() * t.element_size() for t in of_teacher),
        trained,
        2 * trained,
    ]
    assert list(seen["memory"]["rough"].values()) == [0, plan_chunks(60, 600).buffer_bytes, 17 * 2 * 60 * 32 * 4]
    assert seen["total"] == sum(seen["memory"]["certain"].values()) + sum(seen["memory"]["rough"].values())
    assert seen["head_rate"] > 0 and seen["step_rate"] > 0 and 1 <= seen["step_rows"] <= 3
    shown = capsys.readouterr().out
    assert "A training step fits into" in shown and f"{seen['step_rate']:.0f} tokens/s, on {seen['step_rows']} rows." in shown


def test_what_does_not_fit_is_not_measured(bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device_memory", lambda device: 1 << 16)
    monkeypatch.setattr(doctor, "_whole_step", lambda *_: pytest.fail("it was run"))
    assert main(["doctor", *SMALL, "--teacher", str(bert), "--batch_size", "2", "--length", "8"]) == 0
    shown = capsys.readouterr().out
    assert "does NOT fit into the" in shown and "without the optimizer: not measured." in shown


def test_a_step_is_a_training_step(bert: Path) -> None:
    """The loss at the head, through both models, leaves gradients in the student: timed is what is trained."""
    pair = doctor.Pair(
        teacher=str(bert), student=str(bert), student_layers="first:1", batch_size=2, length=8, dtype="bfloat16", temperature=2.0
    )
    gradients: list[float] = []

    def keep(student: LanguageModel) -> None:
        gradients.extend(float(p.grad.norm()) for p in student.parameters() if p.grad is not None)

    original = LanguageModel.zero_grad
    try:
        LanguageModel.zero_grad = keep  # type: ignore[method-assign,assignment]
        doctor._whole_step(pair, torch.device("cpu"))(2)
    finally:
        LanguageModel.zero_grad = original  # type: ignore[method-assign]
    assert len(gradients) > 15 and sum(g > 0 for g in gradients) > 15


def test_a_hub_model_that_is_on_the_machine(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "snapshots" / "0123" / "config.json").write_bytes((bert / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["doctor", *SMALL, "--teacher", "org/tiny", "--batch_size", "1", "--length", "8"]) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vocabulary", "3"], "vocabulary is 3; the ops are checked from 8 on."),
        (["--temperature", "0"], "temperature is 0.0; it must be a "),
        (["--student", "org/student"], "name its --teacher too."),
        (["--teacher", "org/nobody-has-this"], "org/nobody-has-this is no folder, and no hub model that is on this machine"),
        (["--teacher", "BERT", "--student_layers", "first:9"], 'use "first:N" or "every:N" with N from 1 to 4'),
        (["--teacher", "BERT", "--length", "1024"], "takes 1024 positions and the student has 128; lower --length."),
        (["--teacher", "BERT", "--batch_size", "0"], "batch_size is 0; it must be at least 1."),
        (["--json", "/no/such/folder/seen.json"], "there is no folder /no/such/folder; make it first."),
    ],
)
def test_bad_input_is_one_sentence_and_code_2_before_any_check(
    bert: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert main(["doctor", *SMALL, *(str(bert) if flag == "BERT" else flag for flag in flags)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fastkd doctor: ") and sentence in shown.err and "Traceback" not in shown.err
    assert shown.out == ""
