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
from fastkd.kernels import rows, topk
from fastkd.kernels.sass import Loop

COMPILE = """
import json
from fastkd.kernels import compile as ahead
chosen = [ahead.row_variant("forward_kl"), ahead.row_variant("jsd"), ahead.row_variant("forward_kl", student="bf16")]
chosen += [ahead.row_variant("none", labels=True, gradient="fp32", aligned=False), ahead.topk_variant("bucket")]
report = {}
for variant in chosen:
    for architecture in ahead.ARCHITECTURES if variant is chosen[0] else (90,):
        compiled = variant.compile(architecture)
        instructions, faults = ahead.count(variant, compiled.asm["cubin"])
        took = vars(ahead.resources(compiled.asm["cubin"])) | {"instructions": instructions, "faults": faults}
        report[f"{variant.name} sm_{architecture}"] = {"ttir": compiled.asm["ttir"], "ttgir": compiled.asm["ttgir"], **took}
print(json.dumps(report))
"""

# Triton's own launch path up to the driver, which is not there; nothing is compiled.
SPECIALIZE = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastkd.kernels import rows, topk

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
keys = set()
triton.knobs.runtime.jit_cache_hook = lambda **asked: bool(keys.add(asked["key"])) or True

def block(count, vocabulary, padding, dtype):
    return torch.empty(count, vocabulary + padding, dtype=dtype)[:, :vocabulary]

def launch(kernel, count, vocabulary, padding, begin, dtype, bias):
    part, vectors = slice(begin, begin + count), torch.empty(9, begin + count)
    student, teacher = (block(count, vocabulary, padding, dtype) for _ in range(2))
    gradient = block(count, vocabulary, padding, torch.bfloat16)
    shared = {"row_weight": vectors[0][part], "divergence": vectors[1][part], "cross_entropy": vectors[2][part], "gradient": gradient}
    shared |= {"labels": torch.empty(begin + count, dtype=torch.int64)[part], "label_weight": vectors[3][part]}
    shared |= {"student_bias": torch.empty(vocabulary)} if bias else {}
    if kernel == "rows":
        statistics = dict(zip(("student_entropy", "teacher_entropy", "top1_agreement", "acceptance"), vectors[4:8, part]))
        rows.softmax_divergence(student, teacher, kind="forward_kl", temperature=1.0 + begin, **shared, **statistics)
    else:
        ids, log_p = torch.empty(count, 9 + begin % 7, dtype=torch.int64), torch.empty(9 + begin % 7, count).T
        topk.topk_divergence(student, ids, log_p, vectors[8][part], kind="forward_kl", tail="bucket", temperature=1.0 + begin, **shared)

report = {}
for kernel in ("rows", "topk"):
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (False, True):
            for name, shapes in (("aligned", [(128256, 0), (30522, 6), (50257, 15), (1, 7), (16, 16)]), ("odd", [(50257, 0), (15, 0)])):
                keys.clear()
                for vocabulary, padding in shapes:
                    for count, begin in ((1, 0), (16, 0), (251, 251), (32, 753), (1, 3)):
                        # A block of one row has no stride to speak of.
                        launch(kernel, max(count, 2), vocabulary, padding, begin, dtype, bias)
                report[f"{kernel} {dtype} bias={bias} {name}"] = len(keys)
print(json.dumps(report))
"""


def process(program: str, folder) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return process(COMPILE, tmp_path_factory.mktemp("triton"))


def test_nothing_spills(report):
    assert len(report) == 7
    for name, took in report.items():
        assert took["spills"] == 0 and 0 < took["registers"] <= 128, name


def test_three_rows_of_a_bare_divergence_share_a_multiprocessor(report):
    assert report["rows forward_kl fp32>bf16 sm_90"]["registers"] * 32 * rows.WARPS * 3 <= 65536


def test_main_loops_load_16_bytes_at_once_and_hold_no_barrier(report):
    for name, took in report.items():
        assert took["faults"] == [] and took["instructions"] > 0, name


def test_few_instructions_an_element(report):
    """Counted now, as in the committed table: 8192 rows of 128256 tokens then take as long as their bytes."""
    table = json.loads(ahead.TABLE.read_text())
    for name, most in (("rows forward_kl fp32>bf16", 40), ("rows jsd fp32>bf16", 100)):
        assert report[f"{name} sm_90"]["instructions"] <= table[name]["sm_90"] <= most


def test_no_value_goes_through_shared_memory_between_its_load_and_its_store(report):
    """A change of layout would cost a barrier a block."""
    for name, took in report.items():
        assert "convert_layout" not in took["ttgir"], name


def test_rows_are_addressed_in_64_bits(report):
    """Row times stride passes 2^31 where a chunk holds more logits than that; a product in 32 bits would wrap."""
    begin = re.compile(r"tt\.addptr %(?:student|teacher|gradient|log_probabilities), %\w+ (?:\{.*\} )?: !tt\.ptr<\w+>, (\w+)")
    for name, took in report.items():
        starts = begin.findall(took["ttir"])
        assert len(starts) >= 2 and set(starts) == {"i64"}, name
        for block in ("student", "gradient"):
            assert re.search(rf"arith\.muli %\w+, %{block}_stride : i64", took["ttir"]), name


def test_the_last_store_is_ordered_behind_the_others(report):
    """The interpreter knows no warps: only the compiled code shows the barrier before the entries that are written twice."""
    for name, took in report.items():
        assert re.search(r"barrier(?:(?!scf\.|tt\.store).*\n)*.*tt\.store .*\n\s+tt\.return", took["ttir"]), name


def test_one_compilation_whatever_the_sizes_and_parts_are(tmp_path):
    """Vocabularies, numbers of rows, temperatures and where a part of the vectors begins choose nothing; aligned rows do."""
    report = process(SPECIALIZE, tmp_path)
    assert len(report) == 16 and set(report.values()) == {1}, report


def test_every_kind_and_tail_is_compiled_for_every_architecture():
    found = [(variant.name, architecture) for variant, architecture in ahead.variants()]
    assert len(found) == len(set(found))
    for kernel, names in (("rows", rows.KINDS), ("topk", topk.TAILS)):
        assert {name.split()[1] for name, _ in found if name.startswith(f"{kernel} ")} == set(names)
    for architecture in ahead.ARCHITECTURES:
        assert {name.split()[1] for name, where in found if name.startswith("rows ") and where == architecture} == set(rows.KINDS)
    table = json.loads(ahead.TABLE.read_text())
    counted = [(variant.name, f"sm_{architecture}") for variant, architecture in ahead.variants() if variant.element_bytes]
    known = [(name, architecture) for name, row in table.items() for architecture in row]
    assert sorted(counted) == sorted((name, architecture) for name, architecture in known if architecture != "sm_90a")


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Run the command on one variant, whose numbers are made up; return what it returns."""
    variant, table = ahead.row_variant("forward_kl"), tmp_path / "counts.json"
    fake = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=64))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ahead, "TABLE", table)
    monkeypatch.setattr(ahead.nvcc, "find", lambda: None)
    monkeypatch.setattr(ahead.nvcc, "shipped", lambda: None)
    monkeypatch.setattr(ahead, "variants", lambda: iter([(variant, 90)]))
    monkeypatch.setattr(ahead.Variant, "compile", lambda self, architecture: fake)

    def run(*arguments: str, spills: int = 0, instructions: int = 560, load: int = 16, barriers: int = 0) -> int:
        monkeypatch.setattr(ahead, "resources", lambda cubin: ahead.Resources(64, 0, spills))
        monkeypatch.setattr(ahead.sass, "main_loops", lambda cubin: [Loop(instructions, (load,) * (128 // load), barriers)])
        return ahead.main([*arguments])

    run.table = table
    table.write_text(json.dumps({variant.name: {"sm_90": 35.0}}))
    return run


def test_the_table_holds_instructions_an_element(make, capsys):
    make.table.unlink()
    assert make("--write") == 0
    assert json.loads(make.table.read_text()) == {"rows forward_kl fp32>bf16": {"sm_90": 35.0}}
    assert make() == 0
    said = capsys.readouterr()
    assert re.search(r"^rows forward_kl fp32>bf16 +sm_90 +8 +64 +64 +0 +35\.0$", said.out, re.MULTILINE) and not said.err
    assert "nvcc was not found" in said.out


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"spills": 8}, "rows forward_kl fp32>bf16 on sm_90 spills 8 bytes"),
        ({"instructions": 576}, "rows forward_kl fp32>bf16 on sm_90 takes 36.0 instructions an element, 35.0 before"),
        ({"barriers": 2}, "a main loop holds 2 barriers"),
        ({"load": 4}, "a main loop loads 4 bytes at once; 16 are possible"),
    ],
)
def test_what_got_worse_fails_the_command(make, capsys, numbers, words):
    assert make(**numbers) == 1
    assert words in capsys.readouterr().err
    if "instructions" not in numbers:
        assert make("--write", **numbers) == 1
    assert json.loads(make.table.read_text()) == {"rows forward_kl fp32>bf16": {"sm_90": 35.0}}


def test_fewer_instructions_pass_and_a_variant_that_is_not_in_the_table_fails(make, capsys):
    assert make(instructions=544) == 0
    make.table.write_text("{}")
    assert make() == 1
    assert "is not in counts.json; add it with --write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spills", "instructions", "words"),
    [(0, 79.5, ""), (8, 79.5, "cuda rows_jsd spills 8 bytes"), (0, 80.0, "cuda rows_jsd on sm_90a takes 80.0 instructions")],
)
def test_the_cuda_kernels_are_in_the_table(make, monkeypatch, capsys, spills, instructions, words):
    table = json.loads(make.table.read_text()) | {"cuda rows_jsd": {"sm_90a": 79.5}}
    make.table.write_text(json.dumps(table))
    monkeypatch.setattr(ahead.nvcc, "find", lambda: "nvcc")
    monkeypatch.setattr(ahead.nvcc, "build", lambda: b"")
    monkeypatch.setattr(ahead, "cuda_kernels", lambda code: {"cuda rows_jsd": (ahead.Resources(64, 1536, spills), instructions)})
    assert make() == (1 if words else 0)
    said = capsys.readouterr()
    assert words in said.err
    assert re.search(rf"cuda rows_jsd +sm_90a +16 +64 +1536 +{spills} +{instructions}$", said.out, re.MULTILINE)


def test_the_interpreter_cannot_compile(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ahead.main([]) == 2
    assert "unset it" in capsys.readouterr().err
