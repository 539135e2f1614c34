// The mathematics of one row, for the CUDA kernel (rows.cu) and for any C++ compiler, which is how it is tested without a GPU.
//
// Logits are those of the models: after bias, scale and soft-cap. Exponents are of two. Parts of a row, each with the largest logits of its
// own, are taken in three steps:
//   1. `accumulate` its logits into `Statistics`: the normalisers, relative to a whole number of bits near the largest logit, so that
//      parts are brought to a common one without rounding. Forward and reverse KL are complete after it: their sums are moments of the
//      difference of the logits. The column of the student's largest logit is held out: where the student is nearly certain, sums of the
//      others would be lost beside it, and its gradient is minus the sum of theirs;
//   2. where that is not enough (the other divergences; entropies and acceptance), `add_entry` every logit but that into `Sums`;
//   3. `gradient` of every logit.
#pragma once

#include <cstdint>
#include <cstring>

#include "../row_math.h"

namespace fastkd {

enum Type : int { float32, bfloat16, float16 };

// What a model does to the head's output x: logit = softcap * tanh(scale * x / softcap); softcap 0: scale * x.
struct Transform {
  float scale, softcap;
};

// The kernel's parameter. fastkd/ops/backend_cuda.py fills it by these names.
struct Call {
  const void *student, *teacher;  // (rows, vocabulary), unit stride along the vocabulary
  void* gradient;                 // null: not wanted
  const float *student_bias, *teacher_bias;  // (vocabulary,), null: none
  const float* teacher_rest;                 // (rows,), null: none
  const float* row_weight;                   // (rows,), as all that follows
  const int64_t* labels;                     // null: none
  const float* label_weight;                 // null: the cross-entropy has no part in the gradient
  float *divergence, *cross_entropy;                                         // null: not wanted
  float *student_entropy, *teacher_entropy, *top1_agreement, *acceptance;  // all of them or none
  int64_t student_stride, teacher_stride, gradient_stride;  // between rows, in elements
  int student_type, teacher_type, gradient_type;
  int vocabulary, slice;  // columns of the row, and of a block: a multiple of 8
  float temperature, rate;  // rate = log2(e) / temperature
  Transform student_transform, teacher_transform;
  Mixing<float> mixing;
};
static_assert(sizeof(Call) == 208);

// A number that is known when code is compiled, as a parameter.
template <int n>
struct Number {
  SHARED_CODE constexpr operator int() const { return n; }
};

// Whether a part of the divergence is forward or reverse KL, which are known after the first step.
template <Kind kind>
constexpr bool has_forward = kind == forward_kl || kind == mixed;
template <Kind kind>
constexpr bool has_reverse = kind == reverse_kl || kind == mixed;
template <Kind kind>
constexpr bool has_moment = has_forward<kind> || has_reverse<kind>;

constexpr int no_column = 0x7fffffff;
constexpr float lowest = -1e30f, nothing = -INFINITY, ln_2 = 0.693147181f, log2_e = 1.44269504f;

SHARED_CODE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

SHARED_CODE float log2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

// What csrc/row_math.h asks for.
struct Math {
  static SHARED_CODE float exp(float x) { return exp2_of(x * log2_e); }
  static SHARED_CODE float log(float x) { return log2_of(x) * ln_2; }
};

// 2^n, exactly, for a whole n of at most zero; zero below the normal numbers.
SHARED_CODE float power_of_two(float n) {
  const int bits = n >= -126 ? (int(n) + 127) << 23 : 0;
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
#endif
}

SHARED_CODE float logit(float x, Transform transform) {
  return transform.softcap == 0 ? x * transform.scale : transform.softcap * tanhf(x * (transform.scale / transform.softcap));
}

// Of the transform at a logit, over its scale. Without a soft-cap the logit may be infinite.
SHARED_CODE float slope(float logit, Transform transform) {
  const float capped = transform.softcap == 0 ? 0.0f : logit * (1 / transform.softcap);
  return 1 - capped * capped;
}

// ---- 1. Statistics of a part of a row

struct Statistics {
  float student_from, teacher_from, label_from;  // bits that are taken off exponents, whole; `lowest` where nothing was seen
  float student_sum, teacher_sum;  // sum 2^(rate logit - from)
  float label_sum;                 // the same at a temperature of 1; only with labels
  float forward_moment;            // sum w (log2 of teacher's term - of student's), w the terms of teacher_sum; with forward KL
  float reverse_moment;            // the same, w the terms of student_sum; with reverse KL
  float student_peak, teacher_at_peak;  // logits of the column held out, the first of the student's largest
  float teacher_peak;
  int peak, teacher_best;  // columns: that one, and with stats the first of the teacher's largest; no_column
  float label_logit;
};

// The bits to take off logits of which the largest is this.
SHARED_CODE float bits_of(float largest, float rate) { return fmaxf(rintf(largest * rate), lowest); }

SHARED_CODE Statistics no_statistics() {
  return {lowest, lowest, lowest, 0, 0, 0, 0, 0, nothing, nothing, nothing, no_column, no_column, 0};
}

// body(sum) for each of a part's sums.
template <Kind kind, typename Body>
SHARED_CODE void each_sum(Statistics& part, bool labels, Body body) {
  body(part.student_sum);
  if (labels) body(part.label_sum);
  if constexpr (kind != none) body(part.teacher_sum);
  if constexpr (has_forward<kind>) body(part.forward_moment);
  if constexpr (has_reverse<kind>) body(part.reverse_moment);
}

template <Kind kind>
SHARED_CODE void accumulate(Statistics& part, float s, float t, float rate, bool labels) {
  const float student = exp2_of(fmaf(s, rate, -part.student_from));
  part.student_sum += student;
  if (labels) part.label_sum += exp2_of(fmaf(s, log2_e, -part.label_from));
  if constexpr (kind != none) {
    const float teacher = exp2_of(fmaf(t, rate, -part.teacher_from));
    part.teacher_sum += teacher;
    if constexpr (has_moment<kind>) {
      // The difference of the logits first: both may be large where it is small.
      const float difference = fmaf(t - s, rate, part.student_from - part.teacher_from);
      if constexpr (has_forward<kind>) part.forward_moment = fmaf(teacher, teacher == 0 ? 0.0f : difference, part.forward_moment);
      if constexpr (has_reverse<kind>) part.reverse_moment = fmaf(student, student == 0 ? 0.0f : difference, part.reverse_moment);
    }
  }
}

// The same sums with no fewer bits taken off.
template <Kind kind>
SHARED_CODE void raise(Statistics& part, float student_from, float teacher_from, float label_from) {
  const float student = power_of_two(part.student_from - student_from), teacher = power_of_two(part.teacher_from - teacher_from);
  const float shift = (student_from - teacher_from) - (part.student_from - part.teacher_from);
  if constexpr (has_forward<kind>) part.forward_moment = weighted(teacher, part.forward_moment + shift * part.teacher_sum);
  if constexpr (has_reverse<kind>) part.reverse_moment = weighted(student, part.reverse_moment + shift * part.student_sum);
  part.label_sum *= power_of_two(part.label_from - label_from);
  part.student_sum *= student;
  part.teacher_sum *= teacher;
  part.student_from = student_from;
  part.teacher_from = teacher_from;
  part.label_from = label_from;
}

// What the whole row's statistics say of each of its logits.
struct Row {
  Statistics whole;                   // but for the column that is held out
  float forward_moment;               // with it
  float offset, log_center;           // of bits: student_from - teacher_from; log2 of the normalisers' quotient
  float student_share, teacher_share, label_share;  // 1 / normalisers
  float student_log, teacher_log;     // log2 of the normalisers
  float mass, rest;                   // of the teacher on the columns, and on its tokens that have none
  float q, p, label_q;                // probabilities of the peak, the last at a temperature of 1
};

template <Kind kind>
SHARED_CODE Row make_row(const Statistics& whole, float rate, bool labels, float log_rest) {
  Statistics peak = whole;
  each_sum<kind>(peak, labels, [](float& sum) { sum = 0; });
  accumulate<kind>(peak, whole.student_peak, whole.teacher_at_peak, rate, labels);
  const float student = whole.student_sum + peak.student_sum, teacher = whole.teacher_sum + peak.teacher_sum;
  Row row{whole, whole.forward_moment + peak.forward_moment, whole.student_from - whole.teacher_from};
  // No difference of logs: both are large where it is small.
  const float odds = log_rest - (whole.teacher_from + log2_of(teacher)) * ln_2;
  const Rest<float> rest = log_rest == nothing ? Rest<float>{} : split<Math>(odds);
  const float log_mass = rest.log_columns * log2_e;
  row.mass = exp2_of(log_mass), row.rest = rest.probability;
  row.log_center = log2_of(teacher / student) - log_mass;
  row.student_share = 1 / student, row.teacher_share = row.mass / teacher, row.label_share = 1 / (whole.label_sum + peak.label_sum);
  row.student_log = log2_of(student), row.teacher_log = log2_of(teacher) - log_mass;
  row.q = peak.student_sum * row.student_share, row.p = peak.teacher_sum * row.teacher_share;
  row.label_q = peak.label_sum * row.label_share;
  return row;
}

// ---- 2. The divergence

// Over a row, or a part of it.
struct Sums {
  float value, coefficient;                // unless they are known after the first step
  float acceptance;                        // of nla, or with stats
  float student_entropy, teacher_entropy;  // with stats, in bits; until `finish`, of probabilities that lack their normaliser
};

// body(sum) for each of them.
template <Kind kind, typename Body>
SHARED_CODE void each_sum(Sums& sums, bool stats, Body body) {
  if constexpr (kind != none && !has_moment<kind>) body(sums.value), body(sums.coefficient);
  if (kind == nla || stats) body(sums.acceptance);
  if (stats) body(sums.student_entropy), body(sums.teacher_entropy);
}

struct Probabilities {
  float p, q;
};

SHARED_CODE Probabilities probabilities(float s, float t, const Row& row, float rate) {
  return {exp2_of(fmaf(t, rate, -row.whole.teacher_from)) * row.teacher_share,
          exp2_of(fmaf(s, rate, -row.whole.student_from)) * row.student_share};
}

template <Kind kind>
SHARED_CODE Entry<float> entry_of(Probabilities at, float s, float t, const Row& row, const Call& call) {
  const float log_ratio = (fmaf(t - s, call.rate, row.offset) - row.log_center) * ln_2;  // log p - log q
  // The larger probability stands for 1, so that nothing of the size of log p cancels.
  return make_entry<kind, Math>(at.p, at.q, fminf(log_ratio, 0.0f), -fmaxf(log_ratio, 0.0f), call.mixing);
}

template <Kind kind>
SHARED_CODE void add_entry(Sums& sums, float s, float t, const Row& row, const Call& call, bool stats) {
  const Probabilities at = probabilities(s, t, row, call.rate);
  if constexpr (!has_moment<kind>) {
    const Entry<float> entry = entry_of<kind>(at, s, t, row, call);
    sums.value += entry.value;
    sums.coefficient += entry.coefficient;
  }
  if (stats) {
    sums.student_entropy = fmaf(-at.q, at.q == 0 ? 0.0f : fmaf(s, call.rate, -row.whole.student_from), sums.student_entropy);
    sums.teacher_entropy = fmaf(-at.p, at.p == 0 ? 0.0f : fmaf(t, call.rate, -row.whole.teacher_from), sums.teacher_entropy);
  }
  if (kind == nla || stats) sums.acceptance += fminf(at.p, at.q);
}

// What the gradient needs of the row.
struct Factors {
  float divergence, label;  // weights times the transform's scale; the divergence's carries T: T^2 from the loss, 1/T from z/T
  float coefficient_sum;
  float at_peak;  // the gradient of the column held out
};

// Completes `sums` of all columns but the peak; the row's factors, with `label_column` -1 for a row without a label.
template <Kind kind>
SHARED_CODE Factors finish(Sums& sums, const Row& row, const Call& call, float row_weight, float label_weight, int label_column) {
  const Statistics& whole = row.whole;
  const float q_others = whole.student_sum * row.student_share, p_others = whole.teacher_sum * row.teacher_share;
  const float s = whole.student_peak, t = whole.teacher_at_peak;
  const bool peaks = row.q > 0.5f;
  Entry<float> peak{};
  if constexpr (has_distance<kind>)
    peak = distance_entry<kind>(row.q, peaks ? row.rest + p_others - q_others : row.q - row.p);  // both may be nearly 1
  else
    peak = entry_of<kind>({row.p, row.q}, s, t, row, call);
  Factors factors{};
  factors.divergence = call.temperature * row_weight * call.student_transform.scale;
  factors.label = label_weight * call.student_transform.scale;
  float others = 0;  // sum of c - q sum(c)
  if constexpr (has_forward<kind>) {
    const float share = kind == mixed ? call.mixing.own : 1.0f;
    sums.value = share * (row.forward_moment * row.teacher_share - row.mass * row.log_center) * ln_2;
    factors.coefficient_sum = -share * row.mass;
    others = share * (q_others * row.mass - p_others);
  }
  if constexpr (has_reverse<kind>) {
    const float share = kind == mixed ? call.mixing.other : 1.0f;
    const float of_others = (q_others * row.log_center - whole.reverse_moment * row.student_share) * ln_2;
    const float value = of_others + entry_of<reverse_kl>({row.p, row.q}, s, t, row, call).value;
    sums.value += share * value;
    factors.coefficient_sum += share * (value + 1);
    others += share * (of_others - q_others * value);
  }
  sums.acceptance += fminf(row.p, row.q);
  if constexpr (kind != none && !has_moment<kind>) {
    factors.coefficient_sum = sums.coefficient + peak.coefficient;
    others = sums.coefficient - q_others * factors.coefficient_sum;
    sums.value += peak.value + rest_value<kind>(call.mixing) * row.rest;
  }
  if constexpr (kind == nla) {
    sums.value = negative_log(sums.acceptance, sums.value);
    factors.divergence /= sums.acceptance;
  }
  // Undefined logits show: what is made of a mixture alone might not tell.
  const float undefined = 0 * row.student_share * row.teacher_share;
  if (kind != none) sums.value += undefined, sums.acceptance += undefined, factors.coefficient_sum += undefined;
  sums.student_entropy += row.student_log - weighted(row.q, fmaf(s, call.rate, -whole.student_from));
  sums.teacher_entropy += row.mass * row.teacher_log - weighted(row.p, fmaf(t, call.rate, -whole.teacher_from));
  sums.teacher_entropy -= weighted(row.rest, log2_of(row.rest));
  // Above a half, minus the sum of the others, unless the gradient is infinite; at most a half, its own terms are the more exact.
  if constexpr (kind != none) {
    const float own = peak.coefficient - row.q * factors.coefficient_sum;
    factors.at_peak = factors.divergence * (peaks && fabsf(factors.coefficient_sum) < INFINITY ? -others : own);
  }
  if (factors.label != 0) {
    const float is_label = whole.peak == label_column ? 1.0f : 0.0f, label_others = whole.label_sum * row.label_share;
    factors.at_peak += factors.label * (row.label_q > 0.5f ? (1 - is_label) - label_others : row.label_q - is_label);
  }
  factors.at_peak *= slope(s, call.student_transform);
  return factors;
}

SHARED_CODE float cross_entropy(const Row& row) {
  return -(fmaf(row.whole.label_logit, log2_e, -row.whole.label_from) + log2_of(row.label_share)) * ln_2;
}

// ---- 3. The gradient

// With respect to the head's output, without the -1 at the label, and not at the peak.
template <Kind kind>
SHARED_CODE float gradient(float s, float t, const Factors& factors, const Row& row, const Call& call, bool labels) {
  float result = 0;
  if constexpr (kind == forward_kl) {
    const float student = exp2_of(fmaf(s, call.rate, -row.whole.student_from));
    const float teacher = exp2_of(fmaf(t, call.rate, -row.whole.teacher_from));
    result = factors.divergence * row.mass * row.student_share * student - factors.divergence * row.teacher_share * teacher;
  } else if constexpr (kind != none) {
    const Probabilities at = probabilities(s, t, row, call.rate);
    result = factors.divergence * (entry_of<kind>(at, s, t, row, call).coefficient - at.q * factors.coefficient_sum);
  }
  if (labels) result = fmaf(factors.label * row.label_share, exp2_of(fmaf(s, log2_e, -row.whole.label_from)), result);
  return result;
}

}  // namespace fastkd
