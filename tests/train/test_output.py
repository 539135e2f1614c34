"""The output folder: locked, tied to one run by its record, and cleared of what killed processes of that run left."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from fastkd.sealed import seal, verify
from fastkd.store import new_folder
from fastkd.train.checkpoint import list_checkpoints, newest_checkpoint, save_checkpoint
from fastkd.train.output import LOCK_FILE, RUN_FILE, check_results, differences, prepare_output_dir
from tests.test_store import contents, names, of_a_dead_process

SETTINGS = {"method": "kd", "seed": 1}
STAGE = {"settings": {"learning_rate": 0.1, "betas": (0.9, 0.98)}, "rows": {"train": "a" * 64}}


def claim(output_dir, settings=SETTINGS, overwrite=False, **stages):
    with prepare_output_dir(output_dir) as folder:
        folder.claim(settings, stages or {"train": STAGE}, overwrite=overwrite)
        return folder


def begin(output_dir, stage="train", identity=STAGE, step=1):
    """What a stage has made by its first checkpoint."""
    folder = claim(output_dir, **{stage: identity})
    (output_dir / stage).mkdir(exist_ok=True)
    (output_dir / stage / "log.jsonl").write_text('{"step": 1}\n')
    save_checkpoint(output_dir / stage, step, {}, {}, identity=folder.digest(stage))
    return folder


def test_the_same_run_comes_back(tmp_path):
    run = tmp_path / "a" / "b"
    begin(run)
    before = contents(run)
    claim(run, overwrite=True)  # a restarted job loses nothing
    assert contents(run) == before


def test_another_run_is_refused_with_what_differs(tmp_path):
    begin(tmp_path)
    before = contents(tmp_path)
    other = {"settings": {"learning_rate": 0.2, "betas": (0.9, 0.98), "new": None}, "rows": {"train": "b" * 64}}
    with pytest.raises(ValueError, match=r"belongs to a run with other settings.*another output_dir.*overwrite_output_dir") as refusal:
        claim(tmp_path, {"method": "kd", "seed": 2}, train=other)
    message = str(refusal.value)
    for phrase in (
        "seed (1 there, 2 here)",
        "learning_rate (0.1 there, 0.2 here) in train",
        "rows.train (aaaaaaaaaaaa... there, bbbbbbbbbbbb... here) in train",
        "new ('absent' there, None here)",
    ):
        assert phrase in message
    assert "betas" not in message and "method" not in message and contents(tmp_path) == before


def test_a_stage_may_be_added_and_the_earlier_ones_stand(tmp_path):
    begin(tmp_path)
    begin(tmp_path, "distill", {"settings": {}})
    claim(tmp_path, train=STAGE, distill={"settings": {}})
    assert newest_checkpoint(tmp_path / "train") is not None


def test_label_words_may_be_added_and_not_taken_away():
    old = {"vocabulary": {"corpus": "c", "label_words": [1, 2]}}
    assert differences(old, {"vocabulary": {"corpus": "c", "label_words": [1, 2, 3]}}) == []
    assert differences(old, {"vocabulary": {"corpus": "c", "label_words": [1, 3]}}) == [
        "vocabulary.label_words (the ids [2] are not kept any more)"
    ]


def test_what_has_begun_keeps_the_identity_that_its_checkpoints_bear(tmp_path):
    old, new = ({"vocabulary": {"label_words": words}} for words in ([1], [1, 2]))
    digest = begin(tmp_path, identity=old).digest("train")
    assert claim(tmp_path, train=new).digest("train") == digest


@pytest.mark.parametrize("found", ["checkpoint-5/state.json", "log.jsonl", "student/config.json", "result.json", "loss.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_record_does_not_name_is_neither_adopted_nor_deleted(tmp_path, found, overwrite):
    """Also with overwrite_output_dir, which deletes what is recorded."""
    (tmp_path / "train" / found).parent.mkdir(parents=True)
    (tmp_path / "train" / found).write_text("foreign")
    with pytest.raises(ValueError, match=f"holds train/{found.split('/')[0]}, and run.json does not say that this run made it"):
        claim(tmp_path, overwrite=overwrite)
    assert (tmp_path / "train" / found).read_text() == "foreign"


def test_a_lost_record_stops_the_run(tmp_path):
    begin(tmp_path)
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(ValueError, match="holds train/checkpoint-1"):
        claim(tmp_path)
    assert newest_checkpoint(tmp_path / "train") is not None


@pytest.mark.parametrize(
    "content", ["", "{}", "null", "[]", "garbage", '{"fastkd": "1", "format": 2, "settings": {}, "stages": {"../x": {}}}']
)
def test_a_damaged_record_is_named(tmp_path, content):
    begin(tmp_path)
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"run\.json.*Put back a copy of it"):
        claim(tmp_path, overwrite=True)
    assert newest_checkpoint(tmp_path / "train") is not None


def test_a_record_of_an_earlier_fastkd_names_the_version_that_reads_it(tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps({"fingerprint": "f", "fastkd": "0.1.0", "run": {}}))
    with pytest.raises(ValueError, match=r"written by fastkd 0\.1\.0.*finish this one with that version"):
        claim(tmp_path)


def test_a_record_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_FILE).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="is a link"):
        claim(tmp_path / "run")
    assert (tmp_path / "elsewhere.json").read_text() == "{}"


# ---- overwriting


def test_overwriting_deletes_what_the_run_made_and_nothing_else(tmp_path):
    folder = begin(tmp_path)
    train = tmp_path / "train"
    with new_folder(train / "student") as student:
        (student / "model.safetensors").write_bytes(b"weights")
        seal(student, {"identity": folder.digest("train")})
    (train / "tensorboard").mkdir()
    (train / "tensorboard" / "events.out.tfevents.1").write_text("ours")
    foreign = ["notes.txt", "train/notes.txt", "photos/log.jsonl", "vocab_map/a"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("foreign")
    claim(tmp_path, {**SETTINGS, "seed": 2}, overwrite=True)
    assert sorted(name for name in contents(tmp_path) if name not in (RUN_FILE, LOCK_FILE)) == sorted(foreign)


@pytest.mark.parametrize("found", ["student/notes.txt", "checkpoint-1/notes.txt", "tensorboard/notes.txt", "checkpoint-9/a", "link"])
def test_where_not_all_can_be_overwritten_nothing_is(tmp_path, found):
    """What is deleted first could not be put back when the rest is refused."""
    folder = begin(tmp_path)
    with new_folder(tmp_path / "train" / "student") as student:
        seal(student, {"identity": folder.digest("train")})
    if found == "link":
        (tmp_path / "train" / "checkpoint-7").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "train" / found).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / found).write_text("foreign")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="deletes what is recorded there and nothing else"):
        claim(tmp_path, {**SETTINGS, "seed": 2}, overwrite=True)
    assert contents(tmp_path) == before
    claim(tmp_path)  # and the run that is there goes on


def test_overwriting_leaves_links_and_checkpoints_of_other_runs(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    save_checkpoint(tmp_path / "disk", 7, {}, {})
    os.rename(tmp_path / "disk" / "checkpoint-7", tmp_path / "run" / "train" / "checkpoint-7")  # put there by hand
    save_checkpoint(tmp_path / "disk", 8, {}, {})
    (tmp_path / "run" / "train" / "checkpoint-8").symlink_to(tmp_path / "disk" / "checkpoint-8")
    with pytest.raises(ValueError, match="holds train/checkpoint-7"):
        claim(tmp_path / "run", {**SETTINGS, "seed": 2}, overwrite=True)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "train")] == ["checkpoint-8", "checkpoint-7", "checkpoint-1"]
    verify(tmp_path / "disk" / "checkpoint-8")


def test_a_run_refused_before_its_first_step_leaves_the_folder_free(tmp_path):
    vocabulary = {"corpus": "c", "label_words": []}
    claim(tmp_path, train={**STAGE, "vocabulary": vocabulary})
    with new_folder(tmp_path / "vocab_map") as folder:
        seal(folder, {"vocabulary": vocabulary})  # chosen by the refused settings
    claim(tmp_path, {**SETTINGS, "seed": 2}, train={**STAGE, "vocabulary": {**vocabulary, "corpus": "d"}})
    assert names(tmp_path) == [LOCK_FILE, RUN_FILE]


def test_a_vocabulary_map_that_was_there_before_stays(tmp_path):
    with new_folder(tmp_path / "vocab_map") as folder:
        (folder / "vocab_map.json").write_text("foreign")
    before = contents(tmp_path)
    vocabulary = {"corpus": "c", "label_words": []}
    claim(tmp_path, train={**STAGE, "vocabulary": vocabulary})
    claim(tmp_path, {**SETTINGS, "seed": 2}, overwrite=True, train={**STAGE, "vocabulary": vocabulary})
    assert {name: content for name, content in contents(tmp_path).items() if name.startswith("vocab_map")} == before


# ---- what a finished stage has left


def test_a_finished_stage_has_its_result_and_what_it_made(tmp_path):
    folder = begin(tmp_path)
    folder.check_finished("train", "student")  # not finished yet
    with new_folder(tmp_path / "train" / "student") as student:
        (student / "model.safetensors").write_bytes(b"weights")
        seal(student, {"identity": folder.digest("train")})
    (tmp_path / "train" / "result.json").write_text(json.dumps({"identity": folder.digest("train")}))
    folder.check_finished("train", "student")
    (tmp_path / "train" / "student" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="Stage train is finished, and what it made is not there as it was"):
        folder.check_finished("train", "student")


def test_a_foreign_student_is_refused_before_the_stage_trains(tmp_path):
    folder = begin(tmp_path)
    (tmp_path / "train" / "student").mkdir()
    with pytest.raises(ValueError, match=r"student was not made by this run.*move it away"):
        folder.check_finished("train", "student")


# ---- the folder itself


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_the_folder_of_a_model_is_refused(tmp_path, file):
    """A vocabulary map beside a teacher's weights would be read as a part of it."""
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match="is the folder of a model"):
        prepare_output_dir(tmp_path)
    assert names(tmp_path) == [file]


def test_an_empty_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="output_dir is empty"):
        prepare_output_dir("")
    assert names(tmp_path) == []


def test_a_lock_is_exclusive_and_released(tmp_path):
    with prepare_output_dir(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
        prepare_output_dir(tmp_path)
    prepare_output_dir(tmp_path).close()


def test_a_linked_lock_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("foreign")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare_output_dir(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "foreign"


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written"):
            prepare_output_dir(path)


def test_a_stage_folder_that_is_another_runs_output_dir_is_refused(tmp_path):
    begin(tmp_path / "train")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is the output_dir of another run"):
        claim(tmp_path, overwrite=True)
    assert {name: content for name, content in contents(tmp_path).items() if name != LOCK_FILE} == before


def test_a_stage_on_another_disk_is_used_through_its_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train").symlink_to(tmp_path / "disk")
    begin(tmp_path / "run")
    claim(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "train") is not None


# ---- what killed processes leave


def test_only_leftovers_of_dead_processes_in_known_places_are_cleared(tmp_path):
    begin(tmp_path)
    ours = [of_a_dead_process(tmp_path / "run.json"), of_a_dead_process(tmp_path / "train" / "checkpoint-7")]
    stay = [
        tmp_path / "photos" / "IMG.tmp-1",
        of_a_dead_process(tmp_path / "photos" / "checkpoint-7"),
        of_a_dead_process(tmp_path / "exp"),  # an export that was killed: not this run's
        of_a_dead_process(tmp_path / "below" / "train" / "checkpoint-7"),
    ]
    for path in (*ours, *stay):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    (tmp_path / "l.tmp-1").symlink_to("nowhere")
    claim(tmp_path)
    assert not any(path.exists() for path in ours) and all(path.read_text() == "half" for path in stay)
    assert (tmp_path / "l.tmp-1").is_symlink()


def test_killed_while_saving(tmp_path):
    """SIGKILL between the manifest and the rename: the lock vanishes, the leftover is cleared, the older one is used."""
    writer = textwrap.dedent("""
        import os, sys, time, torch
        from fastkd.train.checkpoint import save_checkpoint
        from fastkd.train.output import prepare_output_dir
        folder = prepare_output_dir(sys.argv[1])
        folder.claim({}, {"train": {}})
        os.mkdir(sys.argv[1] + "/train")
        save_checkpoint(sys.argv[1] + "/train", 1, {"model": {"w": torch.ones(2)}}, {})
        os.rename = lambda *_: (print("saving", flush=True), time.sleep(60))
        save_checkpoint(sys.argv[1] + "/train", 2, {"model": {"w": torch.ones(2)}}, {})
    """)
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "saving\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
            prepare_output_dir(tmp_path)
        assert newest_checkpoint(tmp_path / "train") == tmp_path / "train" / "checkpoint-1"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (leftover,) = (tmp_path / "train").glob(f".checkpoint-2.tmp-{process.pid}-*")
    assert (leftover / "MANIFEST.json").exists()
    prepare_output_dir(tmp_path).close()
    assert names(tmp_path / "train") == ["checkpoint-1"]


# ---- results of other commands


@pytest.mark.parametrize("there", ["results.json", "scores.png"])
def test_results_of_something_else_are_not_replaced(tmp_path, there):
    (tmp_path / there).write_text("{}")
    with pytest.raises(FileExistsError, match=f"{there} is there, and was not made by an earlier run"):
        check_results(tmp_path, ("models",), ["scores.png"])


def test_results_of_an_earlier_call_are(tmp_path):
    check_results(tmp_path, ("models",), ["scores.png"])
    (tmp_path / "results.json").write_text('{"models": {"student": {}}}')
    (tmp_path / "scores.png").write_bytes(b"drawn")
    check_results(tmp_path, ("models",), ["scores.png"])
