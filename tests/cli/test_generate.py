"""`fastkd generate` as people call it: what a decoder says in whatever vocabulary, and what it is not asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.cli.main import main
from fastkd.models.load import load_frozen, load_tokenizer
from tests import runs

PROMPT = "for key in "


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder on half of its teacher's ids."""
    folder = tmp_path_factory.mktemp("decoder")
    config = runs.settings(
        folder,
        teacher_model_name_or_path=runs.llama_teacher(folder),
        text=runs.write_text(folder),
        vocabulary={"keep": 0.5, "multiple_of": 8},
    )
    made: str = fastkd.distill(config)["pretrain"]["student_dir"]
    return made


def likeliest(folder: str, count: int, prompt: str = PROMPT) -> tuple[list[int], str]:
    """The ids that greedy decoding takes by whole forward passes, without transformers' `generate`, and prompt and text."""
    model, tokenizer = load_frozen(folder), load_tokenizer(folder)
    given = ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model.to_ids(model(ids)[:, -1:].argmax(-1))], 1)
    new = ids[0, given.shape[1] :].tolist()
    return new, prompt + tokenizer.decode(new)


def test_a_student_on_a_kept_vocabulary_says_its_teachers_ids(student: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids, text = likeliest(student, 12)
    model = load_frozen(student)
    assert model.vocab_map is not None and (model.vocab_map.kept_ids != torch.arange(model.vocabulary)).any()
    assert not model.vocab_map.is_kept[load_tokenizer(student)(PROMPT).input_ids].all(), "the prompt is to have a dropped token"
    assert max(ids) >= model.vocabulary, "slots would be in range"
    assert main(["generate", student, PROMPT, "--max_new_tokens", "12"]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_plain_decoder_and_an_exported_student(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = str(tmp_path / "exported")
    assert main(["export", student, "--output_dir", exported]) == 0
    for folder in (exported, runs.llama_teacher(tmp_path)):
        capsys.readouterr()
        assert main(["generate", folder, PROMPT, "--max_new_tokens", "9"]) == 0
        assert capsys.readouterr().out == likeliest(folder, 9)[1] + "\n"


def test_the_text_ends_where_the_model_ends_it(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, _ = likeliest(student, 12)
    last = next(number for number, id in enumerate(ids) if id not in ids[:number] and number > 0)
    file = Path(student) / "generation_config.json"
    before = file.read_text()
    slot = int(load_frozen(student).to_slots(torch.tensor(ids[last])))
    try:
        file.write_text(json.dumps({"eos_token_id": slot, "pad_token_id": slot}))
        assert main(["generate", student, PROMPT, "--max_new_tokens", "12"]) == 0
    finally:
        file.write_text(before)
    assert capsys.readouterr().out == likeliest(student, last + 1)[1] + "\n"


def test_a_sample_is_that_of_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves the process's own random numbers alone."""
    folder, said = runs.llama_teacher(tmp_path), []
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for seed in ("0", "0", "1"):
        assert main(["generate", folder, PROMPT, "--temperature", "1.5", "--seed", seed, "--max_new_tokens", "12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and all(text.startswith(PROMPT) for text in said)
    assert torch.equal(torch.rand(1), expected)


def test_words_are_shown_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.models.generation import continue_text

    shown: list[str] = []
    continue_text(runs.llama_teacher(tmp_path), PROMPT, shown.append, max_new_tokens=12)
    assert "".join(shown).startswith(PROMPT) and sum(map(bool, shown)) > 2


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        (runs.bert_teacher, [PROMPT], "is an encoder, which fills in masked tokens and continues no text; give a decoder."),
        (runs.bert_classifier, [PROMPT], "which has no trained head for words. Give a masked or causal language model."),
        (runs.llama_teacher, [""], "The prompt has no token to begin with; give some text."),
        (runs.llama_teacher, [PROMPT, "--temperature", "-0.5"], "temperature is -0.5; it must be a finite number >= 0"),
        (runs.llama_teacher, [PROMPT, "--temperature", "nan"], "temperature is nan; it must be a finite number >= 0"),
        (runs.llama_teacher, [PROMPT, "--max_new_tokens", "0"], "'0' is no whole number from 1 to 2147483647"),
        (
            runs.llama_teacher,
            [PROMPT, "--max_new_tokens", "999"],
            "and the model has 256; lower --max_new_tokens, or shorten the prompt.",
        ),
        (lambda _: "/no/where", [PROMPT], "/no/where does not exist"),
        (str, [PROMPT], "holds no config.json"),
        (lambda _: "", [PROMPT], "names nothing"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence_and_code_2(model, flags, sentence, tmp_path, capsys):
    assert main(["generate", model(tmp_path), *flags]) == 2
    shown = capsys.readouterr()
    (told,) = [line for line in shown.err.splitlines() if not line.startswith(("Writing", "Loading")) and line]
    assert told.startswith("fastkd generate: ") and sentence in told and shown.out == ""
