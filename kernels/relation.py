"""Triton relation kernels: queries and keys of two models in, the divergence of their softmaxes and its gradients out.

No score ever leaves a program. `relation_rows_kernel` serves a tile of query rows of one (batch, head) pair: it streams the keys of
both models, with maxima and sums online, and leaves them to `relation_gradient_kernel`. That serves a tile of query rows and streams
the keys for dQ = G K / sqrt(d), or serves a tile of keys and streams the query rows for dK = G^T Q / sqrt(d), where G, the gradient of
the student's scores, is row_weight * (softmax(student's scores) - softmax(teacher's)). No two programs add to one place: every run
gives the same bits.

Queries and keys may be float16, bfloat16 or float32; a product of float32 has float32's precision. Everything else is float32. Against
16-bit inputs G is rounded to TF32, whose range is float32's: in float16 its small entries would be lost, in bfloat16 their precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_HEAD = 128
"""Head sizes up to this one; a tile of a model's keys is as wide, rounded up to a power of two."""

# A masked score: finite, so that the difference of two is a number, and with no part in a softmax that has any other key.
_MASKED = tl.constexpr(-1e30)


@triton.jit
def _pair(tensor, pair, heads, batch_stride, head_stride):
    """Where the (S, d) matrix of a (batch, head) pair begins; products of strides pass 2^31."""
    return tensor + (pair // heads).to(tl.int64) * batch_stride + (pair % heads).to(tl.int64) * head_stride


@triton.jit
def _tile(matrix, start, length, stride, size, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """ROWS rows of a (length, size) matrix from row `start`, zero past its ends."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = (start + rows < length)[:, None] & (columns < size)[None, :]
    return tl.load(matrix + tl.full((), start, tl.int64) * stride + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _kept(key_mask, keys, length):
    """Which of `keys` there are and are not masked."""
    kept = keys < length
    if key_mask is not None:
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _scores(left, right, scale, kept):
    """left right^T / sqrt(d), masked where `kept`, which broadcasts, is not."""
    return tl.where(kept, tl.dot(left, tl.trans(right), input_precision="ieee") * scale, _MASKED)


@triton.jit(do_not_specialize=("heads", "length"))
def relation_rows_kernel(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    student_q_batch_stride,
    student_q_head_stride,
    student_q_stride,
    student_k_batch_stride,
    student_k_head_stride,
    student_k_stride,
    teacher_q_batch_stride,
    teacher_q_head_stride,
    teacher_q_stride,
    teacher_k_batch_stride,
    teacher_k_head_stride,
    teacher_k_stride,
    heads,
    length,
    student_size,
    teacher_size,
    student_scale,
    teacher_scale,
    key_mask,
    divergence,
    row_statistics,
    CROSS_ENTROPY: tl.constexpr,
    SERVED: tl.constexpr,
    STREAMED: tl.constexpr,
    SIZE: tl.constexpr,
):
    tiles = tl.cdiv(length, SERVED)
    pair, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * SERVED
    student_q = _pair(student_q, pair, heads, student_q_batch_stride, student_q_head_stride)
    student_k = _pair(student_k, pair, heads, student_k_batch_stride, student_k_head_stride)
    teacher_q = _pair(teacher_q, pair, heads, teacher_q_batch_stride, teacher_q_head_stride)
    teacher_k = _pair(teacher_k, pair, heads, teacher_k_batch_stride, teacher_k_head_stride)
    if key_mask is not None:
        key_mask += (pair // heads).to(tl.int64) * length
    own_q = _tile(student_q, start, length, student_q_stride, student_size, SERVED, SIZE)
    other_q = _tile(teacher_q, start, length, teacher_q_stride, teacher_size, SERVED, SIZE)

    # The divergence of a row is a moment of the difference of its scores, from that of the maxima: of the divergence's own size,
    # whatever is added to the scores. The moment moves with the maxima.
    student_max = tl.full((SERVED,), _MASKED, tl.float32)
    teacher_max = tl.full((SERVED,), _MASKED, tl.float32)
    student_sum = tl.zeros((SERVED,), tl.float32)
    teacher_sum = tl.zeros((SERVED,), tl.float32)
    moment = tl.zeros((SERVED,), tl.float32)
    for first in range(0, length, STREAMED):
        kept = _kept(key_mask, first + tl.arange(0, STREAMED)[None, :], length)
        own_k = _tile(student_k, first, length, student_k_stride, student_size, STREAMED, SIZE)
        s = _scores(own_q, own_k, student_scale, kept)
        other_k = _tile(teacher_k, first, length, teacher_k_stride, teacher_size, STREAMED, SIZE)
        t = _scores(other_q, other_k, teacher_scale, kept)
        student_moved = tl.maximum(student_max, tl.max(s, axis=1))
        teacher_moved = tl.maximum(teacher_max, tl.max(t, axis=1))
        s -= student_moved[:, None]
        t -= teacher_moved[:, None]
        student_sum = student_sum * tl.exp(student_max - student_moved) + tl.sum(tl.exp(s), axis=1)
        teacher_exp = tl.exp(t)
        teacher_kept = tl.exp(teacher_max - teacher_moved)
        if CROSS_ENTROPY:
            distance = -s
            shift = student_moved - student_max
        else:
            distance = t - s
            shift = (teacher_max - teacher_moved) - (student_max - student_moved)
        moment = teacher_kept * (moment + shift * teacher_sum) + tl.sum(teacher_exp * distance, axis=1)
        teacher_sum = teacher_sum * teacher_kept + tl.sum(teacher_exp, axis=1)
        student_max = student_moved
        teacher_max = teacher_moved

    rows = start + tl.arange(0, SERVED)
    inside = rows < length
    at = pair.to(tl.int64) * length + rows
    # A quotient, not a difference of logarithms: both are large where it is small.
    value = moment / teacher_sum + tl.log(student_sum if CROSS_ENTROPY else student_sum / teacher_sum)
    tl.store(divergence + at, value, mask=inside)
    if row_statistics is not None:
        planes = (tl.num_programs(0) // tiles).to(tl.int64) * length
        tl.store(row_statistics + at, student_max, mask=inside)
        tl.store(row_statistics + planes + at, student_sum, mask=inside)
        tl.store(row_statistics + 2 * planes + at, teacher_max, mask=inside)
        tl.store(row_statistics + 3 * planes + at, teacher_sum, mask=inside)


@triton.jit(do_not_specialize=("heads", "length"))
def relation_gradient_kernel(
    student_served,
    student_streamed,
    teacher_served,
    teacher_streamed,
    student_served_batch_stride,
    student_served_head_stride,
    student_served_stride,
    student_streamed_batch_stride,
    student_streamed_head_stride,
    student_streamed_stride,
    teacher_served_batch_stride,
    teacher_served_head_stride,
    teacher_served_stride,
    teacher_streamed_batch_stride,
    teacher_streamed_head_stride,
    teacher_streamed_stride,
    heads,
    length,
    student_size,
    teacher_size,
    student_scale,
    teacher_scale,
    key_mask,
    row_weight,
    row_statistics,
    gradient,
    OF_KEYS: tl.constexpr,
    ADD: tl.constexpr,
    SERVED: tl.constexpr,
    STREAMED: tl.constexpr,
    SIZE: tl.constexpr,
):
    tiles = tl.cdiv(length, SERVED)
    pair, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * SERVED
    student_served = _pair(student_served, pair, heads, student_served_batch_stride, student_served_head_stride)
    student_streamed = _pair(student_streamed, pair, heads, student_streamed_batch_stride, student_streamed_head_stride)
    teacher_served = _pair(teacher_served, pair, heads, teacher_served_batch_stride, teacher_served_head_stride)
    teacher_streamed = _pair(teacher_streamed, pair, heads, teacher_streamed_batch_stride, teacher_streamed_head_stride)
    if key_mask is not None:
        key_mask += (pair // heads).to(tl.int64) * length
    row_weight += pair.to(tl.int64) * length
    row_statistics += pair.to(tl.int64) * length
    planes = (tl.num_programs(0) // tiles).to(tl.int64) * length
    own_served = _tile(student_served, start, length, student_served_stride, student_size, SERVED, SIZE)
    other_served = _tile(teacher_served, start, length, teacher_served_stride, teacher_size, SERVED, SIZE)

    PRECISION: tl.constexpr = "ieee" if student_streamed.dtype.element_ty == tl.float32 else "tf32"
    # Of keys, scores are transposed: G^T comes from them in the layout that its product reads.
    total = tl.zeros((SERVED, SIZE), tl.float32)
    for first in range(0, length, STREAMED):
        served = start + tl.arange(0, SERVED)[:, None]
        streamed = first + tl.arange(0, STREAMED)[None, :]
        rows = streamed if OF_KEYS else served
        kept = _kept(key_mask, served if OF_KEYS else streamed, length)
        own = _tile(student_streamed, first, length, student_streamed_stride, student_size, STREAMED, SIZE)
        s = _scores(own_served, own, student_scale, kept)
        other = _tile(teacher_streamed, first, length, teacher_streamed_stride, teacher_size, STREAMED, SIZE)
        t = _scores(other_served, other, teacher_scale, kept)
        weight = tl.load(row_weight + rows, mask=rows < length, other=0.0)
        student_max = tl.load(row_statistics + rows, mask=rows < length, other=0.0)
        student_sum = tl.load(row_statistics + planes + rows, mask=rows < length, other=1.0)
        teacher_max = tl.load(row_statistics + 2 * planes + rows, mask=rows < length, other=0.0)
        teacher_sum = tl.load(row_statistics + 3 * planes + rows, mask=rows < length, other=1.0)
        g = weight / student_sum * tl.exp(s - student_max) - weight / teacher_sum * tl.exp(t - teacher_max)
        total = tl.dot(g, own.to(tl.float32), total, input_precision=PRECISION)
    total *= student_scale
    served = start + tl.arange(0, SERVED)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    at = gradient + (pair.to(tl.int64) * length + served) * student_size + columns
    inside = (served < length) & (columns < student_size)
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


def relation(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    key_mask: Tensor | None,
    row_weight: Tensor,
    divergence: Tensor,
    cross_entropy: bool = False,
    row_statistics: Tensor | None = None,
    gradient_q: Tensor | None = None,
    gradient_k: Tensor | None = None,
    add: bool = False,
) -> None:
    """Launch the kernels for one target: every row's KL (or cross-entropy) into `divergence`, and the gradients that are given.

    Queries and keys: (B, heads, S, d), unit stride along d and any others; q and k of a model share a dtype. `key_mask` (B, S), True =
    keep, leaves every batch entry a key. `row_weight` and `divergence` are (B, heads, S), `row_statistics`, scratch that gradients
    need, (4, B, heads, S), and gradients as the student, all of them contiguous and float32; with `add` gradients are added to.
    """
    batch, heads, length, size = student_q.shape
    if student_q.numel() == 0:
        return
    sizes = size, teacher_q.shape[-1]
    shared = (heads, length, *sizes, *(d**-0.5 for d in sizes), key_mask)
    served, streamed = tile(all(x.element_size() == 2 for x in (student_q, teacher_q)))
    grid = (batch * heads * triton.cdiv(length, served),)
    options = {"SERVED": served, "STREAMED": streamed, "SIZE": width(*sizes), **launch_options(served)}
    queries, keys = (student_q, teacher_q), (student_k, teacher_k)
    with torch.cuda.device_of(student_q):
        relation_rows_kernel[grid](
            *_matrices(queries, keys),
            *shared,
            divergence,
            row_statistics,
            CROSS_ENTROPY=cross_entropy,
            **options,
        )
        for gradient, *matrices in ((gradient_q, queries, keys), (gradient_k, keys, queries)):
            if gradient is not None:
                relation_gradient_kernel[grid](
                    *_matrices(*matrices),
                    *shared,
                    row_weight,
                    row_statistics,
                    gradient,
                    OF_KEYS=gradient is gradient_k,
                    ADD=add,
                    **options,
                )


def _matrices(served: tuple[Tensor, Tensor], streamed: tuple[Tensor, Tensor]) -> tuple[Tensor | int, ...]:
    """The kernels' first arguments, of the student's and the teacher's."""
    matrices = served[0], streamed[0], served[1], streamed[1]
    return *matrices, *(stride for x in matrices for stride in x.stride()[:3])


def tile(narrow: bool) -> tuple[int, int]:
    """Rows (or keys) that a program serves, and keys (or rows) that it streams at a time, where all inputs are `narrow`: of 16 bits."""
    return (64, 32) if narrow else (32, 16)


def width(*sizes: int) -> int:
    """Columns of every tile: the larger head size as a power of two, of which a product needs 16."""
    return max(16, triton.next_power_of_2(max(sizes)))


def launch_options(served: int) -> dict[str, int]:
    """Eight rows a warp. No `maxnreg`: at any value, 255 among them, ptxas spills in some of the variants that are compiled ahead."""
    return {"num_warps": served // 8, "num_stages": 2}
