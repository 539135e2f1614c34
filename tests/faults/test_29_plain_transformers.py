"""Fault 29: the student is opened by plain transformers, in a process that never imports fastkd.

Every tensor has the bits that training left in it, and nothing of the method (filters, projections) is there.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import fastkd
from fastkd.cli.main import main
from fastkd.train.checkpoint import list_checkpoints, load_checkpoint
from tests.faults.disturbed import config

READ = """
import hashlib, json, sys
import transformers

def digests(folder, kind):
    model = getattr(transformers, kind).from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
    return {name: hashlib.sha256(p.detach().contiguous().numpy().tobytes()).hexdigest() for name, p in model.named_parameters()}

found = {folder: digests(folder, kind) for folder, kind in json.loads(sys.argv[1]).items()}
assert not any(name.split(".")[0] == "fastkd" for name in sys.modules)
print(json.dumps(found))
"""


def trained(stage: Path) -> dict[str, str]:
    """What training left, by the last checkpoint: the hash of every parameter, under the name that the saved model has for it."""
    tensors, _ = load_checkpoint(list_checkpoints(stage)[0])
    kept = tensors["best"] if "best" in tensors else tensors["model"]
    return {name.removeprefix("model."): hashlib.sha256(kept[name].numpy().tobytes()).hexdigest() for name in kept}


def test_every_parameter_is_the_trained_one(tmp_path):
    expected, kinds = {}, {}
    for method, stage in (("glmd", "task_scores"), ("ted", "distill"), ("crild", "ild")):
        (tmp_path / method).mkdir()
        folder = fastkd.distill(config(method, tmp_path / method, max_steps=2))[stage]["student_dir"]
        parameters = trained(tmp_path / method / "run" / stage)
        if method == "glmd":  # its vocabulary is pruned: the export has a tokenizer of its own
            exported = str(tmp_path / "exported")
            assert main(["export", folder, "--output_dir", exported]) == 0
            folder = exported
        expected[folder] = parameters
        kinds[folder] = "AutoModelForMaskedLM" if method == "glmd" else "AutoModelForSequenceClassification"
    done = subprocess.run([sys.executable, "-c", READ, json.dumps(kinds)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, parameters in expected.items():
        assert len(found[folder]) > 20 and found[folder] == parameters
