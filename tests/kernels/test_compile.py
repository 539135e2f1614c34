"""Ahead-of-time compilation. A process of its own compiles, since this one has the interpreter in the compiler's place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastkd.kernels import compile as ahead
from fastkd.kernels import rows

PROGRAM = """
import json
from fastkd.kernels import compile as ahead
chosen = [ahead.row_variant("forward_kl"), ahead.row_variant("jsd", label_weight=True, softcap=True, stats=True)]
chosen += [ahead.row_variant("forward_kl", gradient="bf16"), ahead.row_variant("jsd", gradient="bf16", aligned=False)]
chosen += [ahead.gather_variant(True, "bf16"), ahead.gather_variant(False, "fp32")]
report = {}
for variant in chosen:
    for architecture in ahead.ARCHITECTURES if variant is chosen[0] else (90,):
        compiled = variant.compile(architecture)
        took = vars(ahead.resources(compiled.asm["cubin"]))
        report[f"{variant.name} sm_{architecture}"] = {"ttir": compiled.asm["ttir"], "ptx": compiled.asm["ptx"], **took}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_spills(report):
    assert len(report) == 8
    for name, took in report.items():
        assert took["spills"] == 0 and 0 < took["registers"] <= 128, name


def test_two_rows_of_the_bare_divergence_share_a_multiprocessor(report):
    assert report["rows forward_kl fp32 sm_90"]["registers"] * 32 * rows.WARPS * 2 <= 65536


def test_rows_are_addressed_in_64_bits(report):
    """Row times stride passes 2^31 where a chunk holds more logits than that; a product in 32 bits would wrap."""
    for name, took in report.items():
        wide = re.findall(r"arith\.extsi %\w+ : i32 to i64", took["ttir"])
        starts = re.findall(r"tt\.addptr %(?:student|teacher|gradient|source)\w*, %\w+ : !tt\.ptr<\w+>, (\w+)", took["ttir"])
        assert wide and starts and set(starts) == {"i64"}, name
        products = re.findall(r"%(\w+) = arith\.muli .* : i64", took["ttir"])
        assert products, name


def test_warps_wait_before_a_narrow_gradient_is_stored_over_the_logits(report):
    """The interpreter knows no warps: only the compiled code shows the barrier between a block's loads and its store."""
    narrow = [took for name, took in report.items() if "bf16 gradient" in name]
    assert len(narrow) == 2
    for took in narrow:
        barrier = re.search(r"barrier(?:.*\n)*?.*tt\.store %\w+, %\w+, %\w+ : tensor<\d+x!tt\.ptr<bf16>>", took["ttir"])
        assert barrier is not None and "tt.load" not in barrier[0]
        before, _, _ = re.split(r"st\.global(?:\.v\d)?\.b(?:16|32)[^;]*;", took["ptx"])[0].rpartition("bar.sync")
        assert "ld.global" in before


def test_every_kind_is_compiled():
    names = [variant.name for variant in ahead.variants()]
    assert len(names) == len(set(names))
    assert {name.split()[1] for name in names if name.startswith("rows ")} == set(rows.KINDS)


def test_a_spill_fails_the_command(monkeypatch, capsys):
    fake = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=64))
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(ahead.nvcc, "find", lambda: None)
    monkeypatch.setattr(ahead.Variant, "compile", lambda self, architecture: fake)
    monkeypatch.setattr(ahead, "resources", lambda cubin: ahead.Resources(64, 0, 0))
    assert ahead.main() == 0
    monkeypatch.setattr(ahead, "resources", lambda cubin: ahead.Resources(64, 0, 8))
    assert ahead.main() == 1
    said = capsys.readouterr()
    assert "rows forward_kl fp32 " in said.out and "spill" in said.err
    assert "nvcc was not found" in said.out


@pytest.mark.parametrize("spills", [0, 8])
def test_the_cuda_kernel_is_in_the_table(monkeypatch, capsys, spills):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(ahead, "variants", lambda: iter(()))
    monkeypatch.setattr(ahead.nvcc, "find", lambda: "nvcc")
    monkeypatch.setattr(ahead.nvcc, "build", lambda: b"")
    monkeypatch.setattr(ahead, "cuda_resources", lambda library: {"cuda rows jsd fp32": ahead.Resources(64, 1536, spills)})
    assert ahead.main() == (1 if spills else 0)
    assert re.search(rf"cuda rows jsd fp32 +sm_90a +16 +64 +1536 +{spills}$", capsys.readouterr().out, re.MULTILINE)


def test_the_interpreter_cannot_compile(capsys):
    assert ahead.main() == 2
    assert "unset it" in capsys.readouterr().err
