// What a vocabulary entry adds to a divergence: one formula for each, which the C++ and the CUDA row kernel share.
//
// D(p, q) sums `value` over the row, and c = dD / d log q, with log q treated as free, is `coefficient`: then dD / dz = c - q sum(c) for
// q = softmax(z). For nla the sum is tvd, D is `negative_log`, and c is to be divided by the acceptance, sum min(p, q).
// fastkd/ops/divergence.py says the same in torch.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SHARED_CODE __host__ __device__ __forceinline__
#else
#define SHARED_CODE inline __attribute__((always_inline))
#endif

namespace fastkd {

enum Kind : int { none, forward_kl, reverse_kl, mixed, tvd, nla, jsd, skew_kl, skew_rkl };

// alpha or beta, 1 less it, and their logarithms.
template <typename T>
struct Mixing {
  T own, other, log_own, log_other;
};

template <typename T>
inline Mixing<T> make_mixing(T own) {
  return {own, 1 - own, std::log(own), std::log1p(-own)};
}

template <typename T>
struct Entry {
  T value, coefficient;
};

// probability * factor, with 0 * (anything, infinite or undefined) = 0; NaN shows.
template <typename T>
SHARED_CODE T weighted(T probability, T factor) {
  return probability == 0 ? T(0) : probability * factor;
}

// Whether a kind sums |q - p|.
template <Kind kind>
constexpr bool has_distance = kind == tvd || kind == nla;

// Of tvd or nla, with difference = q - p. NaN stays NaN. A multiple of q changes no gradient: the coefficient of nla is that of
// sum min(p, q), which does not cancel where that is small.
template <Kind kind, typename T>
SHARED_CODE Entry<T> distance_entry(T q, T difference) {
  const T coefficient = difference > 0 ? T(0.5) * q : (difference < 0 ? T(-0.5) * q : difference * q);
  return {T(0.5) * std::abs(difference), kind == nla ? coefficient - T(0.5) * q : coefficient};
}

// -log(accepted) where both sum to one.
template <typename T>
SHARED_CODE T negative_log(T accepted, T rejected) {
  return std::log1p(rejected / accepted);
}

// What an event of the teacher's adds to D where the student's probability is zero, over its own. Forward KL leaves it out.
template <Kind kind, typename T>
SHARED_CODE T rest_value(const Mixing<T>& mixing) {
  if constexpr (has_distance<kind>) return T(0.5);
  if constexpr (kind == jsd) return -mixing.own * mixing.log_own;
  if constexpr (kind == skew_kl) return -mixing.log_own;
  return 0;
}

// How the teacher's mass is split between the columns of a row and its tokens that have none.
template <typename T>
struct Rest {
  T log_columns, probability;  // log of the columns' mass; the mass of the others
};

// odds: log of the others' mass over the columns'. `Math` as for `make_entry`.
template <typename Math, typename T>
SHARED_CODE Rest<T> split(T odds) {
  const T small = Math::exp(-std::abs(odds));
  return {-((odds > 0 ? odds : T(0)) + Math::log(1 + small)), (odds > 0 ? T(1) : small) / (1 + small)};
}

// Only the difference of the logarithms counts: they may be off by the same amount. `Math` has exp(x) for x of at most zero, or above it
// by rounding, and log(x) for x from 1 to 2.
template <Kind kind, typename Math, typename T>
SHARED_CODE Entry<T> make_entry(T p, T q, T log_p, T log_q, const Mixing<T>& mixing) {
  if constexpr (kind == none) {
    return {};
  } else if constexpr (kind == forward_kl) {
    return {weighted(p, log_p - log_q), -p};
  } else if constexpr (kind == reverse_kl) {
    const T value = weighted(q, log_q - log_p);
    return {value, value + q};
  } else if constexpr (kind == mixed) {
    const T reverse = weighted(q, log_q - log_p);
    return {mixing.own * weighted(p, log_p - log_q) + mixing.other * reverse, mixing.other * (reverse + q) - mixing.own * p};
  } else if constexpr (has_distance<kind>) {
    return distance_entry<kind>(q, q - p);
  } else {
    // log m in log space: both probabilities may underflow.
    const T a = (kind == skew_rkl ? log_q : log_p) + mixing.log_own, b = (kind == skew_rkl ? log_p : log_q) + mixing.log_other;
    const T high = a > b ? a : b, low = a > b ? b : a;
    const T log_m = high + Math::log(1 + Math::exp(low - high));
    if constexpr (kind == jsd) {
      const T student = mixing.other * weighted(q, log_q - log_m);
      return {weighted(mixing.own * p, log_p - log_m) + student, student};
    } else if constexpr (kind == skew_kl) {
      return {weighted(p, log_p - log_m), -weighted(p, Math::exp(log_q - log_m + mixing.log_other))};
    } else {
      const T value = weighted(q, log_q - log_m);
      return {value, q == 0 ? T(0) : value + q * (1 - Math::exp(log_q - log_m + mixing.log_own))};
    }
  }
}

}  // namespace fastkd
