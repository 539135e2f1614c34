// The row kernel on the CPU: two rows of logits in, their divergence and the gradient of the student's row out.
//
// It answers a `RowCall` of fastkd/ops/row_call.py. A row of both models (2 x 122 kB at a vocabulary of 30 522) stays in the second-level
// cache over all passes, so memory is read once and written once. Rows of the compute type are worked on in place unless the caller
// keeps them; others are upcast into two scratch rows a thread. A gradient of another type is rounded at the end. The loops are plain
// C++: the compiler vectorises them, exp and log included (glibc's libmvec), for AVX-512, AVX2 and the baseline, of which the machine's
// best is taken (`variants`). Rows are spread over torch's own thread pool.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numbers>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "logits.h"

namespace {

using namespace fastkd;

// What a top-k teacher lists, (rows, entries) each; `ids` is null where the teacher is dense, or there is none.
template <typename T>
struct Lists {
  int64_t entries;
  const int64_t* ids;  // below zero: no entry
  const T *log_probabilities, *log_tail;  // log_tail null: nothing beside the list
  bool renormalizes;
};

template <typename T>
struct Call {
  Matrix student, teacher, gradient;  // rows of logits are scratch once read, unless `keeps_logits`
  bool keeps_logits;
  int64_t vocabulary;
  Kind kind;
  double mixing, temperature;
  Transform student_transform, teacher_transform;
  const T *student_bias, *teacher_bias;  // null: none
  const T* teacher_rest;  // null: none
  Lists<T> lists;
  const T* row_weight;
  const int64_t* labels;  // null: no labels
  const T* label_weight;  // null: cross-entropy without gradient
  T *divergence, *cross_entropy;
  T *student_entropy, *teacher_entropy, *top1_agreement, *acceptance;  // null, all of them: not wanted
};

constexpr int64_t kBlock = 1024, kPart = 64;
constexpr size_t kLine = 64;  // bytes

// What forward_kl_row keeps of a block: its references, and then its factors; sums.
template <typename T>
struct Block {
  T max_s, max_t, sum_s, sum_t, cross;
};

// `to` may begin where `from` does if its type is narrower: a block is wholly read before it is written, and element j of `to` lies
// over no element of `from` past j. memcpy, because that memory holds both types.
template <typename T, typename To>
INLINED void round_row(const T* from, int64_t n, To* to) {
  To block[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) block[j] = rounded<To>(from[start + j]);
    std::memcpy(to + start, block, size * sizeof(To));
  }
}

template <typename T>
INLINED void store(const T* from, const Matrix& gradient, int64_t row, int64_t n) {
  switch (gradient.type) {
    case at::kFloat: return round_row(from, n, gradient.row<float>(row));
    case at::kDouble: return round_row(from, n, gradient.row<double>(row));
    case at::kHalf: return round_row(from, n, gradient.row<at::Half>(row));
    default: return round_row(from, n, gradient.row<at::BFloat16>(row));
  }
}

template <typename T>
INLINED T row_max(const T* row, int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
  return largest;
}

template <typename T>
INLINED T row_sum(const T* row, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += row[j];
  return sum;
}

// sum exp(factor * (row - largest)), with `largest` the row's maximum.
template <typename T>
INLINED T exp_sum(const T* row, int64_t n, T largest, T factor) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp_of_negative(factor * (row[j] - largest));
  return sum;
}

template <typename T>
INLINED T log_sum_exp(const T* row, int64_t n, T largest, T factor) {
  return factor * largest + std::log(exp_sum(row, n, largest, factor));
}

template <typename T>
INLINED int64_t first_max(const T* row, int64_t n, T largest) {
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t end = std::min(start + kPart, n);
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = start; j < end; ++j) found |= row[j] == largest;
    if (!found) continue;
    for (int64_t j = start; j < end; ++j)
      if (row[j] == largest) return j;
  }
  return 0;
}

// How the teacher's mass is split, from the log-sum over the row's columns; all of it is theirs where nothing else is told of.
template <typename T>
INLINED Rest<T> rest_of(const Call<T>& call, int64_t row, T log_columns) {
  return call.teacher_rest ? split<Math>(call.teacher_rest[row] - log_columns) : Rest<T>{};
}

// Whether a row's largest probability, 1 / sum, is above a half. Its entry of the gradient is then minus the sum of the others: the row
// sums to zero, and c - q sum(c) would be left to rounding. At a smaller probability c - q sum(c) is the more exact of the two.
template <typename T>
INLINED bool is_peaked(T sum) {
  return sum < 2;
}

// Forward KL in two passes with one exponential an element and model. The first goes from block to block, each in the first-level cache:
// exponentials, which stay, are relative to the largest logit up to their block, and what is summed of a block is brought to the row's
// largest at the end. Tempered logits are (row + bias) times `of_student` or `of_teacher`, which are positive. Exponentials are written to
// `s` and `t`: rows that stay in the cache, or those that they are made of. `blocks` has room for every block. The gradient is written to
// `g`, which may be `s`; null: not wanted.
template <typename T>
INLINED void forward_kl_row(const Call<T>& call, int64_t row, const T* student, const T* teacher, T* s, T* t, T* g, T of_student,
                            T of_teacher, Block<T>* blocks) {
  const int64_t n = call.vocabulary;
  // Exponents are of two: a product less an element.
  const T two_s = of_student * std::numbers::log2e_v<T>, two_t = of_teacher * std::numbers::log2e_v<T>;
  // Lowest, not -infinity: where a block and all before it are -infinity, their distance to it still is.
  T max_s = std::numeric_limits<T>::lowest(), max_t = max_s;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    T *const s_block = s + start, *const t_block = t + start;
    add_bias(student + start, call.student_bias ? call.student_bias + start : nullptr, size, s_block);
    add_bias(teacher + start, call.teacher_bias ? call.teacher_bias + start : nullptr, size, t_block);
    max_s = std::max(max_s, row_max(s_block, size));
    max_t = std::max(max_t, row_max(t_block, size));
    T sum_s = 0, sum_t = 0, cross = 0;
    for (int64_t part = 0; part < size; part += kPart) {
      // The next block is fetched while this one is computed.
      for (int64_t j = part; j < part + kPart; j += kLine / sizeof(T)) {
        __builtin_prefetch(student + start + kBlock + j);
        __builtin_prefetch(teacher + start + kBlock + j);
      }
      const int64_t end = std::min(part + kPart, size);
#pragma omp simd reduction(+ : sum_s, sum_t, cross)
      for (int64_t j = part; j < end; ++j) {
        const T a = two_s * (s_block[j] - max_s), b = two_t * (t_block[j] - max_t);
        const T e_s = exp2_of_negative(a), e_t = exp2_of_negative(b);
        sum_s += e_s;
        sum_t += e_t;
        cross += e_t == 0 ? T(0) : e_t * (b - a);  // differences first: the sum stays of the size of the divergence
        s_block[j] = e_s;
        t_block[j] = e_t;
      }
    }
    blocks[start / kBlock] = {max_s, max_t, sum_s, sum_t, cross};
  }
  T sum_s = 0, sum_t = 0, cross = 0;
  int64_t peak_block = -1;
  for (int64_t start = 0; start < n; start += kBlock) {
    Block<T>& block = blocks[start / kBlock];
    if (peak_block < 0 && block.max_s == max_s) peak_block = start;
    const T a = two_s * (block.max_s - max_s), b = two_t * (block.max_t - max_t);
    block.max_s = exp2_of_negative(a);
    block.max_t = exp2_of_negative(b);
    sum_s += block.max_s * block.sum_s;
    sum_t += block.max_t * block.sum_t;
    cross += block.max_t == 0 ? T(0) : block.max_t * (block.cross + block.sum_t * (b - a));
  }
  const T temperature = call.temperature;
  // One logarithm: of two large sums, as a high temperature makes them, the difference would be left to rounding.
  const T of_columns = cross / sum_t * std::numbers::ln2_v<T> + std::log(sum_s / sum_t);
  const Rest<T> rest = rest_of(call, row, max_t * of_teacher + std::log(sum_t));
  const T mass = std::exp(rest.log_columns);
  call.divergence[row] = temperature * temperature * mass * (of_columns + rest.log_columns);
  if (!g) return;
  const T factor = temperature * call.row_weight[row] * T(call.student_transform.scale) * mass;
  int64_t peak = -1;
  if (is_peaked(sum_s)) {
    // Its exponential is 1, and no other is: two of them make a sum of 2.
    peak = peak_block + first_max(s + peak_block, std::min(kBlock, n - peak_block), T(1));
    s[peak] = t[peak] = 0;
    Block<T>& block = blocks[peak / kBlock];
    block.sum_s = row_sum(s + peak_block, std::min(kBlock, n - peak_block));
    block.sum_t = row_sum(t + peak_block, std::min(kBlock, n - peak_block));
  }
  T others = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const Block<T>& block = blocks[start / kBlock];
    const T of_s = factor / sum_s * block.max_s, of_t = factor / sum_t * block.max_t;
    const int64_t end = std::min(start + kBlock, n);
    others += block.sum_s * of_s - block.sum_t * of_t;
#pragma omp simd
    for (int64_t j = start; j < end; ++j) g[j] = s[j] * of_s - t[j] * of_t;
  }
  if (peak >= 0) g[peak] = -others;
}

// Of the gradient: what the divergence gives, and what the label does.
template <typename T>
struct Terms {
  T divergence, label;
};

// The slope of a transform at the logit z, which is temperature * tempered: scale * (1 - (z / cap)^2).
template <typename T>
struct Slope {
  T scale, cap, temperature;  // cap 0: the slope is `scale`, and z may be infinite

  template <bool has_cap>
  T at(T tempered) const {
    if constexpr (!has_cap) return scale;
    const T capped = tempered * temperature / cap;
    return scale * (1 - capped * capped);
  }
  T operator()(T tempered) const { return cap == 0 ? scale : at<true>(tempered); }
};

// The gradient of a row, of which `divergence` of a column is one part and a label's softmax the other, without its -1 at the label. Returns
// the parts' sums before the slope.
template <bool has_label, bool has_cap, typename T, typename Divergence>
INLINED Terms<T> gradient_row(const T* s, T* g, int64_t n, T label_weight, T log_z_label, Slope<T> slope, Divergence divergence) {
  T of_divergence = 0, of_label = 0;
#pragma omp simd reduction(+ : of_divergence, of_label)
  for (int64_t j = 0; j < n; ++j) {
    T gradient = divergence(j);
    of_divergence += gradient;
    if constexpr (has_label) {
      const T q = exp_of_negative(slope.temperature * s[j] - log_z_label);
      of_label += q;
      gradient += label_weight * q;
    }
    g[j] = gradient * slope.template at<has_cap>(s[j]);
  }
  return {of_divergence, label_weight * of_label};
}

// A loop of its own for every case: the compiler makes one that computes the parts of a label and of a cap for every row.
template <typename T, typename Divergence>
INLINED Terms<T> fill_gradient(const T* s, T* g, int64_t n, T label_weight, T log_z_label, Slope<T> slope, Divergence divergence) {
  if (label_weight != 0 && slope.cap != 0) return gradient_row<true, true>(s, g, n, label_weight, log_z_label, slope, divergence);
  if (label_weight != 0) return gradient_row<true, false>(s, g, n, label_weight, log_z_label, slope, divergence);
  if (slope.cap != 0) return gradient_row<false, true>(s, g, n, label_weight, log_z_label, slope, divergence);
  return gradient_row<false, false>(s, g, n, label_weight, log_z_label, slope, divergence);
}

template <typename T, Kind kind>
INLINED void any_row(const Call<T>& call, int64_t row, T* s, T* t, T* g) {
  const int64_t n = call.vocabulary;
  const T temperature = call.temperature;
  const Mixing<T> mixing = make_mixing(T(call.mixing));
  const Slope<T> slope{T(call.student_transform.scale), T(call.student_transform.softcap), temperature};
  const T max_s = row_max(s, n);
  T log_z_t = 0, c_sum = 0;
  Terms<T> log_z{}, weight{};  // at the temperature, and at 1
  Rest<T> rest{};
  if constexpr (kind != none) {
    const T max_t = row_max(t, n);
    log_z.divergence = log_sum_exp(s, n, max_s, T(1));
    log_z_t = log_sum_exp(t, n, max_t, T(1));
    rest = rest_of(call, row, log_z_t);
    log_z_t -= rest.log_columns;
    weight.divergence = temperature * call.row_weight[row];
    if (call.student_entropy) {
      T entropy_s = 0, entropy_t = 0, accepted = 0;
#pragma omp simd reduction(+ : entropy_s, entropy_t, accepted)
      for (int64_t j = 0; j < n; ++j) {
        const T log_q = s[j] - log_z.divergence, log_p = t[j] - log_z_t, q = exp_of_negative(log_q), p = exp_of_negative(log_p);
        entropy_s -= q == 0 ? T(0) : q * log_q;
        entropy_t -= p == 0 ? T(0) : p * log_p;
        accepted += std::min(p, q);
      }
      call.student_entropy[row] = entropy_s;
      call.teacher_entropy[row] = entropy_t - weighted(rest.probability, std::log(rest.probability));
      call.top1_agreement[row] = first_max(s, n, max_s) == first_max(t, n, max_t);
      call.acceptance[row] = accepted + T(0) * (log_z.divergence + log_z_t);  // undefined logits show
    }
  }
  const int64_t label = call.labels ? call.labels[row] : -1;
  if (call.labels) call.cross_entropy[row] = 0;
  if (label >= 0) {
    log_z.label = log_sum_exp(s, n, max_s, temperature);
    call.cross_entropy[row] = log_z.label - temperature * s[label];
    if (call.label_weight) weight.label = call.label_weight[row];
  }
  const T at_label = label >= 0 ? weight.label * slope(s[label]) : T(0);
  const bool divergence_peaks = kind != none && is_peaked(std::exp(log_z.divergence - max_s));
  const bool label_peaks = weight.label != 0 && is_peaked(std::exp(log_z.label - temperature * max_s));
  const int64_t peak = divergence_peaks || label_peaks ? first_max(s, n, max_s) : -1;
  const T s_peak = peak < 0 ? T(0) : s[peak];
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  if constexpr (kind != none) {
    // Both probabilities of a peak may be nearly 1: their difference, too, is minus the sum of the others.
    const bool is_balanced = has_distance<kind> && divergence_peaks;
    const T t_peak = peak < 0 ? T(0) : t[peak];
    if (is_balanced) s[peak] = t[peak] = nothing;
    T total = rest_value<kind>(mixing) * rest.probability, balance = -rest.probability, accepted = 0;
#pragma omp simd reduction(+ : total, c_sum, balance, accepted)
    for (int64_t j = 0; j < n; ++j) {
      const T log_p = t[j] - log_z_t, log_q = s[j] - log_z.divergence;
      const T p = exp_of_negative(log_p), q = exp_of_negative(log_q);
      const Entry<T> entry = make_entry<kind, Math>(p, q, log_p, log_q, mixing);
      if constexpr (has_distance<kind>) balance += q - p;
      if constexpr (kind == nla) accepted += std::min(p, q);
      total += entry.value;
      c_sum += entry.coefficient;
      t[j] = entry.coefficient;
    }
    if (is_balanced) {
      const T q = exp_of_negative(s_peak - log_z.divergence);
      const Entry<T> entry = distance_entry<kind>(q, -balance);
      accepted += std::min(q, exp_of_negative(t_peak - log_z_t));
      total += entry.value;
      c_sum += entry.coefficient;
      t[peak] = entry.coefficient;
    }
    if constexpr (kind == nla) {
      total = negative_log(accepted, total);
      weight.divergence /= accepted;
    }
    call.divergence[row] = temperature * temperature * total;
  }
  if (!g) return;
  Terms<T> at_peak{};
  if (peak >= 0) {
    if constexpr (kind != none) {
      at_peak.divergence = weight.divergence * (t[peak] - exp_of_negative(s_peak - log_z.divergence) * c_sum);
      t[peak] = 0;
    }
    if (weight.label != 0) at_peak.label = weight.label * (exp_of_negative(temperature * s_peak - log_z.label) - (label == peak));
    s[peak] = nothing;
  }
  Terms<T> others = fill_gradient(s, g, n, weight.label, log_z.label, slope, [=](int64_t j) __attribute__((always_inline)) {
    if constexpr (kind == none) return T(0);
    return weight.divergence * (t[j] - exp_of_negative(s[j] - log_z.divergence) * c_sum);
  });
  if (weight.label != 0) {
    g[label] -= at_label;
    if (label != peak) others.label -= weight.label;
  }
  if (peak < 0) return;
  if (divergence_peaks && std::isfinite(c_sum)) at_peak.divergence = -others.divergence;
  if (label_peaks) at_peak.label = -others.label;
  g[peak] = (at_peak.divergence + at_peak.label) * slope(s_peak);
}

#include "topk.h"

template <typename T>
INLINED void rows(const Call<T>& call, int64_t begin, int64_t end) {
  constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const int64_t n = call.vocabulary;
  const T inverse_temperature = T(1) / T(call.temperature);
  const T of_student = T(call.student_transform.scale) * inverse_temperature;
  const T of_teacher = T(call.teacher_transform.scale) * inverse_temperature;
  const bool is_linear = call.student_transform.softcap == 0 && call.teacher_transform.softcap == 0 && of_student > 0 && of_teacher > 0;
  const bool may_be_simple = call.kind == forward_kl && call.teacher.data && is_linear && !call.student_entropy;
  const bool has_scratch = call.keeps_logits || call.student.type != type || (call.teacher.data && call.teacher.type != type);
  const auto scratch = std::make_unique_for_overwrite<T[]>(has_scratch || may_be_simple ? 2 * n : 0);
  const auto events = std::make_unique_for_overwrite<Event<T>[]>(call.lists.entries + 1);
  const auto blocks = std::make_unique_for_overwrite<Block<T>[]>(may_be_simple ? (n + kBlock - 1) / kBlock : 0);
  const bool rounds = call.gradient.data && call.gradient.type != type;
  for (int64_t row = begin; row < end; ++row) {
    T* const student = load(call.student, row, n, scratch.get());
    T* const teacher = call.teacher.data ? load(call.teacher, row, n, scratch.get() + n) : nullptr;
    const bool has_label = call.labels && call.labels[row] >= 0;
    const bool is_simple = may_be_simple && !has_label;
    T* const s = call.keeps_logits ? scratch.get() : student;
    T* const t = call.keeps_logits || is_simple ? scratch.get() + n : teacher;
    T* const g = !call.gradient.data ? nullptr : rounds ? s : call.gradient.template row<T>(row);
    if (is_simple) {
      if (call.labels) call.cross_entropy[row] = 0;
    } else {
      add_bias(student, call.student_bias, n, s);
      transform_row(s, n, call.student_transform, inverse_temperature);
      if (teacher) {
        add_bias(teacher, call.teacher_bias, n, t);
        transform_row(t, n, call.teacher_transform, inverse_temperature);
      }
    }
    if (call.lists.ids) topk_row(call, row, s, g, events.get());
    else if (is_simple) forward_kl_row(call, row, student, teacher, s, t, g, of_student, of_teacher, blocks.get());
    else switch (call.kind) {
      case none: any_row<T, none>(call, row, s, t, g); break;
      case forward_kl: any_row<T, forward_kl>(call, row, s, t, g); break;
      case reverse_kl: any_row<T, reverse_kl>(call, row, s, t, g); break;
      case mixed: any_row<T, mixed>(call, row, s, t, g); break;
      case tvd: any_row<T, tvd>(call, row, s, t, g); break;
      case nla: any_row<T, nla>(call, row, s, t, g); break;
      case jsd: any_row<T, jsd>(call, row, s, t, g); break;
      case skew_kl: any_row<T, skew_kl>(call, row, s, t, g); break;
      case skew_rkl: any_row<T, skew_rkl>(call, row, s, t, g); break;
    }
    if (rounds) store(s, call.gradient, row, n);
  }
}

// One machine code of the kernel: an entry point a type, into which everything above is inlined for the processor that `target` names.
struct Variant {
  const char* name;
  void (*of_float)(const Call<float>&, int64_t, int64_t);
  void (*of_double)(const Call<double>&, int64_t, int64_t);
};

#define VARIANT(name, target)                                                                               \
  target void name(const Call<float>& call, int64_t begin, int64_t end) { rows(call, begin, end); }   \
  target void name(const Call<double>& call, int64_t begin, int64_t end) { rows(call, begin, end); }

VARIANT(baseline, )
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
VARIANT(avx2, __attribute__((target("arch=x86-64-v3"))))
VARIANT(avx512, __attribute__((target("arch=x86-64-v4"))))
#endif

// The variants that this CPU has, the fastest first.
std::vector<Variant> make_variants() {
  std::vector<Variant> here;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) here.push_back({"avx512", avx512, avx512});
  if (__builtin_cpu_supports("x86-64-v3")) here.push_back({"avx2", avx2, avx2});
#endif
  here.push_back({"baseline", baseline, baseline});
  return here;
}

const std::vector<Variant> variants = make_variants();
const Variant* chosen = &variants.front();

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const Variant& variant : variants) names.push_back(variant.name);
  return names;
}

void choose_variant(const std::string& name) {
  const auto found = std::find_if(variants.begin(), variants.end(), [&](const Variant& variant) { return name == variant.name; });
  TORCH_CHECK(found != variants.end(), "this CPU has no variant ", name, " of the row kernel");
  chosen = &*found;
}

// Matrices (rows, V) with stride 1 along V; vectors (rows,) of one dtype, float or double, and labels int64. Of a top-k teacher `lists` are
// ids (rows, K) int64, log-probabilities (rows, K) and the log of the others' mass (rows,), in that dtype; null: zero mass.
void softmax_divergence_(at::Tensor student, Optional teacher, int64_t kind, double mixing, double temperature, double student_scale,
                         double student_softcap, double teacher_scale, double teacher_softcap, Optional student_bias,
                         Optional teacher_bias, Optional teacher_rest, at::Tensor row_weight, Optional labels, Optional label_weight,
                         std::vector<Optional> out, Optional gradient, bool keeps_logits, std::vector<Optional> lists, bool renormalizes) {
  const auto launch = [&]<typename T>(void (*run)(const Call<T>&, int64_t, int64_t)) {
    const Call<T> call{matrix(student, student), matrix(teacher, student), matrix(gradient, student), keeps_logits, student.size(1),
                       Kind(kind), mixing, temperature, {student_scale, student_softcap}, {teacher_scale, teacher_softcap},
                       data<T>(student_bias), data<T>(teacher_bias), data<T>(teacher_rest),
                       {lists[0] ? lists[0]->size(1) : 0, data<int64_t>(lists[0]), data<T>(lists[1]), data<T>(lists[2]), renormalizes},
                       data<T>(row_weight), data<int64_t>(labels), data<T>(label_weight), data<T>(out[0]), data<T>(out[1]), data<T>(out[2]),
                       data<T>(out[3]), data<T>(out[4]), data<T>(out[5])};
    at::parallel_for(0, student.size(0), 1, [&](int64_t begin, int64_t end) { run(call, begin, end); });
  };
  row_weight.scalar_type() == at::kFloat ? launch(chosen->of_float) : launch(chosen->of_double);
}

}  // namespace

// csrc/cpu/slots.cpp
void slot_logits_(at::Tensor raw, Optional bias, at::Tensor order, at::Tensor ends, at::Tensor out, at::Tensor rest, double scale,
                  double softcap, double temperature);
// csrc/cpu/gemm.cpp
bool has_mm_16bit();
void mm_16bit_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool own);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  module.def("softmax_divergence_", &softmax_divergence_, without_gil);
  module.def("variants", &variant_names);
  module.def("variant", [] { return chosen->name; });
  module.def("choose_variant", &choose_variant);
  module.def("slot_logits_", &slot_logits_, without_gil);
  module.def("has_mm_16bit", &has_mm_16bit);
  module.def("has_bf16_gemm", &has_bf16_gemm);
  module.def("mm_16bit_", &mm_16bit_, without_gil);
}
