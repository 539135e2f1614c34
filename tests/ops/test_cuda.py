"""The CUDA row kernel: on a Hopper GPU, and its mathematics on the host (cuda_host.cpp), against float64. Anywhere: what it refuses."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd import csrc
from fastkd.csrc import nvcc
from fastkd.ops import compiled, cuda, rows
from fastkd.ops.compiled import kind_and_mixing, scale_and_softcap
from fastkd.ops.divergence import Divergence
from fastkd.ops.rows import LogitTransform, RowLosses, RowOptions
from tests.oracle import assert_close
from tests.row_kernels import CASES, DIVERGENCES, DTYPES, TOLERANCE, assert_losses, check, make_logits, make_losses, make_place

INFINITY = float("inf")
HERE = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = cuda.is_ready(HERE)
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
    """What is tested, behind the signature of `softmax_divergence_`, for tensors on the CPU."""
    if request.param != "gpu":
        return on_host(request.getfixturevalue("host_row"), cluster_size=int(request.param.split()[1]))
    if not ON_GPU:
        pytest.skip("no Hopper GPU")
    return on_gpu


def on_host(function, cluster_size: int):
    def kernel(student, teacher, options, out, *, row_weight, labels=None, label_weight=None, gradient=None):
        for row in range(len(student)):
            s, t = student[row].float().contiguous(), teacher[row].float().contiguous()
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
                row_weight[row],
                0.0 if label_weight is None else label_weight[row],
                -1 if labels is None else labels[row],
                labels is not None,
                options.stats,
            )
            for column, value in zip(vars(out).values(), losses, strict=True):
                if column is not None:
                    column[row] = value
            if gradient is not None:
                gradient[row] = result

    return kernel


def on_gpu(*blocks, **vectors) -> None:
    """The CUDA kernel on copies of its arguments, which share memory where the arguments do, and are copied back."""
    storages: dict[int, tuple] = {}

    def moved(value):
        if isinstance(value, rows.RowLosses):
            return rows.RowLosses(*map(moved, vars(value).values()))
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        _, there = storages.setdefault(storage.data_ptr(), (storage, storage.cuda()))
        return torch.empty(0, dtype=value.dtype, device="cuda").set_(there, value.storage_offset(), value.shape, value.stride())

    cuda.softmax_divergence_(*map(moved, blocks), **{name: moved(value) for name, value in vectors.items()})
    for here, there in storages.values():
        here.copy_(there)


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
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence), temperature, *transforms, stats=True), place, **LABELS)
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
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence), 2.0, stats=True), place)


@pytest.mark.parametrize(("dtype", "place"), NARROW)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one(kernel, divergence, dtype, place):
    """Nothing can differ: zero, up to the rounding of the logarithm of the mixing weight."""
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, 1))
    rows_before, options = (student.clone(), teacher.clone()), RowOptions(Divergence.parse(divergence))
    gradient = make_place(student, place)
    losses = make_losses(3, torch.float32, has_teacher=True, has_labels=False, stats=False)
    kernel(student, teacher, options, losses, row_weight=torch.ones(3), gradient=gradient)
    assert_losses(losses, RowLosses(torch.zeros(3)), *rows_before, options, torch.float32)
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


def compare(kernel, student: Tensor, teacher: Tensor, options: RowOptions) -> None:
    """As `check`, for infinite logits, which the torch backend defines; infinite and undefined results must be the same."""
    results = []
    for run, dtype in ((kernel, torch.float32), (rows.softmax_divergence_, torch.float64)):
        s, t, out = student.to(dtype, copy=True), teacher.to(dtype), make_losses(len(student), dtype, True, False, options.stats)
        run(s, t, options, out, row_weight=torch.linspace(0.5, 2.0, len(s)).to(dtype), gradient=s)
        results.append((s, out))
    (gradient, losses), (truth, expected) = results
    assert_losses(losses, expected, student, teacher, options, torch.float32)
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
    compare(kernel, student, teacher, RowOptions(Divergence.parse(divergence), 2.0, stats=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [float("nan"), INFINITY, "row of -inf"])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_undefined_shows(kernel, divergence, bad, side):
    blocks = [x.float() for x in make_logits(3, 40)]
    blocks[side][1] = -INFINITY if isinstance(bad, str) else blocks[side][1].index_fill(0, torch.tensor([37]), bad)
    out = make_losses(3, torch.float32, True, False, False)
    kernel(*blocks, RowOptions(Divergence.parse(divergence)), out, row_weight=torch.ones(3), gradient=blocks[0])
    assert out.divergence.isnan().tolist() == [False, True, False]
    assert blocks[0][1].isnan().all() and blocks[0][[0, 2]].isfinite().all()


def test_probabilities_that_underflow(kernel):
    """p and q below the smallest float32 of which a mixture in float32 would be 0."""
    student, teacher = torch.tensor([[0.0, -200.0, -150.0, -3.0]]), torch.tensor([[0.0, -150.0, -200.0, -90.0]])
    for divergence in DIVERGENCES:
        compare(kernel, student, teacher, RowOptions(Divergence.parse(divergence), stats=True))


def test_equal_probabilities_pull_neither_way_in_tvd(kernel):
    student, teacher = torch.tensor([[0.0, 1.0, 2.0, 2.5]]), torch.tensor([[1.0, 0.0, 2.0, 2.5]])
    q = student[0].softmax(-1)
    coefficient = 0.5 * q * torch.tensor([-1.0, 1.0, 0.0, 0.0])
    out = make_losses(1, torch.float32, True, False, False)
    kernel(student, teacher, RowOptions(Divergence.parse("tvd")), out, row_weight=torch.ones(1), gradient=student)
    assert_close(student[0], coefficient - q * coefficient.sum(), TOLERANCE[torch.float32])


def test_the_first_of_equal_logits_is_the_best(kernel):
    student, teacher = torch.zeros(2, 70), torch.zeros(2, 70)
    student[0, [21, 22, 60]], teacher[0, [21, 61]] = 2.0, 3.0
    student[1, [20, 60]], teacher[1, [21, 22]] = 2.0, 3.0
    out = make_losses(2, torch.float32, True, False, True)
    kernel(student, teacher, RowOptions(stats=True), out, row_weight=torch.ones(2))
    assert out.top1_agreement.tolist() == [1.0, 0.0]


@pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
def test_nothing_spills():
    ahead = pytest.importorskip("fastkd.kernels.compile")
    cuda._library.get(build=True)
    (kept, *_) = compiled.cache_folder().glob(f"{cuda._stem()}-*.so")
    table = ahead.cuda_resources(kept.read_bytes())
    assert len(table) == len(DIVERGENCES) * len(TAKEN) * 2
    for name, took in table.items():
        assert took.spills == 0, name
        assert took.registers * 32 * ahead.CUDA_WARPS * (1 if "extras" in name else 2) <= 65536, f"{name}: two blocks must fit"
        assert took.shared + cuda.SLICE_BYTES <= 227 * 1024, name


@pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
def test_the_library_answers_without_a_gpu():
    """An impossible cluster is refused, and so is a possible one where there is no device: by a number, not by a crash."""
    library = cuda._library.get(build=True)
    arguments = [*[None] * 3, 1, 100, 100, 100, 0, 0, 0, 1, 0.5, 1.0, 1.0, 0.0, 1.0, 0.0, *[None] * 8]
    invalid = library.fastkd_softmax_divergence(*arguments, 3, 0, None)
    assert library.fastkd_cuda_error(invalid) == b"invalid argument"
    if not torch.cuda.is_available():
        assert library.fastkd_softmax_divergence(*arguments, 1, 0, None) != 0


def test_a_failed_compilation_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    with pytest.raises(RuntimeError, match=r"nvcc was not found.*Use backend='triton'"):
        cuda._compile()
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho 'rows.cu(7): error: no such thing' >&2\nexit 2\n")
    failing.chmod(0o755)
    monkeypatch.setattr(nvcc, "find", lambda: str(failing))
    with pytest.raises(RuntimeError, match=r"error: no such thing[\s\S]*Use backend='triton'"):
        cuda._compile()


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "size"),
    [
        (1, torch.float32, 1),
        (25600, torch.float32, 1),
        (25601, torch.float32, 2),
        (128256, torch.float32, 8),
        (204800, torch.float32, 8),
        (204801, torch.float32, 16),
        (409600, torch.float32, 16),
        (409601, torch.float32, None),
        (30522, torch.bfloat16, 1),
        (128256, torch.bfloat16, 4),
        (819200, torch.bfloat16, 16),
        (819201, torch.bfloat16, None),
    ],
)
def test_the_fewest_blocks_that_hold_a_row(vocabulary, dtype, size):
    assert cuda.cluster_size(vocabulary, dtype) == size
    assert cuda.fits(vocabulary, dtype) == (size is not None)


def test_other_dtypes_do_not_fit():
    assert not cuda.fits(100, torch.float16) and not cuda.fits(100, torch.float64)


def call(student: Tensor, teacher: Tensor | None, gradient: Tensor | None = None) -> None:
    out = make_losses(len(student), torch.float32, True, False, False)
    cuda.softmax_divergence_(student, teacher, RowOptions(), out, row_weight=torch.ones(len(student)), gradient=gradient)


def test_refusals():
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"student_logits is on cpu; backend='cuda' needs all tensors on one CUDA device"):
        call(logits, logits)
    with pytest.raises(TypeError, match=r"are torch.float64, torch.float64 and None\. Use backend='triton'"):
        call(logits.double(), logits.double())
    with pytest.raises(TypeError, match=r"are torch.float32, torch.bfloat16 and None"):
        call(logits, logits.bfloat16())
    with pytest.raises(TypeError, match=r"are torch.float32, torch.float32 and torch.float16"):
        call(logits, logits, logits.half())
    wide = torch.zeros(1, 1).expand(1, 409601)
    with pytest.raises(ValueError, match=r"a vocabulary of 409601 in torch.float32 does not fit .* use backend='triton'"):
        call(wide, wide)
    with pytest.raises(ValueError, match=r"no loss of labels alone; use backend='triton'"):
        call(logits, None)
    assert not cuda.is_ready(torch.device("cpu"))


def test_where_a_gradient_may_lie():
    """Over its own row alone: another row may not have been read when it is written."""
    memory = torch.zeros(6, 16)
    logits = memory[:4]
    assert cuda._lies_safely(logits, logits)
    assert cuda._lies_safely(logits.view(torch.bfloat16)[:, :16], logits)
    assert cuda._lies_safely(memory[4:], memory[:2])
    assert cuda._lies_safely(torch.zeros(4, 16), logits)
    assert not cuda._lies_safely(logits.view(torch.bfloat16).reshape(-1)[:64].view(4, 16), logits), "packed rows"
    assert not cuda._lies_safely(memory[1:5], logits), "one row later"
    assert not cuda._lies_safely(memory[:2], memory.view(torch.bfloat16)[:2, :16]), "wider than the logits"
