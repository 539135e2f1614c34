"""Reading what may be of anybody, and sealed folders: every damage is noticed, and what is not listed stays."""

import errno
import hashlib
import os

import pytest

from fastkd import sealed as sealed_module
from fastkd.sealed import (
    MANIFEST_FILE,
    Damaged,
    content_sha256,
    file_sha256,
    read_json,
    read_manifest,
    remove_sealed,
    retried,
    seal,
    verify,
)
from fastkd.store import new_folder
from tests.test_store import contents, names

# ---- reading


@pytest.mark.parametrize(("content", "fault"), [("", "is empty"), ("{", "is not JSON"), ("[]", "no JSON object"), ("{}", "lacks step")])
def test_json_that_is_none_is_refused_by_its_name(tmp_path, content, fault):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(Damaged, match=rf"state\.json.* {fault}|state\.json {fault}"):
        read_json(tmp_path / "state.json", "step")


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (file_sha256, read_json):
        with pytest.raises(OSError, match="no regular file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize(("times", "outcome"), [(3, "read"), (99, "refused")])
def test_a_passing_error_is_retried_with_a_limit(monkeypatch, times, outcome):
    monkeypatch.setattr("time.sleep", lambda _: None)
    tries = []

    def read():
        tries.append(1)
        if len(tries) <= times:
            raise OSError(errno.ESTALE, "Stale file handle")
        return "read"

    if outcome == "read":
        assert retried(read) == "read"
    else:
        with pytest.raises(OSError, match="Stale"):
            retried(read)
        assert len(tries) < 10


def test_a_lasting_error_is_not_retried():
    tries = []

    def read():
        tries.append(1)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        retried(read)
    assert len(tries) == 1


def test_hashes(tmp_path):
    (tmp_path / "data").write_bytes(b"abc" * 100_000)
    truth = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert file_sha256(tmp_path / "data") == content_sha256(tmp_path / "data") == truth


def test_a_content_is_known_anew_when_it_changed_behind_its_size_and_time(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"abc")
    before, found = content_sha256(path), path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_sha256(path) == hashlib.sha256(b"abd").hexdigest() != before


# ---- sealed folders


@pytest.fixture
def sealed(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"22")
        seal(folder, {"kind": "test"})
    return tmp_path / "made"


def test_a_sealed_folder_verifies(sealed):
    manifest = verify(sealed)
    assert manifest["kind"] == "test" and manifest["files"]["sub/b"] == {"size": 2, "sha256": hashlib.sha256(b"22").hexdigest()}


@pytest.mark.parametrize("file", ["a", "sub/b", MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_every_damage_is_noticed(sealed, file, damage):
    path = sealed / file
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises((Damaged, FileNotFoundError), match=file if file != MANIFEST_FILE else "MANIFEST"):
        verify(sealed)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside", "..", ""])
def test_a_manifest_that_reaches_outside_is_refused(sealed, name):
    (sealed.parent / "outside").write_text("foreign")
    manifest = {**read_manifest(sealed), "files": {name: {"size": 7, "sha256": "0" * 64}}}
    del manifest["sha256"]
    (sealed / MANIFEST_FILE).write_bytes(sealed_module._sealed(manifest))
    for act in (verify, remove_sealed):
        with pytest.raises(Damaged, match="does not lie in its folder"):
            act(sealed)
    assert (sealed.parent / "outside").read_text() == "foreign"


@pytest.mark.parametrize("content", ["{}", "null", "[]", '{"files": []}', '{"files": {"a": 1}}', "[" * 100_000])
def test_a_manifest_of_another_shape_is_damaged(sealed, content):
    (sealed / MANIFEST_FILE).write_text(content)
    with pytest.raises(Damaged, match="MANIFEST"):
        read_manifest(sealed)


def test_a_pipe_among_the_files_does_not_hang(sealed):
    (sealed / "a").unlink()
    os.mkfifo(sealed / "a")
    with pytest.raises(OSError, match="no regular file"):
        verify(sealed)


def test_removing_leaves_nothing_of_ours(sealed):
    remove_sealed(sealed)
    assert names(sealed.parent) == []


def test_removing_leaves_everything_that_is_not_ours(sealed, tmp_path, caplog):
    (tmp_path / "victim").write_text("foreign")
    (sealed / "notes").write_text("foreign")
    (sealed / "link").symlink_to(tmp_path / "victim")
    (sealed / "sub" / "photo").write_text("foreign")
    (sealed / "empty").mkdir()
    (sealed / "a").write_bytes(b"edited")  # listed, with another size
    remove_sealed(sealed)
    assert contents(tmp_path) == {
        "victim": b"foreign",
        "made/notes": b"foreign",
        "made/link": b"foreign",
        "made/sub/photo": b"foreign",
        "made/a": b"edited",
    }
    assert (sealed / "link").is_symlink() and (sealed / "empty").is_dir() and "notes" in caplog.text


def test_removing_never_follows_a_link(sealed, tmp_path):
    (tmp_path / "link").symlink_to("made")
    before = contents(sealed)
    remove_sealed(tmp_path / "link")
    assert contents(sealed) == before and (tmp_path / "link").is_symlink()


def test_a_removal_that_is_killed_leaves_no_part_that_looks_whole(sealed, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_sealed(sealed)
    assert [name.startswith(".made.tmp-") for name in names(sealed.parent)] == [True]
