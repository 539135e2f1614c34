"""Floor 1: the Triton relation kernels. Queries and keys of two models in, the divergence of their softmaxes and its gradients out.

No score ever leaves a program. `relation_rows_kernel` serves a tile of query rows of one (batch, head) pair: it streams the keys of
both models, with maxima and sums online, and streams them again for dQ = G K / sqrt(d), where G, the gradient of the student's scores,
is row_weight * (softmax(student's scores) - softmax(teacher's)). `relation_keys_kernel` serves a tile of keys: it streams the query
rows, whose maxima and sums the other one left, for dK = G^T Q / sqrt(d). No two programs add to one place: every run gives the same
bits.

Queries and keys may be float16, bfloat16 or float32; a product of float32 has float32's precision. Everything else is float32. Against
16-bit keys G is rounded to TF32, whose range is float32's: in float16 its small entries would be lost, in bfloat16 their precision.
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
def _row(matrix, row, stride):
    return matrix + tl.full((), row, tl.int64) * stride


@triton.jit
def _tile(matrix, start, length, stride, size, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """ROWS rows of a (length, size) matrix from row `start`, zero past its ends."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = (start + rows < length)[:, None] & (columns < size)[None, :]
    return tl.load(_row(matrix, start, stride) + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _kept(key_mask, start, length, KEYS: tl.constexpr):
    """Which of KEYS keys from `start` there are and are not masked."""
    keys = start + tl.arange(0, KEYS)
    kept = keys < length
    if key_mask is not None:
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _scores(left, right, scale, kept):
    """left right^T / sqrt(d), masked where `kept`, which broadcasts, is not."""
    return tl.where(kept, tl.dot(left, tl.trans(right), input_precision="ieee") * scale, _MASKED)


@triton.jit
def _add_product(total, gradient, other):
    """total + gradient @ other, see the module's docstring for its precision."""
    PRECISION: tl.constexpr = "ieee" if other.dtype == tl.float32 else "tf32"
    return tl.dot(gradient, other.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def _store(gradient, value, start, length, size, ADD: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Write `value` to rows of a contiguous (length, size) matrix, or add it to what they hold."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = (start + rows < length)[:, None] & (columns < size)[None, :]
    at = _row(gradient, start, size) + rows[:, None] * size + columns[None, :]
    if ADD:
        value += tl.load(at, mask=inside, other=0.0)
    tl.store(at, value, mask=inside)


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
    row_weight,
    row_statistics,
    divergence,
    gradient,
    CROSS_ENTROPY: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    tiles = tl.cdiv(length, ROWS)
    pair, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    student_q = _pair(student_q, pair, heads, student_q_batch_stride, student_q_head_stride)
    student_k = _pair(student_k, pair, heads, student_k_batch_stride, student_k_head_stride)
    teacher_q = _pair(teacher_q, pair, heads, teacher_q_batch_stride, teacher_q_head_stride)
    teacher_k = _pair(teacher_k, pair, heads, teacher_k_batch_stride, teacher_k_head_stride)
    if key_mask is not None:
        key_mask += (pair // heads).to(tl.int64) * length
    own_q = _tile(student_q, start, length, student_q_stride, student_size, ROWS, SIZE)
    other_q = _tile(teacher_q, start, length, teacher_q_stride, teacher_size, ROWS, SIZE)

    # The divergence of a row is a moment of the difference of its scores, from that of the maxima: of the divergence's own size,
    # whatever is added to the scores. The moment moves with the maxima.
    student_max = tl.full((ROWS,), _MASKED, tl.float32)
    teacher_max = tl.full((ROWS,), _MASKED, tl.float32)
    student_sum = tl.zeros((ROWS,), tl.float32)
    teacher_sum = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for first in range(0, length, KEYS):
        kept = _kept(key_mask, first, length, KEYS)[None, :]
        own_k = _tile(student_k, first, length, student_k_stride, student_size, KEYS, SIZE)
        s = _scores(own_q, own_k, student_scale, kept)
        other_k = _tile(teacher_k, first, length, teacher_k_stride, teacher_size, KEYS, SIZE)
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

    rows = start + tl.arange(0, ROWS)
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
    if gradient is not None:
        weight = tl.load(row_weight + at, mask=inside, other=0.0)
        student_factor = (weight / student_sum)[:, None]
        teacher_factor = (weight / teacher_sum)[:, None]
        total = tl.zeros((ROWS, SIZE), tl.float32)
        for first in range(0, length, KEYS):
            kept = _kept(key_mask, first, length, KEYS)[None, :]
            own_k = _tile(student_k, first, length, student_k_stride, student_size, KEYS, SIZE)
            s = _scores(own_q, own_k, student_scale, kept)
            other_k = _tile(teacher_k, first, length, teacher_k_stride, teacher_size, KEYS, SIZE)
            t = _scores(other_q, other_k, teacher_scale, kept)
            g = student_factor * tl.exp(s - student_max[:, None]) - teacher_factor * tl.exp(t - teacher_max[:, None])
            total = _add_product(total, g, own_k)
        gradient += pair.to(tl.int64) * length * student_size
        _store(gradient, total * student_scale, start, length, student_size, ADD, ROWS, SIZE)


@triton.jit(do_not_specialize=("heads", "length"))
def relation_keys_kernel(
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
    row_weight,
    row_statistics,
    gradient,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    tiles = tl.cdiv(length, KEYS)
    pair, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * KEYS
    student_q = _pair(student_q, pair, heads, student_q_batch_stride, student_q_head_stride)
    student_k = _pair(student_k, pair, heads, student_k_batch_stride, student_k_head_stride)
    teacher_q = _pair(teacher_q, pair, heads, teacher_q_batch_stride, teacher_q_head_stride)
    teacher_k = _pair(teacher_k, pair, heads, teacher_k_batch_stride, teacher_k_head_stride)
    if key_mask is not None:
        key_mask += (pair // heads).to(tl.int64) * length
    kept = _kept(key_mask, start, length, KEYS)[:, None]
    own_k = _tile(student_k, start, length, student_k_stride, student_size, KEYS, SIZE)
    other_k = _tile(teacher_k, start, length, teacher_k_stride, teacher_size, KEYS, SIZE)
    row_weight += pair.to(tl.int64) * length
    row_statistics += pair.to(tl.int64) * length
    planes = (tl.num_programs(0) // tiles).to(tl.int64) * length

    # Scores are transposed here, so that G^T, in the layout that the product with Q reads, comes from them without a change of it.
    total = tl.zeros((KEYS, SIZE), tl.float32)
    for first in range(0, length, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < length
        own_q = _tile(student_q, first, length, student_q_stride, student_size, ROWS, SIZE)
        s = _scores(own_k, own_q, student_scale, kept)
        other_q = _tile(teacher_q, first, length, teacher_q_stride, teacher_size, ROWS, SIZE)
        t = _scores(other_k, other_q, teacher_scale, kept)
        weight = tl.load(row_weight + rows, mask=inside, other=0.0)
        student_max = tl.load(row_statistics + rows, mask=inside, other=0.0)
        student_sum = tl.load(row_statistics + planes + rows, mask=inside, other=1.0)
        teacher_max = tl.load(row_statistics + 2 * planes + rows, mask=inside, other=0.0)
        teacher_sum = tl.load(row_statistics + 3 * planes + rows, mask=inside, other=1.0)
        student_part = (weight / student_sum)[None, :] * tl.exp(s - student_max[None, :])
        g = student_part - (weight / teacher_sum)[None, :] * tl.exp(t - teacher_max[None, :])
        total = _add_product(total, g, own_q)
    gradient += pair.to(tl.int64) * length * student_size
    _store(gradient, total * student_scale, start, length, student_size, ADD, KEYS, SIZE)


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
    keep, leaves every batch entry a key. `row_weight` and `divergence` are (B, heads, S), `row_statistics`, scratch that `gradient_k`
    needs, (4, B, heads, S), and gradients as the student, all of them contiguous and float32; with `add` gradients are added to.
    """
    batch, heads, length, size = student_q.shape
    if student_q.numel() == 0:
        return
    inputs = student_q, student_k, teacher_q, teacher_k
    sizes = size, teacher_q.shape[-1]
    shared = (
        *inputs,
        *(stride for x in inputs for stride in x.stride()[:3]),
        heads,
        length,
        *sizes,
        *(d**-0.5 for d in sizes),
        key_mask,
        row_weight,
        row_statistics,
    )
    served, streamed = tile(all(x.element_size() == 2 for x in inputs))
    grid = (batch * heads * triton.cdiv(length, served),)
    options = {"ADD": add, "SIZE": width(*sizes), **launch_options(served)}
    with torch.cuda.device_of(student_q):
        relation_rows_kernel[grid](*shared, divergence, gradient_q, CROSS_ENTROPY=cross_entropy, ROWS=served, KEYS=streamed, **options)
        if gradient_k is not None:
            relation_keys_kernel[grid](*shared, gradient_k, ROWS=streamed, KEYS=served, **options)


def tile(narrow: bool) -> tuple[int, int]:
    """Rows (or keys) that a program serves, and keys (or rows) that it streams at a time, where all inputs are `narrow`: of 16 bits."""
    return (64, 32) if narrow else (32, 16)


def width(*sizes: int) -> int:
    """Columns of every tile: the larger head size as a power of two, of which a product needs 16."""
    return max(16, triton.next_power_of_2(max(sizes)))


def launch_options(served: int) -> dict[str, int]:
    """Eight rows a warp, and leave to use all registers: ptxas would spill to get down to 128."""
    return {"num_warps": served // 8, "num_stages": 2, "maxnreg": 255}
