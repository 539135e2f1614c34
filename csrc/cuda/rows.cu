// The CUDA row kernel for sm_90a: two rows of logits in, their divergence and the gradient of the student's row out.
//
// It answers a `RowCall` of fastkd/ops/row_call.py; row_math.h has the mathematics. A thread-block cluster serves a row: each of its blocks
// keeps a slice of both models' logits in shared memory, in float32, so that a logit is read from global memory once. Rows of float32
// that lie at multiples of 16 bytes are brought by bulk copies in stages; others are loaded by threads. The largest logits are found
// first, while the copies arrive; then sums are taken, relative to them. Every block's first warp sums what its warps have, and sends it
// to every block of the cluster through distributed shared memory. There the same warp merges the same parts in the same order: all
// blocks agree to the last bit, and so does every run.
//
// Invariant: a cluster has read all of its row before it writes any of it, a cluster barrier lying between. So the gradient may lie over
// the student's row, in the same dtype.
//
// fastkd/csrc/nvcc.py compiles it to a cubin, which fastkd/ops/backend_cuda.py launches. Nothing is allocated, and the host never waits.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "row_math.h"

namespace fastkd {

namespace cg = cooperative_groups;

constexpr int threads = 512;  // and at most 64 registers: two blocks share a multiprocessor where their slices fit
constexpr int warp_size = 32, warps = threads / warp_size, max_cluster = 16, stages = 4, pack = 4;
constexpr int stride = threads * pack;  // columns of one step of a block

struct Shared {
  alignas(8) uint64_t full[2][stages];
  float largest[2][warps];
  float of_warps[5][warps];
  Statistics statistics[max_cluster];
  Sums sums[max_cluster];
  Row row;
  Factors factors;
  float teacher_at_peak;
  int peak, teacher_best;
};

__device__ __forceinline__ uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Sums over the block, for its first warp, of each number that `each` calls a function with.
template <int n, typename Each>
__device__ __forceinline__ void block_sum(float (&of_warps)[n][warps], Each each) {
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  int i = 0;
  each([&](float& x) {
    x = warp_sum(x);
    if (lane == 0) of_warps[i][warp] = x;
    ++i;
  });
  __syncthreads();
  if (warp != 0) return;
  i = 0;
  each([&](float& x) { x = warp_sum(lane < warps ? of_warps[i++][lane] : 0.0f); });
}

// body(n, column) for this thread's columns, ascending: `pack` at a time, and the last few one by one. They are the same in every loop, so
// that a thread may change what it alone will read.
template <typename Body>
__device__ __forceinline__ void each_column(int count, Body body) {
  const int even = count / pack * pack;
#pragma unroll 1
  for (int column = threadIdx.x * pack; column < even; column += stride) body(Number<pack>{}, column);
  if (even + threadIdx.x < count) body(Number<1>{}, even + threadIdx.x);
}

// Whether a column of the slice, if it is one, is this thread's.
__device__ __forceinline__ bool owns(int column, int count) {
  const int even = count / pack * pack;
  return unsigned(column) < count && threadIdx.x == (column < even ? column / pack % threads : column - even);
}

// One model's slice of the row.
struct Side {
  const void* from;  // global memory
  const float* bias;
  Transform transform;
  int type, count;
  float* slice;

  __device__ bool is_bulk() const { return type == float32 && is_aligned(from, 16); }
  __device__ bool is_plain() const { return bias == nullptr && transform.scale == 1 && transform.softcap == 0; }
};

__device__ __forceinline__ Side make_side(const void* logits, int type, int64_t row_stride, int64_t row, int begin, int count,
                                          const float* bias, Transform transform, float* slice) {
  const int64_t offset = (row * row_stride + begin) * (type == float32 ? 4 : 2);
  return {static_cast<const char*>(logits) + offset, bias == nullptr ? nullptr : bias + begin, transform, type, count, slice};
}

// Columns of a stage: whole steps, so that a thread has the same columns in every loop.
__device__ __forceinline__ int stage_columns(int count) { return (count + stages * stride - 1) / (stages * stride) * stride; }

// Lets bulk copies bring the slice but for its last few columns, `full` telling of each stage. One thread does.
__device__ __forceinline__ void copy_in_stages(const Side& side, uint64_t (&full)[stages]) {
  const int even = side.count / pack * pack, columns = stage_columns(side.count);
  for (int stage = 0; stage * columns < even; ++stage) {
    const int first = stage * columns;
    const uint32_t bytes = min(columns, even - first) * sizeof(float), barrier = address(&full[stage]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(side.slice + first)),
                 "l"(static_cast<const float*>(side.from) + first), "r"(bytes), "r"(barrier)
                 : "memory");
  }
}

__device__ __forceinline__ void wait(uint64_t& full) {
  asm volatile("{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra W;}" ::"r"(address(&full)) : "memory");
}

template <int n>
__device__ __forceinline__ void read(float (&x)[n], const float* from) {
  if constexpr (n == pack) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    x[0] = *from;
  }
}

// To n neighbours, at once if they are `aligned`.
template <int n, typename T>
__device__ __forceinline__ void write(T* to, const float (&x)[n], bool aligned) {
  struct alignas(n * sizeof(T)) Pack {
    T at[n];
  } values;
#pragma unroll
  for (int i = 0; i < n; ++i) values.at[i] = static_cast<T>(x[i]);
  if (n == 1 || aligned) {
    *reinterpret_cast<Pack*>(to) = values;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = values.at[i];
  }
}

// Loads what is not copied in bulk, turns it into the model's logits and writes these to the slice. Returns the thread's largest.
template <typename T>
__device__ float load(const Side& side, const T* from) {
  float largest = nothing;
  const bool aligned = is_aligned(from, pack * sizeof(T));
  const auto keep = [&](auto n, int column, auto& x) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = logit(side.bias == nullptr ? x[i] : x[i] + side.bias[column + i], side.transform);
      largest = fmaxf(largest, x[i]);
    }
    write<n>(side.slice + column, x, true);
  };
  const int even = side.count / pack * pack;
#pragma unroll 2
  for (int column = threadIdx.x * pack; column < even; column += stride) {
    struct alignas(pack * sizeof(T)) Pack {
      T at[pack];
    } raw;
    if (aligned) {
      raw = *reinterpret_cast<const Pack*>(from + column);
    } else {
#pragma unroll
      for (int i = 0; i < pack; ++i) raw.at[i] = from[column + i];
    }
    float x[pack];
#pragma unroll
    for (int i = 0; i < pack; ++i) x[i] = static_cast<float>(raw.at[i]);
    keep(Number<pack>{}, column, x);
  }
  if (even + threadIdx.x < side.count) {
    float x[1] = {static_cast<float>(from[even + threadIdx.x])};
    keep(Number<1>{}, even + threadIdx.x, x);
  }
  return largest;
}

__device__ __noinline__ float load_any(const Side side, bool is_copied) {
  if (is_copied) return load(side, side.slice);
  if (side.type == bfloat16) return load(side, static_cast<const __nv_bfloat16*>(side.from));
  if (side.type == float16) return load(side, static_cast<const __half*>(side.from));
  return load(side, static_cast<const float*>(side.from));
}

// The slice is in shared memory, as far as this thread's columns go; returns the largest of these.
__device__ __forceinline__ float arrive(const Side& side, uint64_t (&full)[stages]) {
  if (!side.is_bulk()) return load_any(side, false);
  const int even = side.count / pack * pack, columns = stage_columns(side.count), last = even + threadIdx.x;
  float largest = nothing;
  if (last < side.count) largest = side.slice[last] = static_cast<const float*>(side.from)[last];
  const bool is_plain = side.is_plain();
  for (int stage = 0; stage * columns < even; ++stage) {
    wait(full[stage]);
    if (!is_plain) continue;
    const int end = min(even, (stage + 1) * columns);
#pragma unroll 1
    for (int column = stage * columns + threadIdx.x * pack; column < end; column += stride) {
      float x[pack];
      read(x, side.slice + column);
      largest = fmaxf(largest, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
    }
  }
  return is_plain ? largest : load_any(side, true);
}

// The first of this thread's columns that holds its largest logit.
__device__ __forceinline__ int find(const float* slice, int count, float largest) {
  int found = no_column;
  each_column(count, [&](auto n, int column) {
    float x[n];
    read(x, slice + column);
#pragma unroll
    for (int i = n - 1; i >= 0; --i)
      if (x[i] == largest && column + i < found) found = column + i;
  });
  return found;
}

// The cluster's statistics from those of its blocks, one a lane, for all lanes of a warp.
template <Kind kind>
__device__ __forceinline__ Statistics merge(Statistics part, int label_block, const Call& call) {
  raise<kind>(part, warp_max(part.student_from), warp_max(part.teacher_from), warp_max(part.label_from));
  Statistics whole = part;
  whole.student_peak = warp_max(part.student_peak);
  whole.peak = __reduce_min_sync(~0u, part.student_peak == whole.student_peak ? part.peak : no_column);
  const bool has_peak = part.peak != no_column && part.peak == whole.peak;
  if (part.peak != no_column && !has_peak) accumulate<kind>(part, part.student_peak, part.teacher_at_peak, call.rate, call.labels != nullptr);
  whole.teacher_at_peak = __shfl_sync(~0u, part.teacher_at_peak, __ffs(__ballot_sync(~0u, has_peak)) - 1);
  whole.teacher_peak = warp_max(part.teacher_peak);
  whole.teacher_best = __reduce_min_sync(~0u, part.teacher_peak == whole.teacher_peak ? part.teacher_best : no_column);
  each_sum<kind>(part, call.labels != nullptr, [](float& x) { x = warp_sum(x); });
  whole.student_sum = part.student_sum, whole.teacher_sum = part.teacher_sum, whole.label_sum = part.label_sum;
  whole.forward_moment = part.forward_moment, whole.reverse_moment = part.reverse_moment;
  whole.label_logit = __shfl_sync(~0u, part.label_logit, label_block);
  return whole;
}

// With `extras` a call may have labels, statistics and a soft-cap of the student; without, none of them costs an instruction.
template <Kind kind, bool extras>
__device__ __forceinline__ void serve_row(const Call& call) {
  extern __shared__ __align__(16) float slices[];
  __shared__ Shared shared;
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  const int64_t row_index = blockIdx.x / blocks;
  const int begin = rank * call.slice, count = max(0, min(call.slice, call.vocabulary - begin));
  const bool labels = extras && call.labels != nullptr, stats = extras && kind != none && call.student_entropy != nullptr;
  const Side student = make_side(call.student, call.student_type, call.student_stride, row_index, begin, count, call.student_bias,
                                 call.student_transform, slices);
  const Side teacher = make_side(call.teacher, call.teacher_type, call.teacher_stride, row_index, begin, count, call.teacher_bias,
                                 call.teacher_transform, kind == none ? slices : slices + call.slice);

  if (threadIdx.x == 0) {
    shared.peak = shared.teacher_best = no_column;
    for (int stage = 0; stage < stages; ++stage)
      for (int side = 0; side < 2; ++side)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&shared.full[side][stage])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (student.is_bulk()) copy_in_stages(student, shared.full[0]);
    if (kind != none && teacher.is_bulk()) copy_in_stages(teacher, shared.full[1]);
  }
  // Waited for below: a block's shared memory may be written to by others once the block has begun.
  cluster.barrier_arrive();
  __syncthreads();

  // The largest logits, of the thread and of the block.
  const float own_student = arrive(student, shared.full[0]), own_teacher = kind == none ? nothing : arrive(teacher, shared.full[1]);
  const float warp_student = warp_max(own_student), warp_teacher = warp_max(own_teacher);
  if (lane == 0) shared.largest[0][warp] = warp_student, shared.largest[1][warp] = warp_teacher;
  __syncthreads();
  Statistics part = no_statistics();
  part.student_peak = warp_max(shared.largest[0][lane % warps]);
  part.teacher_peak = warp_max(shared.largest[1][lane % warps]);
  part.student_from = bits_of(part.student_peak, call.rate);
  part.teacher_from = bits_of(part.teacher_peak, call.rate);
  part.label_from = bits_of(part.student_peak, log2_e);
  int own_peak = no_column;
  if (own_student == part.student_peak && own_student != nothing) {
    own_peak = find(student.slice, count, own_student);
    atomicMin(&shared.peak, own_peak);
  }
  if (stats && own_teacher == part.teacher_peak) atomicMin(&shared.teacher_best, find(teacher.slice, count, own_teacher));
  __syncthreads();
  // The column held out: nothing is left of it until its thread, the only one to read it, puts it back.
  const int peak_of_block = shared.peak;
  if (own_peak != peak_of_block) own_peak = no_column;
  if (own_peak != no_column) {
    shared.teacher_at_peak = part.teacher_at_peak = teacher.slice[own_peak];
    student.slice[own_peak] = teacher.slice[own_peak] = nothing;
  }

  const auto each_logit = [&](auto body) {
    each_column(count, [&](auto n, int column) {
      float s[n], t[n];
      read(s, student.slice + column);
      read(t, teacher.slice + column);
#pragma unroll
      for (int i = 0; i < n; ++i) body(s[i], t[i]);
    });
  };

  each_logit([&](float s, float t) { accumulate<kind>(part, s, t, call.rate, labels); });
  block_sum(shared.of_warps, [&](auto body) { each_sum<kind>(part, labels, body); });
  const int64_t label = labels ? call.labels[row_index] : -1;
  const bool has_label = label >= 0, knows_label = has_label && label < call.vocabulary;
  const int label_column = knows_label ? int(label) : -1;
  cluster.barrier_wait();
  if (warp == 0) {
    if (peak_of_block != no_column) part.peak = begin + peak_of_block, part.teacher_at_peak = shared.teacher_at_peak;
    if (stats && shared.teacher_best != no_column) part.teacher_best = begin + shared.teacher_best;
    if (labels && unsigned(label_column - begin) < count)
      part.label_logit = label_column == part.peak ? part.student_peak : student.slice[label_column - begin];
    if (lane < blocks) cluster.map_shared_rank(shared.statistics, lane)[rank] = part;
  }
  cluster.sync();
  if (warp == 0) {
    const Statistics own = lane < blocks ? shared.statistics[lane] : no_statistics();
    const float log_rest = call.teacher_rest ? call.teacher_rest[row_index] : nothing;
    const Row row = make_row<kind>(merge<kind>(own, knows_label ? label_column / call.slice : 0, call), call.rate, labels, log_rest);
    if (lane == 0) {
      shared.row = row;
      if (!knows_label) shared.row.whole.label_logit = NAN;
    }
  }
  __syncthreads();
  const Row row = shared.row;
  if (own_peak != no_column && begin + own_peak != row.whole.peak) {
    student.slice[own_peak] = part.student_peak, teacher.slice[own_peak] = part.teacher_at_peak;
    own_peak = no_column;
  }

  Sums sums{};
  if ((kind != none && !has_moment<kind>) || stats) {
    each_logit([&](float s, float t) { add_entry<kind>(sums, s, t, row, call, stats); });
    block_sum(shared.of_warps, [&](auto body) { each_sum<kind>(sums, stats, body); });
    if (warp == 0 && lane < blocks) cluster.map_shared_rank(shared.sums, lane)[rank] = sums;
    cluster.sync();
    if (warp == 0) {
      sums = lane < blocks ? shared.sums[lane] : Sums{};
      each_sum<kind>(sums, stats, [](float& x) { x = warp_sum(x); });
    }
  }
  // No block reads or writes another's shared memory from here on, so each may end before the others.

  if (threadIdx.x == 0) {
    const float label_weight = knows_label && call.label_weight != nullptr ? call.label_weight[row_index] : 0.0f;
    shared.factors = finish<kind>(sums, row, call, call.row_weight[row_index], label_weight, label_column);
    if (rank == 0) {
      if constexpr (kind != none) call.divergence[row_index] = call.temperature * call.temperature * sums.value;
      if (labels) call.cross_entropy[row_index] = has_label ? cross_entropy(row) : 0.0f;
      if (stats) {
        call.student_entropy[row_index] = sums.student_entropy * ln_2;
        call.teacher_entropy[row_index] = sums.teacher_entropy * ln_2;
        call.top1_agreement[row_index] = row.whole.peak == row.whole.teacher_best;
        call.acceptance[row_index] = sums.acceptance;
      }
    }
  }
  if (call.gradient == nullptr) return;
  __syncthreads();
  const Factors factors = shared.factors;
  const int own_label = factors.label != 0 && owns(label_column - begin, count) ? label_column - begin : no_column;
  const auto fill = [&](auto* to, auto aligned) {
    const auto gradient_at = [&](float s, float t) {
      return gradient<kind>(s, t, factors, row, call, labels) * (extras ? slope(s, call.student_transform) : 1.0f);
    };
    each_column(count, [&](auto n, int column) {
      float s[n], t[n];
      read(s, student.slice + column);
      read(t, teacher.slice + column);
#pragma unroll
      for (int i = 0; i < n; ++i) s[i] = gradient_at(s[i], t[i]);
      write<n>(to + column, s, aligned);
    });
    const auto put = [&](int column, float value) { write<1>(to + column, {value}, true); };
    if (own_label != no_column) {
      const float s = student.slice[own_label];
      put(own_label, gradient_at(s, teacher.slice[own_label]) - factors.label * slope(s, call.student_transform));
    }
    if (own_peak != no_column) put(own_peak, factors.at_peak);
  };
  const int64_t offset = row_index * call.gradient_stride + begin;
  const auto fill_type = [&](auto* to) { is_aligned(to, pack * sizeof(*to)) ? fill(to, Number<1>{}) : fill(to, Number<0>{}); };
  if (call.gradient_type == bfloat16)
    fill_type(static_cast<__nv_bfloat16*>(call.gradient) + offset);
  else if (call.gradient_type == float16)
    fill_type(static_cast<__half*>(call.gradient) + offset);
  else
    fill_type(static_cast<float*>(call.gradient) + offset);
}

}  // namespace fastkd

#define KERNEL(kind, extras, name)                                                                                      \
  extern "C" __global__ void __launch_bounds__(fastkd::threads, 2) name(const __grid_constant__ fastkd::Call call) { \
    fastkd::serve_row<fastkd::kind, extras>(call);                                                                      \
  }
#define KERNELS(kind) KERNEL(kind, false, rows_##kind) KERNEL(kind, true, rows_##kind##_extras)

KERNELS(forward_kl)
KERNELS(reverse_kl)
KERNELS(mixed)
KERNELS(tvd)
KERNELS(nla)
KERNELS(jsd)
KERNELS(skew_kl)
KERNELS(skew_rkl)
KERNEL(none, true, rows_none_extras)
