// The mathematics of one row, for the CUDA kernel (rows.cu) and for any C++ compiler, which is how it is tested without a GPU.
//
// fastkd/ops/rows.py states the formulas. A row is taken in two or three steps, whose partial results merge in any order:
//   1. `accumulate` its logits into `Statistics`: both maxima and normalisers, online; forward and reverse KL are complete after it,
//      since their sum over the row is a moment of the difference of the logits, which is rescaled as the maxima move;
//   2. where that is not enough (the other divergences; entropies), `add_entry` every logit into `Sums`;
//   3. `gradient` of every logit.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SHARED_CODE __host__ __device__ __forceinline__
#else
#define SHARED_CODE inline
#endif

namespace fastkd {

enum Kind : int { forward_kl = 1, reverse_kl, tvd, jsd, skew_kl, skew_rkl };

// Whether the divergence is known after the first step.
template <Kind kind>
constexpr bool has_moment = kind == forward_kl || kind == reverse_kl;

// What a model does to the head's output: logit = softcap * tanh(scale * raw / softcap); softcap 0: scale * raw.
struct Transform {
  float scale, softcap;
};

struct Options {
  float temperature, inverse_temperature;
  float mixing, log_own, log_other;  // log_own = log(mixing), log_other = log(1 - mixing)
  Transform student, teacher;
  bool labels, stats;
};

inline Options make_options(double mixing, double temperature, Transform student, Transform teacher, bool labels, bool stats) {
  return {float(temperature), float(1 / temperature), float(mixing), float(std::log(mixing)), float(std::log1p(-mixing)),
          student, teacher, labels, stats};
}

SHARED_CODE float logit(float raw, Transform transform) {
  const float scaled = raw * transform.scale;
  return transform.softcap == 0 ? scaled : transform.softcap * tanhf(scaled / transform.softcap);
}

// d logit / d raw. Without a soft-cap the logit may be infinite.
SHARED_CODE float slope(float logit, Transform transform) {
  const float capped = transform.softcap == 0 ? 0.0f : logit / transform.softcap;
  return transform.scale * (1 - capped * capped);
}

// A maximum that can be subtracted: what is -inf so far has none yet.
SHARED_CODE float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// probability * factor, with 0 * (anything, infinite or undefined) = 0; NaN shows.
SHARED_CODE float weighted(float probability, float factor) { return probability == 0 ? 0.0f : probability * factor; }

// ---- 1. Statistics of a part of a row

constexpr int no_column = 0x7fffffff;

struct Statistics {
  float student_max, teacher_max;
  float student_sum, teacher_sum;  // sum exp((logit - max) / T)
  float label_sum;                 // sum exp(logit - max) of the student; only with labels
  float moment;  // sum w ((t - teacher_max) - (s - student_max)), w the terms of teacher_sum (forward KL) or student_sum (reverse)
  int student_best, teacher_best;  // first columns of the maxima; only with stats
};

SHARED_CODE Statistics no_statistics() { return {-INFINITY, -INFINITY, 0, 0, 0, 0, no_column, no_column}; }

// The same sums, from maxima that are no smaller.
template <Kind kind>
SHARED_CODE void raise(Statistics& part, float student_max, float teacher_max, const Options& options) {
  const float student = finite(student_max), teacher = finite(teacher_max);
  const float student_kept = expf((part.student_max - student) * options.inverse_temperature);
  const float teacher_kept = expf((part.teacher_max - teacher) * options.inverse_temperature);
  if constexpr (has_moment<kind>) {
    const float shift = (teacher - student) - (finite(part.teacher_max) - finite(part.student_max));
    const float weight_sum = kind == forward_kl ? part.teacher_sum : part.student_sum;
    part.moment = weighted(kind == forward_kl ? teacher_kept : student_kept, part.moment - shift * weight_sum);
  }
  if (options.labels) part.label_sum *= expf(part.student_max - student);
  part.student_sum *= student_kept;
  part.teacher_sum *= teacher_kept;
  part.student_max = student_max;
  part.teacher_max = teacher_max;
}

// Add n columns from `column` on. Of equal logits the first is the best: a part must be given its columns in ascending order.
template <Kind kind, int n>
SHARED_CODE void accumulate(Statistics& part, const float (&s)[n], const float (&t)[n], int column, const Options& options) {
  float student_max = part.student_max, teacher_max = part.teacher_max;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    student_max = fmaxf(student_max, s[i]);
    teacher_max = fmaxf(teacher_max, t[i]);
  }
  if (options.stats) {
#pragma unroll
    for (int i = n - 1; i >= 0; --i) {
      if (student_max > part.student_max && s[i] == student_max) part.student_best = column + i;
      if (teacher_max > part.teacher_max && t[i] == teacher_max) part.teacher_best = column + i;
    }
  }
  if (student_max > part.student_max || teacher_max > part.teacher_max) raise<kind>(part, student_max, teacher_max, options);
  const float student_from = finite(student_max), teacher_from = finite(teacher_max);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float a = s[i] - student_from, b = t[i] - teacher_from;
    const float student_exp = expf(a * options.inverse_temperature), teacher_exp = expf(b * options.inverse_temperature);
    part.student_sum += student_exp;
    part.teacher_sum += teacher_exp;
    if (options.labels) part.label_sum += expf(a);
    // The difference of the logits first: both may be large where it is small.
    if constexpr (has_moment<kind>)
      part.moment += weighted(kind == forward_kl ? teacher_exp : student_exp, (t[i] - s[i]) - (teacher_from - student_from));
  }
}

// Two parts as one. merge(a, b) is merge(b, a) to the last bit, so that all who merge agree.
template <Kind kind>
SHARED_CODE Statistics merge(Statistics a, Statistics b, const Options& options) {
  Statistics both;
  const auto best = [](float a_max, int a_best, float b_max, int b_best) {
    return a_max > b_max ? a_best : (b_max > a_max ? b_best : (a_best < b_best ? a_best : b_best));
  };
  both.student_best = best(a.student_max, a.student_best, b.student_max, b.student_best);
  both.teacher_best = best(a.teacher_max, a.teacher_best, b.teacher_max, b.teacher_best);
  both.student_max = fmaxf(a.student_max, b.student_max);
  both.teacher_max = fmaxf(a.teacher_max, b.teacher_max);
  raise<kind>(a, both.student_max, both.teacher_max, options);
  raise<kind>(b, both.student_max, both.teacher_max, options);
  both.student_sum = a.student_sum + b.student_sum;
  both.teacher_sum = a.teacher_sum + b.teacher_sum;
  both.label_sum = a.label_sum + b.label_sum;
  both.moment = a.moment + b.moment;
  return both;
}

// ---- 2. The divergence

// Sums over a row, or a part of it: D(p, q) and c = dD / d log q with log q treated as free; entropies only with stats.
struct Sums {
  float value, coefficient, student_entropy, teacher_entropy;
};

SHARED_CODE Sums merge(const Sums& a, const Sums& b) {
  return {a.value + b.value, a.coefficient + b.coefficient,  //
          a.student_entropy + b.student_entropy, a.teacher_entropy + b.teacher_entropy};
}

// What the whole row's statistics say of each of its logits.
struct Row {
  float student_max, teacher_max, center;          // center = teacher_max - student_max
  float student_share, teacher_share, log_center;  // 1 / sums; the log of the sums' quotient
  float student_log, teacher_log;                  // of the sums
};

SHARED_CODE Row make_row(const Statistics& whole) {
  // log_center is no difference of logs: both are large where it is small.
  return {whole.student_max, whole.teacher_max, whole.teacher_max - whole.student_max, 1 / whole.student_sum, 1 / whole.teacher_sum,
          logf(whole.teacher_sum / whole.student_sum), logf(whole.student_sum), logf(whole.teacher_sum)};
}

// For the divergences with a moment: what the second step would find.
template <Kind kind>
SHARED_CODE Sums sums_of_moment(const Statistics& whole, const Row& row, const Options& options) {
  Sums sums{};
  const float moment = whole.moment * options.inverse_temperature;
  if constexpr (kind == forward_kl) {
    sums.value = moment * row.teacher_share - row.log_center;
    sums.coefficient = -1;
  } else {
    sums.value = row.log_center - moment * row.student_share;
    sums.coefficient = sums.value + 1;
  }
  return sums;
}

struct Entry {
  float p, q, value, coefficient;
};

// A mixture enters by softplus(x) with x the log of its odds, so that neither probability can underflow and nothing of the size of
// log p cancels: log(m / q) = log_other + softplus(x) for m = own p + other q, and log(m / p) = log_own + softplus(-x).
template <Kind kind>
SHARED_CODE Entry make_entry(float s, float t, const Row& row, const Options& options) {
  const float q = expf((s - row.student_max) * options.inverse_temperature) * row.student_share;
  const float p = expf((t - row.teacher_max) * options.inverse_temperature) * row.teacher_share;
  const float log_ratio = ((t - s) - row.center) * options.inverse_temperature - row.log_center;  // log p - log q
  if constexpr (kind == forward_kl) return {p, q, weighted(p, log_ratio), -p};
  if constexpr (kind == reverse_kl) {
    const float value = weighted(q, -log_ratio);
    return {p, q, value, value + q};
  }
  if constexpr (kind == tvd) {
    const float difference = q - p;
    const float sign = difference > 0 ? 1.0f : (difference < 0 ? -1.0f : difference);  // NaN stays NaN
    return {p, q, 0.5f * fabsf(difference), 0.5f * q * sign};
  }
  const float odds = options.log_own - options.log_other + (kind == skew_rkl ? -log_ratio : log_ratio);
  const float e = expf(-fabsf(odds)), rest = log1pf(e);
  const float to_other = options.log_other + (odds > 0 ? odds : 0.0f) + rest;
  const float to_own = options.log_own + (odds < 0 ? -odds : 0.0f) + rest;
  const float other_share = (odds > 0 ? e : 1.0f) / (1 + e);
  if constexpr (kind == jsd) {
    const float student = weighted(q, -to_other);
    return {p, q, options.mixing * weighted(p, -to_own) + (1 - options.mixing) * student, (1 - options.mixing) * student};
  }
  if constexpr (kind == skew_kl) return {p, q, weighted(p, -to_own), -weighted(p, other_share)};
  const float value = weighted(q, -to_own);
  return {p, q, value, value + weighted(q, other_share)};
}

template <Kind kind>
SHARED_CODE void add_entry(Sums& sums, float s, float t, const Row& row, const Options& options) {
  const Entry entry = make_entry<kind>(s, t, row, options);
  if constexpr (!has_moment<kind>) {
    sums.value += entry.value;
    sums.coefficient += entry.coefficient;
  }
  if (options.stats) {
    sums.student_entropy -= weighted(entry.q, (s - row.student_max) * options.inverse_temperature - row.student_log);
    sums.teacher_entropy -= weighted(entry.p, (t - row.teacher_max) * options.inverse_temperature - row.teacher_log);
  }
}

SHARED_CODE float cross_entropy(float label_logit, const Statistics& whole) {
  return logf(whole.label_sum) - (label_logit - whole.student_max);
}

// ---- 3. The gradient

struct Factors {
  float divergence;          // row weight * T: T^2 from the loss, 1/T from z/T
  float label, label_share;  // the label's weight, and the same over the normaliser at T = 1; zero for a row without label
};

// With respect to the head's output, of which the student's logit is s.
template <Kind kind>
SHARED_CODE float gradient(float s, float t, bool is_label, float coefficient_sum, const Factors& factors, const Row& row,
                           const Options& options) {
  const Entry entry = make_entry<kind>(s, t, row, options);
  float result = factors.divergence * (entry.coefficient - entry.q * coefficient_sum);
  if (options.labels) result += factors.label_share * expf(s - row.student_max) - (is_label ? factors.label : 0.0f);
  return result * slope(s, options.student);
}

}  // namespace fastkd
