// The row kernel on the CPU: two rows of logits in, their divergence out, the student's row overwritten by its gradient.
//
// It answers for `softmax_divergence_` of fastkd/ops/rows.py, whose torch backend is its reference. A row of both models (2 x 122 kB at
// a vocabulary of 30 522) stays in the second-level cache over all passes, so memory is read once and written once. The loops are plain
// C++: the compiler vectorises them, exp and log included (glibc's libmvec), for AVX-512, AVX2 and the baseline, and the loader takes
// what the machine has (target_clones). Rows are spread over torch's own thread pool.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <limits>
#include <optional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif
#define INLINED inline __attribute__((always_inline))

namespace {

enum Kind : int64_t { none, forward_kl, reverse_kl, tvd, jsd, skew_kl, skew_rkl };

// logits = softcap * tanh(scale * raw / softcap); softcap 0: scale * raw.
struct Transform {
  double scale, softcap;
  bool identity() const { return scale == 1.0 && softcap == 0.0; }
};

template <typename T>
struct Call {
  T *student, *teacher;  // (rows, V), contiguous; the teacher's rows are scratch once read
  int64_t vocabulary;
  Kind kind;
  double mixing, temperature;
  Transform student_transform, teacher_transform;
  const T* row_weight;
  const int64_t* labels;  // null: no labels
  const T* label_weight;  // null: cross-entropy without gradient
  T *divergence, *cross_entropy, *student_entropy, *teacher_entropy, *top1_agreement;  // entropies and agreement may be null
  bool gradient;
};

template <typename T>
INLINED void transform_row(T* row, int64_t n, Transform transform, T inverse_temperature) {
  const T scale = transform.scale, cap = transform.softcap;
  if (cap != 0) {
    const T inside = scale / cap, outside = cap * inverse_temperature;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] = outside * std::tanh(row[j] * inside);
  } else if (scale * inverse_temperature != 1) {
    const T factor = scale * inverse_temperature;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] *= factor;
  }
}

template <typename T>
INLINED T row_max(const T* row, int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
  return largest;
}

// log sum exp(factor * row), with `largest` the row's maximum.
template <typename T>
INLINED T log_sum_exp(const T* row, int64_t n, T largest, T factor) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += std::exp(factor * (row[j] - largest));
  return factor * largest + std::log(sum);
}

template <typename T>
INLINED int64_t first_max(const T* row, int64_t n, T largest) {
  for (int64_t j = 0; j < n; ++j)
    if (row[j] == largest) return j;
  return 0;
}

// One vocabulary entry: its part of D(p, q), and c = dD / d log q with log q treated as free. 0 * (anything) = 0.
template <typename T, Kind kind>
INLINED void entry(T log_p, T log_q, T mixing, T log_own, T log_other, T& value, T& coefficient) {
  const T p = std::exp(log_p), q = std::exp(log_q);
  if constexpr (kind == forward_kl) {
    value = p == 0 ? T(0) : p * (log_p - log_q);
    coefficient = -p;
  } else if constexpr (kind == reverse_kl) {
    value = q == 0 ? T(0) : q * (log_q - log_p);
    coefficient = value + q;
  } else if constexpr (kind == tvd) {
    const T difference = q - p;
    value = T(0.5) * std::abs(difference);
    coefficient = difference > 0 ? T(0.5) * q : (difference < 0 ? T(-0.5) * q : difference * q);
  } else {
    // log m in log space: both probabilities may underflow.
    const T a = (kind == skew_rkl ? log_q : log_p) + log_own, b = (kind == skew_rkl ? log_p : log_q) + log_other;
    const T high = a > b ? a : b, low = a > b ? b : a;
    const T log_m = high + std::log(1 + std::exp(low - high));
    if constexpr (kind == jsd) {
      const T student = q == 0 ? T(0) : q * (log_q - log_m);
      value = (p == 0 ? T(0) : mixing * p * (log_p - log_m)) + (1 - mixing) * student;
      coefficient = (1 - mixing) * student;
    } else if constexpr (kind == skew_kl) {
      value = p == 0 ? T(0) : p * (log_p - log_m);
      coefficient = p == 0 ? T(0) : -p * std::exp(log_q - log_m + log_other);
    } else {
      value = q == 0 ? T(0) : q * (log_q - log_m);
      coefficient = q == 0 ? T(0) : value + q * (1 - std::exp(log_q - log_m + log_own));
    }
  }
}

// Forward KL in three passes with one exponential an element and model: the exponentials stay in the rows.
template <typename T>
INLINED void forward_kl_row(const Call<T>& call, int64_t row, T* s, T* t) {
  const int64_t n = call.vocabulary;
  const T max_s = row_max(s, n), max_t = row_max(t, n);
  T sum_s = 0, sum_t = 0, cross = 0;
#pragma omp simd reduction(+ : sum_s, sum_t, cross)
  for (int64_t j = 0; j < n; ++j) {
    const T a = s[j] - max_s, b = t[j] - max_t;
    const T e_s = std::exp(a), e_t = std::exp(b);
    sum_s += e_s;
    sum_t += e_t;
    cross += e_t == 0 ? T(0) : e_t * (b - a);  // differences first: the sum stays of the size of the divergence
    s[j] = e_s;
    t[j] = e_t;
  }
  const T temperature = call.temperature;
  call.divergence[row] = temperature * temperature * (cross / sum_t + std::log(sum_s) - std::log(sum_t));
  if (!call.gradient) return;
  const T factor = temperature * call.row_weight[row] * T(call.student_transform.scale);
  const T of_s = factor / sum_s, of_t = factor / sum_t;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) s[j] = s[j] * of_s - t[j] * of_t;
}

template <typename T, Kind kind>
INLINED void any_row(const Call<T>& call, int64_t row, T* s, T* t) {
  const int64_t n = call.vocabulary;
  const T temperature = call.temperature, mixing = call.mixing;
  const T log_own = std::log(mixing), log_other = std::log1p(-mixing);
  const T max_s = row_max(s, n);
  T log_z_s = 0, coefficients = 0;
  if constexpr (kind != none) {
    const T max_t = row_max(t, n);
    log_z_s = log_sum_exp(s, n, max_s, T(1));
    const T log_z_t = log_sum_exp(t, n, max_t, T(1));
    if (call.top1_agreement) call.top1_agreement[row] = first_max(s, n, max_s) == first_max(t, n, max_t);
    if (call.student_entropy) {
      T entropy_s = 0, entropy_t = 0;
#pragma omp simd reduction(+ : entropy_s, entropy_t)
      for (int64_t j = 0; j < n; ++j) {
        const T log_q = s[j] - log_z_s, log_p = t[j] - log_z_t, q = std::exp(log_q), p = std::exp(log_p);
        entropy_s -= q == 0 ? T(0) : q * log_q;
        entropy_t -= p == 0 ? T(0) : p * log_p;
      }
      call.student_entropy[row] = entropy_s;
      call.teacher_entropy[row] = entropy_t;
    }
    T total = 0;
#pragma omp simd reduction(+ : total, coefficients)
    for (int64_t j = 0; j < n; ++j) {
      T value, coefficient;
      entry<T, kind>(t[j] - log_z_t, s[j] - log_z_s, mixing, log_own, log_other, value, coefficient);
      total += value;
      coefficients += coefficient;
      t[j] = coefficient;
    }
    call.divergence[row] = temperature * temperature * total;
  }
  const int64_t label = call.labels ? call.labels[row] : -1;
  T label_factor = 0, log_z_1 = 0;
  T label_logit = 0;
  if (call.labels) {
    call.cross_entropy[row] = 0;
    if (label >= 0) {
      log_z_1 = log_sum_exp(s, n, max_s, temperature);
      label_logit = temperature * s[label];
      call.cross_entropy[row] = log_z_1 - label_logit;
      if (call.label_weight) label_factor = call.label_weight[row];
    }
  }
  if (!call.gradient) return;
  const T weight = kind == none ? T(0) : temperature * call.row_weight[row];
  const T cap = call.student_transform.softcap, scale = call.student_transform.scale;
  // The slope of the transform at a logit z is scale * (1 - (z / cap)^2), scale without a cap (where z may be infinite).
  const auto slope = [=](T tempered) {
    const T capped = cap == 0 ? T(0) : tempered * temperature / cap;
    return scale * (1 - capped * capped);
  };
  const T at_label = label >= 0 ? label_factor * slope(s[label]) : T(0);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T gradient = 0;
    if constexpr (kind != none) gradient = weight * (t[j] - std::exp(s[j] - log_z_s) * coefficients);
    if (label_factor != 0) gradient += label_factor * std::exp(temperature * s[j] - log_z_1);
    s[j] = gradient * slope(s[j]);
  }
  if (label_factor != 0) s[label] -= at_label;
}

template <typename T>
INLINED void rows(const Call<T>& call, int64_t begin, int64_t end) {
  const T inverse_temperature = T(1) / T(call.temperature);
  const bool simple = call.kind == forward_kl && call.student_transform.softcap == 0 && !call.labels && !call.student_entropy;
  for (int64_t row = begin; row < end; ++row) {
    T* s = call.student + row * call.vocabulary;
    T* t = call.teacher ? call.teacher + row * call.vocabulary : nullptr;
    transform_row(s, call.vocabulary, call.student_transform, inverse_temperature);
    if (t) transform_row(t, call.vocabulary, call.teacher_transform, inverse_temperature);
    if (simple) {
      forward_kl_row(call, row, s, t);
      continue;
    }
    switch (call.kind) {
      case none: any_row<T, none>(call, row, s, t); break;
      case forward_kl: any_row<T, forward_kl>(call, row, s, t); break;
      case reverse_kl: any_row<T, reverse_kl>(call, row, s, t); break;
      case tvd: any_row<T, tvd>(call, row, s, t); break;
      case jsd: any_row<T, jsd>(call, row, s, t); break;
      case skew_kl: any_row<T, skew_kl>(call, row, s, t); break;
      case skew_rkl: any_row<T, skew_rkl>(call, row, s, t); break;
    }
  }
}

// target_clones takes no templates: one cloned entry point a type, into which everything above is inlined.
CLONED void rows_float(const Call<float>& call, int64_t begin, int64_t end) { rows(call, begin, end); }
CLONED void rows_double(const Call<double>& call, int64_t begin, int64_t end) { rows(call, begin, end); }

using Optional = std::optional<at::Tensor>;

template <typename T>
T* data(const Optional& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}

template <typename T, typename Run>
void launch(Run run, const at::Tensor& student, const Optional& teacher, int64_t kind, double mixing, double temperature,
            Transform student_transform, Transform teacher_transform, const at::Tensor& row_weight, const Optional& labels,
            const Optional& label_weight, const std::vector<Optional>& out, bool gradient) {
  Call<T> call{student.mutable_data_ptr<T>(), data<T>(teacher), student.size(1), Kind(kind), mixing, temperature,
               student_transform, teacher_transform, row_weight.const_data_ptr<T>(), data<int64_t>(labels), data<T>(label_weight),
               data<T>(out[0]), data<T>(out[1]), data<T>(out[2]), data<T>(out[3]), data<T>(out[4]), gradient};
  at::parallel_for(0, student.size(0), 1, [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

// Tensors: logits (rows, V) and vectors (rows,), all contiguous and of one dtype; labels int64. The caller has checked them.
void softmax_divergence_(at::Tensor student, Optional teacher, int64_t kind, double mixing, double temperature, double student_scale,
                         double student_softcap, double teacher_scale, double teacher_softcap, at::Tensor row_weight, Optional labels,
                         Optional label_weight, std::vector<Optional> out, bool gradient) {
  const Transform of_student{student_scale, student_softcap}, of_teacher{teacher_scale, teacher_softcap};
  TORCH_CHECK(student.is_contiguous() && (!teacher || teacher->is_contiguous()), "logits must be contiguous");
  if (student.scalar_type() == at::kFloat)
    launch<float>(rows_float, student, teacher, kind, mixing, temperature, of_student, of_teacher, row_weight, labels, label_weight, out, gradient);
  else
    launch<double>(rows_double, student, teacher, kind, mixing, temperature, of_student, of_teacher, row_weight, labels, label_weight, out, gradient);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("softmax_divergence_", &softmax_divergence_, py::call_guard<py::gil_scoped_release>());
}
