"""The CUDA row kernel, launched by the code that launches it: on a Hopper GPU, and on the host through a driver that is not one.

That driver runs the kernel's own mathematics (cuda_host.cpp) on the very parameter of a launch. Anywhere: what is refused and shipped.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastkd import csrc
from fastkd.csrc import nvcc
from fastkd.ops import backend_cuda, backend_torch
from fastkd.ops.backends import sample_call
from fastkd.ops.divergence import Divergence
from fastkd.ops.row_call import LogitTransform, RowCall, RowOptions, RowOutputs, TopK
from tests.near_certainty import GAPS, check_near_certainty
from tests.oracle import assert_close
from tests.row_kernels import (
    CASES,
    DIVERGENCES,
    DTYPES,
    TOLERANCE,
    assert_outputs,
    check,
    check_teacher_rest,
    make_logits,
    make_outputs,
    make_place,
)

INFINITY = float("inf")
HERE = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = HERE.type == "cuda" and backend_cuda.why_not(sample_call(HERE)) is None
TAKEN = [name for name in DTYPES if name != "float64"]
PLACED = [case for case in CASES if case[0] in TAKEN and not case[1].startswith("over it")]
SOURCE = Path(__file__).with_name("cuda_host.cpp")
VANISHING = 1.6e-6
"""L1 norm of what is left of a gradient that is zero: a student with one token left to it has none, whatever it is compared with."""
LABELS = {"labels": torch.tensor([16, -1, 60, 0, 7]), "label_weight": torch.tensor([0.3, 5.0, 1.0, 0.0, 2.0])}
KINDS = ["none", "forward_kl", "reverse_kl", "mixed", "tvd", "nla", "jsd", "skew_kl", "skew_rkl"]


@pytest.fixture(autouse=True)
def backend():
    """These tests name their kernel: once is enough."""


class Driver:
    """As much of libcuda as the backend calls: launches run on the host, and `refused` names a function that fails."""

    def __init__(self, host: ctypes.CDLL) -> None:
        self.host, self.launches, self.attributes, self.names, self.pushed, self.loaded = host, [], {}, [], 0, 0
        self.refused: str | None = None

    def __getattribute__(self, name: str):
        if name.startswith("cu") and name == self.refused:
            return lambda *arguments: 209
        return super().__getattribute__(name)

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.pushed += context.value == 1000
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.pushed -= 1
        return 0

    def cuModuleLoadData(self, module, code):
        assert self.pushed and code.value[:4] == b"\x7fELF"
        module._obj.value, self.loaded = 7, self.loaded + 1
        return 0

    def cuModuleGetFunction(self, function, module, name):
        assert module.value == 7
        self.names.append(name.decode())
        function._obj.value = len(self.names)
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.attributes[self.names[function.value - 1], attribute.value] = value.value
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        launch, name = config._obj, self.names[function.value - 1]
        dimension = launch.attributes[0]
        blocks = dimension.value[0]
        assert self.pushed == 1 and extra is None and launch.attribute_count == 1 and dimension.id == 4 and launch.stream == 77
        assert list(dimension.value[1:3]) == [launch.grid_y, launch.grid_z] == [launch.block_y, launch.block_z] == [1, 1]
        self.launches.append((name, launch.grid_x, blocks, launch.block_x, launch.shared_bytes))
        kind = KINDS.index(name.removeprefix("rows_").removesuffix("_extras"))
        self.host.host_rows(kind, ctypes.c_void_p(parameters[0]), ctypes.c_int64(launch.grid_x // blocks), blocks)
        return 0

    def cuGetErrorString(self, error, words):
        words._obj.value = b"no kernel image is available"
        return 0


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    library = tmp_path_factory.mktemp("cuda_host") / "host.so"
    include = Path(csrc.__path__[0]) / "cuda"
    subprocess.run(["c++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def driver(host, monkeypatch):
    """In the place of libcuda, for tensors on the CPU."""
    caches = [backend_cuda._driver, backend_cuda._primary_context, backend_cuda._module, backend_cuda._function]
    for cache in caches:
        cache.cache_clear()
    fake = Driver(host)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvcc, "shipped", lambda: b"\x7fELF")
    yield fake
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=["host, 1 block", "host, 4 blocks", "gpu"])
def kernel(request, monkeypatch):
    """What is tested, for calls whose tensors are on the CPU."""
    if request.param != "gpu":
        request.getfixturevalue("driver")
        monkeypatch.setattr(backend_cuda, "cluster_size", lambda *_, **__: int(request.param.split()[1]))
        return backend_cuda.run
    if not ON_GPU:
        pytest.skip("no Hopper GPU")
    return on_gpu


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


@pytest.mark.parametrize(("dtype", "place"), [("float32", "bfloat16"), ("float16", "float32")])
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
    biases = {"student_bias": torch.linspace(-1, 2, 61), "teacher_bias": torch.linspace(1, -1, 61) ** 2}
    capped = LogitTransform(1.0, 30.0), LogitTransform(0.7)
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence), temperature, *capped), place, **biases)


@pytest.mark.parametrize(("dtype", "place"), PLACED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_with_tokens_that_have_no_column(kernel, divergence, dtype, place):
    check_teacher_rest(kernel, divergence, DTYPES[dtype], place)


@pytest.mark.parametrize("student_dtype", TAKEN)
@pytest.mark.parametrize("teacher_dtype", TAKEN)
def test_the_models_may_differ_in_dtype(kernel, student_dtype, teacher_dtype):
    student, teacher = make_logits(3, 47)
    check(kernel, student.to(DTYPES[student_dtype]), teacher.to(DTYPES[teacher_dtype]), RowOptions())


@pytest.mark.parametrize(("dtype", "place"), PLACED)
def test_labels_alone(kernel, dtype, place):
    student = make_logits(5, 61)[0].to(DTYPES[dtype])
    for transform in (LogitTransform(), LogitTransform(2.0, 5.0)):
        check(kernel, student, None, RowOptions(None, student=transform), place, **LABELS)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, None])
def test_gradients_of_a_student_that_is_nearly_certain(kernel, divergence, gap):
    check_near_certainty(kernel, divergence, gap)


def test_an_unknown_label_gives_nan(kernel):
    student, teacher = (x.float() for x in make_logits(3, 40))
    out = make_outputs(3, torch.float32, True, True, False)
    labels = torch.tensor([3, 40, 2**40])
    kernel(RowCall(student=student, teacher=teacher, options=RowOptions(), outputs=out, row_weight=torch.ones(3), labels=labels))
    assert out.cross_entropy.isnan().tolist() == [False, True, True] and out.divergence.isfinite().all()


@pytest.mark.parametrize("vocabulary", [7, 37, 1001, 30522, 128256])
@pytest.mark.parametrize(("dtype", "place"), [("float32", "in place"), ("float32", "bfloat16"), ("bfloat16", "in place")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_width(request, divergence, dtype, place, vocabulary):
    """With clusters of 1, 4 and 16 blocks and rows whose beginnings are aligned, or not."""
    if not ON_GPU:
        request.getfixturevalue("driver")
    kernel = on_gpu if ON_GPU else backend_cuda.run
    student, teacher = (x.to(DTYPES[dtype]) for x in make_logits(3, vocabulary))
    check(kernel, student, teacher, RowOptions(Divergence.parse(divergence), 2.0), place, statistics=True)


@pytest.mark.parametrize(("dtype", "place"), [case for case in PLACED if case[1] != "none"])
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


# How it is launched.


@pytest.mark.parametrize("field", [name for name, *_ in backend_cuda._Call._fields_])
def test_every_field_of_the_parameter_lies_where_the_kernel_reads_it(host, field):
    assert getattr(backend_cuda._Call, field).offset == host.offset_of(field.encode())
    assert ctypes.sizeof(backend_cuda._Call) == host.size_of_call()


def test_structures_of_the_driver_have_its_sizes():
    """The sizes are those of cuda.h on 64-bit machines."""
    launch = backend_cuda._Launch
    offsets = (launch.shared_bytes.offset, launch.stream.offset, launch.attributes.offset, launch.attribute_count.offset)
    assert (ctypes.sizeof(launch), *offsets) == (56, 24, 32, 40, 48)
    assert (ctypes.sizeof(backend_cuda._Attribute), backend_cuda._Attribute.value.offset) == (72, 8)


def test_a_launch_has_a_cluster_a_row_and_memory_for_its_slices(driver):
    student, teacher = (x.float() for x in make_logits(3, 30000))
    for _ in range(2):
        check(backend_cuda.run, student, teacher, RowOptions(), "bfloat16")
    check(backend_cuda.run, student, None, RowOptions(None), "float32", labels=torch.tensor([1, 2, 3]), label_weight=torch.ones(3))
    assert driver.launches == [("rows_forward_kl", 12, 4, 512, 7504 * 8)] * 2 + [("rows_none_extras", 6, 2, 512, 15000 * 4)]
    assert driver.loaded == 1 and driver.names == ["rows_forward_kl", "rows_none_extras"] and driver.pushed == 0
    assert driver.attributes == {(name, which): value for name in driver.names for which, value in ((8, 220 * 1024), (14, 1))}


def test_the_leanest_kernel_serves(driver):
    student, teacher = (x.float() for x in make_logits(5, 61))
    capped = LogitTransform(1.0, 9.0)
    for options, settings in [
        (RowOptions(Divergence.jsd(0.3), 2.0, LogitTransform(0.5), capped), {"student_bias": torch.ones(61)}),
        (RowOptions(student=capped), {}),
        (RowOptions(), {"statistics": True}),
        (RowOptions(), LABELS),
    ]:
        check(backend_cuda.run, student, teacher, options, **settings)
    assert [name for name, *_ in driver.launches] == ["rows_jsd", *["rows_forward_kl_extras"] * 3]


def test_no_rows_are_no_launch(driver):
    student, teacher = torch.empty(0, 9), torch.empty(0, 9)
    run(backend_cuda.run, student, teacher, RowOptions(), make_outputs(0, torch.float32, True, False, False), torch.ones(0))
    assert not driver.launches


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuLaunchKernelEx", "cuDevicePrimaryCtxRetain"])
def test_what_the_driver_refuses_is_said(driver, function):
    driver.refused = function
    student, teacher = (x.float() for x in make_logits(3, 8))
    words = rf"was not launched: {function} says no kernel image is available \(209\)\. Use backend='triton' or 'torch'"
    with pytest.raises(RuntimeError, match=words):
        run(backend_cuda.run, student, teacher, RowOptions(), make_outputs(3, torch.float32, True, False, False), torch.ones(3))
    assert driver.pushed == 0


# The machine code.


def test_the_code_that_is_shipped_is_that_of_the_sources():
    """After a change of csrc/row_math.h or csrc/cuda: `python -m fastkd.csrc.nvcc`."""
    assert nvcc.shipped() is not None


def test_code_of_other_sources_or_damaged_is_not_taken(monkeypatch, tmp_path):
    def shipped():
        nvcc.shipped.cache_clear()
        return nvcc.shipped()

    with monkeypatch.context() as patch:
        patch.setattr(nvcc, "fingerprint", lambda: "other sources")
        assert shipped() is None
    for damage in (b"", nvcc.CODE.read_bytes()[:-9], nvcc.CODE.read_bytes()[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr(nvcc, "CODE", tmp_path / "code")
            nvcc.CODE.write_bytes(damage)
            assert shipped() is None
    assert shipped() is not None


def test_code_comes_from_the_cache_where_the_sources_were_changed(driver, monkeypatch):
    monkeypatch.setattr(nvcc, "shipped", lambda: None)
    monkeypatch.setattr(backend_cuda, "_library", SimpleNamespace(get=lambda build: b"\x7fELF of the cache"))
    student, teacher = (x.float() for x in make_logits(3, 8))
    check(backend_cuda.run, student, teacher, RowOptions())
    assert driver.loaded == 1
    monkeypatch.setattr(nvcc, "find", lambda: None)
    assert backend_cuda._why_no_code() is None
    monkeypatch.setattr(backend_cuda, "_library", SimpleNamespace(get=lambda build: None))
    assert "compile them by `python -m fastkd.ops.backend_cuda`" in backend_cuda._why_no_code()
    monkeypatch.setattr(nvcc, "find", lambda: "nvcc")
    assert backend_cuda._why_no_code() is None


def test_nothing_spills_and_loops_are_short():
    """Two blocks share a multiprocessor; instructions an element are counted in the main loops."""
    sass = pytest.importorskip("fastkd.kernels.sass")
    code = nvcc.shipped()
    names = [f"rows_{kind}{variant}" for kind in KINDS[1:] for variant in ("", "_extras")] + ["rows_none_extras"]
    took, counted = sass.resources_by_function(code), sass.cuda_instructions(code)
    assert sorted(took) == sorted(counted) == sorted(names)
    for name, resources in took.items():
        assert resources.spills == 0 and resources.registers <= 64, name
        assert 2 * (resources.shared + backend_cuda.SLICE_BYTES) <= 228 * 1024, name  # with what the driver takes
    assert counted["rows_forward_kl"] <= 27 and counted["rows_jsd"] <= 80 and max(counted.values()) <= 106, counted


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
    ("vocabulary", "has_teacher", "size"),
    [
        (1, True, 1),
        (14080, True, 1),
        (14081, True, 2),
        (28160, False, 1),
        (128256, True, 16),
        (225280, True, 16),
        (225281, True, 16),
        (450560, True, 16),
        (450561, True, None),
        (901120, False, 16),
        (901121, False, None),
    ],
)
def test_the_fewest_blocks_that_hold_a_row(vocabulary, has_teacher, size):
    assert backend_cuda.cluster_size(vocabulary, has_teacher=has_teacher) == size


def test_refusals(monkeypatch):
    call = sample_call(torch.device("cpu"))
    assert backend_cuda.why_not(call) == "it runs on NVIDIA GPUs, and the logits are on cpu: move them."
    given = replace(call, student=call.student.to("meta"))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9.x (Hopper)" in backend_cuda.why_not(given)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend_cuda.why_not(call) is None
    assert "top-k teacher: triton has" in backend_cuda.why_not(replace(call, teacher=TopK(call.labels, call.student)))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "it runs on NVIDIA GPUs" in backend_cuda.why_not(call)


def test_blocks_that_it_does_not_take():
    logits, call = torch.zeros(2, 8), sample_call(torch.device("cpu"))

    def reason(student: Tensor, teacher: Tensor | None, gradient: Tensor | None = None, **changed) -> str | None:
        changed = {"row_weight": torch.ones(2)} | changed
        return backend_cuda._why_not_blocks(replace(call, student=student, teacher=teacher, gradient=gradient, **changed))

    assert reason(logits, logits) is None
    assert reason(logits, logits.half(), logits.bfloat16(), student_bias=torch.zeros(8)) is None
    assert reason(logits, None, logits) is None
    assert "and teacher is torch.float64: triton takes that" in reason(logits, logits.double())
    assert "and gradient is torch.float64" in reason(logits, logits, logits.double())
    assert "row weights are torch.float64: triton" in reason(logits, logits, row_weight=torch.ones(2).double())
    assert "student has strides (1, 2)" in reason(torch.zeros(8, 2).T, logits)
    wide = torch.zeros(1, 450561)
    assert "a vocabulary of 450561 does not fit into the shared memory" in reason(wide, wide)
    tall = torch.zeros(1, 8).expand(2**27, 8)
    assert "more than one launch has room for" in reason(tall, tall)
    memory = torch.zeros(3, 8)
    assert "the gradient overlaps teacher and is not the same memory" in reason(logits, memory[:2], memory[1:])


def test_where_a_gradient_may_lie():
    """Over the very row that it is of: another may not have been read when it is written."""
    memory = torch.zeros(6, 16)
    logits = memory[:4]
    assert backend_cuda._lies_safely(logits, logits)
    assert backend_cuda._lies_safely(memory[4:], memory[:2])
    assert backend_cuda._lies_safely(torch.zeros(4, 16), logits)
    assert not backend_cuda._lies_safely(logits.view(torch.bfloat16)[:, :16], logits), "narrower"
    assert not backend_cuda._lies_safely(memory[1:5], logits), "one row later"
