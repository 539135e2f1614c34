"""The CUDA row kernel: on a Hopper GPU, and its mathematics on the host (cuda_host.cpp), against float64. Anywhere: what it refuses."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd import csrc
from fastkd.csrc import nvcc
from fastkd.ops import backend_cuda, backend_torch, compiled
from fastkd.ops.backends import sample_call
from fastkd.ops.compiled import kind_and_mixing, scale_and_softcap
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs
from tests.oracle import assert_close
from tests.row_kernels import CASES, DIVERGENCES, DTYPES, TOLERANCE, assert_outputs, check, make_logits, make_outputs, make_place

INFINITY = float("inf")
HERE = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = HERE.type == "cuda" and backend_cuda.why_not(sample_call(HERE)) is None
TAKEN = ("float32", "bfloat16")
PLACED = [case for case in CASES if case[0] in TAKEN and "float16" not in case[1].split()]
NARROW = [case for case in PLACED if case[1] != "none"]
SOURCE = Path(__file__).with_name("cuda_host.cpp")
VANISHING = 1.6e-6
"""L1 norm of what is left of a gradient that is zero: a student with one token left to it has none, whatever it is compared with."""
LABELS = {"labels": torch.tensor([16, -1, 60, 0, 7]), "label_weight": torch.tensor([0.3, 5.0, 1.0, 0.0, 2.0])}


@pytest.fixture(autouse=True)
def backend():
    """These tests name their kernel: once is enough."""


@pytest.fixture(scope="session")
def host_row(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    library = tmp_path_factory.mktemp("cuda_host") / "host.so"
    include = Path(csrc.__path__[0]) / "cuda"
    subprocess.run(["c++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).host_row
    function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 2, *[ctypes.c_double] * 8, ctypes.c_int64]
    function.argtypes += [ctypes.c_int] * 2
    return function


@pytest.fixture(params=["host, 1 block", "host, 4 blocks", "gpu"])
def kernel(request):
    """What is tested, for calls whose tensors are on the CPU."""
    if request.param != "gpu":
        return on_host(request.getfixturevalue("host_row"), cluster_size=int(request.param.split()[1]))
    if not ON_GPU:
        pytest.skip("no Hopper GPU")
    return on_gpu


def on_host(function, cluster_size: int):
    def kernel(call: RowCall) -> None:
        options, gradient = call.options, call.gradient
        for row in range(len(call.student)):
            s, t = call.student[row].float().contiguous(), call.teacher[row].float().contiguous()
            losses, result = torch.empty(5), torch.empty_like(s)
            function(
                s.data_ptr(),
                t.data_ptr(),
                None if gradient is None else result.data_ptr(),
                losses.data_ptr(),
                len(s),
                cluster_size,
                *kind_and_mixing(options.divergence),
                options.temperature,
                *scale_and_softcap(options.student),
                *scale_and_softcap(options.teacher),
                call.row_weight[row],
                0.0 if call.label_weight is None else call.label_weight[row],
                -1 if call.labels is None else call.labels[row],
                call.labels is not None,
                call.wants_statistics,
            )
            for column, value in zip(vars(call.outputs).values(), losses, strict=True):
                if column is not None:
                    column[row] = value
            if gradient is not None:
                gradient[row] = result

    return kernel


def on_gpu(call: RowCall) -> None:
    """The CUDA kernel on copies of the call's tensors, which share memory where they do, and are copied back."""
    storages: dict[int, tuple] = {}

    def moved(value):
        if isinstance(value, RowOutputs):
            return RowOutputs(**{name: moved(x) for name, x in vars(value).items()})
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        _, there = storages.setdefault(storage.data_ptr(), (storage, storage.cuda()))
        return torch.empty(0, dtype=value.dtype, device="cuda").set_(there, value.storage_offset(), value.shape, value.stride())

    backend_cuda.run(RowCall(**{name: moved(value) for name, value in vars(call).items()}))
    for here, there in storages.values():
        here.copy_(there)


def run(kernel, student, teacher, options, outputs, row_weight, gradient=None) -> None:
    kernel(RowCall(student=student, teacher=teacher, options=options, outputs=outputs, row_weight=row_weight, gradient=gradient))


@pytest.mark.parametrize(("dtype", "place"), PLACED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_dtype_and_place_of_the_gradient(kernel, divergence, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(4, 83))
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence)), place)


@pytest.mark.parametrize(("dtype", "place"), [("float32", "over it in bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(kernel, divergence, temperature, dtype, place):
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(5, 61))
    transforms = LogitTransform(1.5, 6.0), LogitTransform(-0.7, 30.0)
    check(
        kernel, student, teacher, RowOptions(Divergence.parse(divergence), temperature, *transforms), place, statistics=True, **LABELS
    )
    plain = RowOptions(Divergence.parse(divergence), temperature, LogitTransform(-0.4), LogitTransform(0.7))
    check(kernel, student, teacher, plain, place)
    check(kernel, student, teacher, plain, place, labels=LABELS["labels"])


@pytest.mark.parametrize("vocabulary", [7, 37, 1001, 30522, 128256])
@pytest.mark.parametrize(("dtype", "place"), [("float32", "in place"), ("float32", "over it in bfloat16"), ("bfloat16", "in place")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_width(request, divergence, dtype, place, vocabulary):
    """On the GPU with clusters of 1, 2, 4 and 8 blocks and rows whose beginnings are aligned, or not."""
    kernel = on_gpu if ON_GPU else on_host(request.getfixturevalue("host_row"), cluster_size=2)
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, vocabulary))
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence), 2.0), place, statistics=True)


@pytest.mark.parametrize(("dtype", "place"), NARROW)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one(kernel, divergence, dtype, place):
    """Nothing can differ: zero, up to the rounding of the logarithm of the mixing weight."""
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 1))
    rows_before, options = (student.clone(), teacher.clone()), RowOptions(Divergence.parse(divergence))
    gradient = make_place(student, place)
    losses = make_outputs(3, torch.float32, has_teacher=True, has_labels=False, statistics=False)
    run(kernel, student, teacher, options, losses, torch.ones(3), gradient)
    assert_outputs(losses, {"divergence": torch.zeros(3)}, *rows_before, options, torch.float32)
    assert gradient.abs().max() < 2e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [0.02, 5.0])
def test_near_and_far_students(kernel, divergence, noise):
    student, teacher = (x.float() for x in make_logits(3, 200, noise))
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_far_from_zero(kernel, divergence):
    """Multiples of 1/64 stay exact under the shift: only a maximum that is not subtracted would show."""
    student, teacher = ((x * 64).round().float() / 64 for x in make_logits(3, 50))
    check(kernel, student + 60, teacher - 1000, RowOptions(Divergence.parse(divergence), 2.0))


def compare(kernel, student: Tensor, teacher: Tensor, options: RowOptions, statistics: bool = True) -> None:
    """As `check`, for infinite logits, which the torch backend defines; infinite and undefined results must be the same."""
    results = []
    for backend_run, dtype in ((kernel, torch.float32), (backend_torch.run, torch.float64)):
        s, t, out = student.to(dtype, copy=True), teacher.to(dtype), make_outputs(len(student), dtype, True, False, statistics)
        run(backend_run, s, t, options, out, torch.linspace(0.5, 2.0, len(s)).to(dtype), s)
        results.append((s, out))
    (gradient, losses), (truth, expected) = results
    named = {name: value for name, value in vars(expected).items() if value is not None}
    assert_outputs(losses, named, student, teacher, options, torch.float32)
    finite = truth.isfinite()
    torch.testing.assert_close(gradient[~finite].double(), truth[~finite], equal_nan=True, msg=f"{gradient} is not {truth}")
    if not (gradient[finite] - truth[finite]).abs().sum() <= VANISHING:  # NaN is not
        assert_close(gradient[finite], truth[finite], TOLERANCE[torch.float32], "gradient")


@pytest.mark.parametrize("where", ["teacher", "student", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity(kernel, divergence, where):
    """Masked tokens: whole slices of them, the first and the last."""
    student, teacher = (x.float() for x in make_logits(2, 91))
    masked = torch.zeros(2, 91, dtype=torch.bool)
    masked[0, :70], masked[1, 3], masked[1, 14:63], masked[1, 90] = True, True, True, True
    teacher = teacher if where == "student" else teacher.masked_fill(masked, -INFINITY)
    student = student if where == "teacher" else student.masked_fill(masked, -INFINITY)
    compare(kernel, student, teacher, RowOptions(Divergence.parse(divergence), 2.0))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [float("nan"), INFINITY, "row of -inf"])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_undefined_shows(kernel, divergence, bad, side):
    blocks = [x.float() for x in make_logits(3, 40)]
    blocks[side][1] = -INFINITY if isinstance(bad, str) else blocks[side][1].index_fill(0, torch.tensor([37]), bad)
    out = make_outputs(3, torch.float32, True, False, False)
    run(kernel, *blocks, RowOptions(Divergence.parse(divergence)), out, torch.ones(3), blocks[0])
    assert out.divergence.isnan().tolist() == [False, True, False]
    assert blocks[0][1].isnan().all() and blocks[0][[0, 2]].isfinite().all()


def test_probabilities_that_underflow(kernel):
    """p and q below the smallest float32 of which a mixture in float32 would be 0."""
    student, teacher = torch.tensor([[0.0, -200.0, -150.0, -3.0]]), torch.tensor([[0.0, -150.0, -200.0, -90.0]])
    for divergence in DIVERGENCES:
        compare(kernel, student, teacher, RowOptions(Divergence.parse(divergence)))


def test_equal_probabilities_pull_neither_way_in_tvd(kernel):
    student, teacher = torch.tensor([[0.0, 1.0, 2.0, 2.5]]), torch.tensor([[1.0, 0.0, 2.0, 2.5]])
    q = student[0].softmax(-1)
    coefficient = 0.5 * q * torch.tensor([-1.0, 1.0, 0.0, 0.0])
    out = make_outputs(1, torch.float32, True, False, False)
    run(kernel, student, teacher, RowOptions(Divergence.parse("tvd")), out, torch.ones(1), student)
    assert_close(student[0], coefficient - q * coefficient.sum(), TOLERANCE[torch.float32])


def test_the_first_of_equal_logits_is_the_best(kernel):
    student, teacher = torch.zeros(2, 70), torch.zeros(2, 70)
    student[0, [21, 22, 60]], teacher[0, [21, 61]] = 2.0, 3.0
    student[1, [20, 60]], teacher[1, [21, 22]] = 2.0, 3.0
    out = make_outputs(2, torch.float32, True, False, True)
    run(kernel, student, teacher, RowOptions(), out, torch.ones(2))
    assert out.top1_agreement.tolist() == [1.0, 0.0]


@pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
def test_nothing_spills():
    ahead = pytest.importorskip("fastkd.kernels.compile")
    backend_cuda._library.get(build=True)
    (kept, *_) = compiled.cache_folder().glob(f"{backend_cuda._stem()}-*.so")
    table = ahead.cuda_resources(kept.read_bytes())
    assert len(table) == len(DIVERGENCES) * len(TAKEN) * 2
    for name, took in table.items():
        assert took.spills == 0, name
        assert took.registers * 32 * ahead.CUDA_WARPS * (1 if "extras" in name else 2) <= 65536, f"{name}: two blocks must fit"
        assert took.shared + backend_cuda.SLICE_BYTES <= 227 * 1024, name


@pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
def test_the_library_answers_without_a_gpu():
    """An impossible cluster is refused, and so is a possible one where there is no device: by a number, not by a crash."""
    library = backend_cuda._library.get(build=True)
    arguments = [*[None] * 3, 1, 100, 100, 100, 0, 0, 0, 1, 0.5, 1.0, 1.0, 0.0, 1.0, 0.0, *[None] * 8]
    invalid = library.fastkd_softmax_divergence(*arguments, 3, 0, None)
    assert library.fastkd_cuda_error(invalid) == b"invalid argument"
    if not torch.cuda.is_available():
        assert library.fastkd_softmax_divergence(*arguments, 1, 0, None) != 0


def test_a_failed_compilation_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    with pytest.raises(RuntimeError, match=r"nvcc was not found.*Use backend='triton'"):
        backend_cuda._compile()
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho 'rows.cu(7): error: no such thing' >&2\nexit 2\n")
    failing.chmod(0o755)
    monkeypatch.setattr(nvcc, "find", lambda: str(failing))
    with pytest.raises(RuntimeError, match=r"error: no such thing[\s\S]*Use backend='triton'"):
        backend_cuda._compile()


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "size"),
    [
        (1, torch.float32, 1),
        (14080, torch.float32, 1),
        (14081, torch.float32, 2),
        (128256, torch.float32, 16),
        (225280, torch.float32, 16),
        (225281, torch.float32, None),
        (30522, torch.bfloat16, 2),
        (128256, torch.bfloat16, 8),
        (450560, torch.bfloat16, 16),
        (450561, torch.bfloat16, None),
    ],
)
def test_the_fewest_blocks_that_hold_a_row(vocabulary, dtype, size):
    assert backend_cuda.cluster_size(vocabulary, dtype) == size


def test_refusals():
    logits = torch.zeros(2, 8)
    call = sample_call(torch.device("cpu"))
    assert "the logits are on cpu" in backend_cuda.why_not(call)

    def reason(student: Tensor, teacher: Tensor, gradient: Tensor | None = None, **changed) -> str:
        changed = {"row_weight": torch.ones(2)} | changed
        given = replace(call, student=student, teacher=teacher, gradient=gradient, **changed)
        return backend_cuda._why_not_blocks(given, student, teacher, gradient)

    assert reason(logits, logits) is None
    assert "are torch.float64, torch.float64 and None" in reason(logits.double(), logits.double())
    assert "are torch.float32, torch.bfloat16 and None" in reason(logits, logits.bfloat16())
    assert "are torch.float32, torch.float32 and torch.float16" in reason(logits, logits, logits.half())
    assert "adds no bias" in reason(logits, logits, student_bias=torch.zeros(8))
    assert "row weights are torch.float64" in reason(logits, logits, row_weight=torch.ones(2).double())
    assert "stride 1 along the vocabulary" in reason(logits.T, logits.T)
    wide = torch.zeros(1, 1).expand(1, 409601)
    assert "does not fit into the shared memory" in reason(wide, wide)
    memory = torch.zeros(3, 8)
    assert "overlaps teacher" in reason(logits, memory[:2], memory[1:])


def test_where_a_gradient_may_lie():
    """Over its own row alone: another row may not have been read when it is written."""
    memory = torch.zeros(6, 16)
    logits = memory[:4]
    assert backend_cuda._lies_safely(logits, logits)
    assert backend_cuda._lies_safely(logits.view(torch.bfloat16)[:, :16], logits)
    assert backend_cuda._lies_safely(memory[4:], memory[:2])
    assert backend_cuda._lies_safely(torch.zeros(4, 16), logits)
    assert not backend_cuda._lies_safely(logits.view(torch.bfloat16).reshape(-1)[:64].view(4, 16), logits), "packed rows"
    assert not backend_cuda._lies_safely(memory[1:5], logits), "one row later"
    assert not backend_cuda._lies_safely(memory[:2], memory.view(torch.bfloat16)[:2, :16]), "wider than the logits"
