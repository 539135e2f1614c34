// The CUDA row kernel for sm_90a: two rows of logits in, their divergence and the gradient of the student's row out.
//
// It answers for `softmax_divergence_` of fastkd/ops/rows.py, whose torch backend is its reference; row_math.h has the mathematics. A
// thread-block cluster serves a row: each of its blocks keeps a slice of both models' logits in shared memory over all steps, so that
// a logit is read from global memory once. Every warp reduces by shuffles, a block's first warp its warps' results, and sends the
// block's to every block of the cluster through distributed shared memory. All blocks then merge the same parts in the same order: they
// agree to the last bit, and so does every run.
//
// Invariant: a cluster has read all of its row before it writes any of it, a cluster barrier lying between. So the gradient may lie
// over the student's row, in the same or a narrower dtype, as long as it lies over no other row.
//
// Built by fastkd.csrc.nvcc, called by fastkd/ops/cuda.py through the C function at the end. Nothing is allocated, and the host never
// waits.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "row_math.h"

namespace fastkd {

namespace cg = cooperative_groups;

constexpr int threads = 512;  // and at most 64 registers: two blocks share a multiprocessor where their slices fit
constexpr int warp_size = 32, warps = threads / warp_size;
constexpr int max_cluster = 16;
constexpr int slice_multiple = 8;             // columns: 16 bytes of bf16
constexpr int64_t block_memory = 227 * 1024;  // what sm_90 gives a block

struct Call {
  const void *student, *teacher;
  void* gradient;  // null: not wanted
  int64_t student_stride, teacher_stride, gradient_stride;
  int64_t vocabulary;
  int slice;  // columns of a block
  bool gradient_is_bf16;
  Options options;
  const float* row_weight;
  const int64_t* labels;      // null: none
  const float* label_weight;  // null: cross-entropy without gradient
  float *divergence, *cross_entropy, *student_entropy, *teacher_entropy, *top1_agreement;  // null: not wanted
};

// n neighbours, moved in words of up to 16 bytes.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T at[n];
};

template <int n>
struct Width {
  static constexpr int value = n;
};

template <typename T, int n>
__device__ __forceinline__ Pack<T, n> load(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <typename T, int n>
__device__ __forceinline__ void store(T* to, const float (&values)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) pack.at[i] = static_cast<T>(values[i]);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

template <typename T, int n>
__device__ __forceinline__ void to_logits(float (&logits)[n], const Pack<T, n>& raw, Transform transform) {
#pragma unroll
  for (int i = 0; i < n; ++i) logits[i] = logit(static_cast<float>(raw.at[i]), transform);
}

// body(Width<n>, column) for this thread's share of the columns, ascending: in packs if they are `aligned`, the rest one by one. What
// is read from global memory is unrolled, so that more of it is on its way at a time.
template <int pack, int unrolled, typename Body>
__device__ __forceinline__ void each_column(int count, bool aligned, Body body) {
  const int packed = aligned ? count / pack * pack : 0;
#pragma unroll unrolled
  for (int column = threadIdx.x * pack; column < packed; column += threads * pack) body(Width<pack>{}, column);
#pragma unroll(2 * unrolled)
  for (int column = packed + threadIdx.x; column < count; column += threads) body(Width<1>{}, column);
}

__device__ __forceinline__ bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Part>
struct Parts {
  Part of_warps[warps], of_blocks[max_cluster];
};

// The merger of all the cluster's threads' parts, for every thread. It is a barrier of the cluster; `parts` serves one reduction.
template <typename Part, typename Merge>
__device__ __forceinline__ Part reduce(Part own, Parts<Part>& parts, Merge merge) {
  const cg::cluster_group cluster = cg::this_cluster();
  const auto warp = cg::tiled_partition<warp_size>(cg::this_thread_block());
#pragma unroll 1
  for (int distance = warp_size / 2; distance > 0; distance /= 2) own = merge(own, warp.shfl_xor(own, distance));
  if (warp.thread_rank() == 0) parts.of_warps[warp.meta_group_rank()] = own;
  __syncthreads();
  if (warp.meta_group_rank() == 0) {
    own = parts.of_warps[warp.thread_rank() % warps];
#pragma unroll 1
    for (int distance = warps / 2; distance > 0; distance /= 2) own = merge(own, warp.shfl_xor(own, distance));
    if (warp.thread_rank() < cluster.num_blocks())
      cluster.map_shared_rank(parts.of_blocks, warp.thread_rank())[cluster.block_rank()] = own;
  }
  cluster.sync();
  own = parts.of_blocks[warp.thread_rank() % cluster.num_blocks()];
#pragma unroll 1
  for (int distance = cluster.num_blocks() / 2; distance > 0; distance /= 2) own = merge(own, warp.shfl_xor(own, distance));
  return own;
}

// With `extras` a call may have labels, statistics and soft-caps; without, none of them costs a register.
template <typename Logit, Kind kind, bool extras>
__global__ void __launch_bounds__(threads, extras ? 1 : 2) softmax_divergence(const Call call) {
  constexpr int pack = 16 / sizeof(Logit);
  extern __shared__ __align__(16) unsigned char slices[];
  __shared__ Parts<Statistics> statistics_parts;
  __shared__ Parts<Sums> sums_parts;

  const cg::cluster_group cluster = cg::this_cluster();
  // Arrived at here and waited for below: a block's shared memory may be written to once the block has begun.
  cluster.barrier_arrive();

  Options options = call.options;
  if constexpr (!extras) options.labels = options.stats = false, options.student.softcap = options.teacher.softcap = 0;
  const int64_t row_index = blockIdx.x / cluster.num_blocks();
  const int64_t begin = int64_t(cluster.block_rank()) * call.slice;
  const int64_t left = call.vocabulary - begin;
  const int count = left < 0 ? 0 : (left < call.slice ? int(left) : call.slice);
  const bool first_thread = cluster.thread_rank() == 0;

  const Logit* const student_row = static_cast<const Logit*>(call.student) + row_index * call.student_stride;
  const Logit* const student_from = student_row + begin;
  const Logit* const teacher_from = static_cast<const Logit*>(call.teacher) + row_index * call.teacher_stride + begin;
  Logit* const student = reinterpret_cast<Logit*>(slices);
  Logit* const teacher = student + call.slice;

  int64_t label = -1;
  float label_logit = NAN;  // what a label outside of the vocabulary gives
  if (options.labels) {
    label = call.labels[row_index];
    // Like all of the row, before the first barrier of the cluster.
    if (first_thread && label >= 0 && label < call.vocabulary)
      label_logit = logit(static_cast<float>(student_row[label]), options.student);
  }

  Statistics whole = no_statistics();
  each_column<pack, extras ? 1 : 8 / pack>(count, is_aligned(student_from) && is_aligned(teacher_from), [&](auto width, int column) {
    constexpr int n = decltype(width)::value;
    const Pack<Logit, n> student_raw = load<Logit, n>(student_from + column), teacher_raw = load<Logit, n>(teacher_from + column);
    *reinterpret_cast<Pack<Logit, n>*>(student + column) = student_raw;
    *reinterpret_cast<Pack<Logit, n>*>(teacher + column) = teacher_raw;
    float s[n], t[n];
    to_logits(s, student_raw, options.student);
    to_logits(t, teacher_raw, options.teacher);
    accumulate<kind>(whole, s, t, int(begin) + column, options);
  });
  cluster.barrier_wait();
  whole = reduce(whole, statistics_parts, [&](const Statistics& a, const Statistics& b) { return merge<kind>(a, b, options); });
  const Row row = make_row(whole);

  Sums sums{};
  if (!has_moment<kind> || options.stats) {
    each_column<pack, 1>(count, true, [&](auto width, int column) {
      constexpr int n = decltype(width)::value;
      float s[n], t[n];
      to_logits(s, load<Logit, n>(student + column), options.student);
      to_logits(t, load<Logit, n>(teacher + column), options.teacher);
#pragma unroll
      for (int i = 0; i < n; ++i) add_entry<kind>(sums, s[i], t[i], row, options);
    });
    sums = reduce(sums, sums_parts, [](const Sums& a, const Sums& b) { return merge(a, b); });
  }
  if constexpr (has_moment<kind>) {
    const Sums known = sums_of_moment<kind>(whole, row, options);
    sums.value = known.value, sums.coefficient = known.coefficient;
  }
  // No block reads or writes another's shared memory from here on, so each may end before the others.

  if (first_thread) {
    call.divergence[row_index] = options.temperature * options.temperature * sums.value;
    if (options.labels) call.cross_entropy[row_index] = label < 0 ? 0.0f : cross_entropy(label_logit, whole);
    if (options.stats) {
      call.student_entropy[row_index] = sums.student_entropy;
      call.teacher_entropy[row_index] = sums.teacher_entropy;
      call.top1_agreement[row_index] = whole.student_best == whole.teacher_best;
    }
  }
  if (call.gradient == nullptr) return;

  Factors factors{options.temperature * call.row_weight[row_index], 0.0f, 0.0f};
  if (options.labels && call.label_weight != nullptr && label >= 0) {
    factors.label = call.label_weight[row_index];
    factors.label_share = factors.label / whole.label_sum;
  }
  const int64_t gradient_begin = row_index * call.gradient_stride + begin;
  float* const to_float = static_cast<float*>(call.gradient) + gradient_begin;
  __nv_bfloat16* const to_bf16 = static_cast<__nv_bfloat16*>(call.gradient) + gradient_begin;
  const bool aligned = call.gradient_is_bf16 ? is_aligned(to_bf16) : is_aligned(to_float);
  each_column<pack, 1>(count, aligned, [&](auto width, int column) {
    constexpr int n = decltype(width)::value;
    float s[n], t[n];
    to_logits(s, load<Logit, n>(student + column), options.student);
    to_logits(t, load<Logit, n>(teacher + column), options.teacher);
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = gradient<kind>(s[i], t[i], begin + column + i == label, sums.coefficient, factors, row, options);
    if (call.gradient_is_bf16)
      store(to_bf16 + column, s);
    else
      store(to_float + column, s);
  });
}

template <typename Logit, Kind kind, bool extras>
cudaError_t launch(const Call& call, int64_t rows, int cluster_size, cudaStream_t stream) {
  const auto kernel = softmax_divergence<Logit, kind, extras>;
  constexpr int64_t own_memory = sizeof(Parts<Statistics>) + sizeof(Parts<Sums>);
  const int64_t slices = 2 * int64_t(call.slice) * sizeof(Logit);
  if (slices > block_memory - own_memory || rows * cluster_size > 0x7fffffff) return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(block_memory - own_memory));
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(rows * cluster_size));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(slices);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call);
}

template <typename Logit, Kind kind>
cudaError_t launch_leanest(const Call& call, int64_t rows, int cluster_size, cudaStream_t stream) {
  const Options& options = call.options;
  const bool extras = options.labels || options.stats || options.student.softcap != 0 || options.teacher.softcap != 0;
  const auto launch_one = extras ? launch<Logit, kind, true> : launch<Logit, kind, false>;
  return launch_one(call, rows, cluster_size, stream);
}

template <typename Logit>
cudaError_t launch_kind(int kind, const Call& call, int64_t rows, int cluster_size, cudaStream_t stream) {
  switch (kind) {
    case forward_kl: return launch_leanest<Logit, forward_kl>(call, rows, cluster_size, stream);
    case reverse_kl: return launch_leanest<Logit, reverse_kl>(call, rows, cluster_size, stream);
    case tvd: return launch_leanest<Logit, tvd>(call, rows, cluster_size, stream);
    case jsd: return launch_leanest<Logit, jsd>(call, rows, cluster_size, stream);
    case skew_kl: return launch_leanest<Logit, skew_kl>(call, rows, cluster_size, stream);
    case skew_rkl: return launch_leanest<Logit, skew_rkl>(call, rows, cluster_size, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastkd

// Logits (rows, vocabulary), both float32 or both bf16, and the gradient in either: strides between rows in elements, unit stride along
// the vocabulary. Vectors (rows,) contiguous float32, labels int64. What may be null is said in `Call`. Soft-caps: 0 for none.
// cluster_size is 1, 2, 4, 8 or 16, large enough for the slices to fit (fastkd/ops/cuda.py chooses it). Returns a cudaError_t.
extern "C" int fastkd_softmax_divergence(
    const void* student, const void* teacher, void* gradient, int64_t rows, int64_t vocabulary, int64_t student_stride,
    int64_t teacher_stride, int64_t gradient_stride, int logits_are_bf16, int gradient_is_bf16, int kind, double mixing,
    double temperature, double student_scale, double student_softcap, double teacher_scale, double teacher_softcap,
    const float* row_weight, const int64_t* labels, const float* label_weight, float* divergence, float* cross_entropy,
    float* student_entropy, float* teacher_entropy, float* top1_agreement, int cluster_size, int device, cudaStream_t stream) {
  using namespace fastkd;
  if (rows == 0 || vocabulary == 0) return cudaSuccess;
  const bool known_size = cluster_size >= 1 && cluster_size <= max_cluster && (cluster_size & (cluster_size - 1)) == 0;
  if (!known_size || vocabulary > 0x7fffffff) return cudaErrorInvalidValue;
  const int64_t multiple = int64_t(cluster_size) * slice_multiple;
  Call call{student, teacher, gradient, student_stride, teacher_stride, gradient_stride, vocabulary};
  call.slice = int((vocabulary + multiple - 1) / multiple * slice_multiple);
  call.gradient_is_bf16 = gradient_is_bf16 != 0;
  call.options = make_options(mixing, temperature, {float(student_scale), float(student_softcap)},
                              {float(teacher_scale), float(teacher_softcap)}, labels != nullptr, student_entropy != nullptr);
  call.row_weight = row_weight;
  call.labels = labels;
  call.label_weight = label_weight;
  call.divergence = divergence;
  call.cross_entropy = cross_entropy;
  call.student_entropy = student_entropy;
  call.teacher_entropy = teacher_entropy;
  call.top1_agreement = top1_agreement;
  // The library has a CUDA runtime of its own, which does not see the caller's choice of device.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  return logits_are_bf16 ? launch_kind<__nv_bfloat16>(kind, call, rows, cluster_size, stream)
                         : launch_kind<float>(kind, call, rows, cluster_size, stream);
}

extern "C" const char* fastkd_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
