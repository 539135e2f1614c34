"""What every test stands on: the interpreter of Triton where there is no GPU, and an interrupt that interrupts."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and what it starts, begin with it ignored


@pytest.fixture
def events(monkeypatch):
    """The base names that are synced, and the renames between them, in order."""
    events, by_descriptor = [], {}
    real_open, real_fsync, real_rename, real_replace = os.open, os.fsync, os.rename, os.replace

    def recording_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        by_descriptor[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(by_descriptor[fd]), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b)))
    return events
