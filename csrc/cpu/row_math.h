// What the row kernel computes of one number, written so that the compiler vectorises the loops around it.

#pragma once

#include <ATen/ATen.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <type_traits>

#include "../row_math.h"

#define INLINED inline __attribute__((always_inline))

namespace {

// To nearest, ties to even; NaN stays. c10's own bfloat16 branches on NaN, which keeps the loop from being vectorised.
template <typename To, typename T>
INLINED To rounded(T value) {
  if constexpr (std::is_same_v<To, at::BFloat16>) {
    const float single = static_cast<float>(value);
    const uint32_t bits = std::bit_cast<uint32_t>(single);
    const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(single != single ? 0x7FC0 : nearest), at::BFloat16::from_bits()};
  } else {
    return static_cast<To>(value);
  }
}

// 2^x for x of at most zero, or above it by rounding: what softmax asks for. float: 2^k 2^r, where adding 1.5 * 2^23 leaves the whole
// number k nearest to x in the low bits, and 2^r = exp(r log 2) is its Taylor polynomial, within 3 units in the last place. Denormal
// results are zero, NaN stays. Written out, because the row kernel was slower with the library's vector exp.
template <typename T>
INLINED T exp2_of_negative(T x) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr float shift = 12582912.0f;
    const float shifted = x + shift, r = x - (shifted - shift);
    float y = 1.54035304e-4f;
    y = y * r + 1.33335581e-3f;
    y = y * r + 9.61812911e-3f;
    y = y * r + 5.55041087e-2f;
    y = y * r + 2.40226507e-1f;
    y = y * r + 6.93147181e-1f;
    y = y * r + 1.0f;
    const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
    return x < -125.0f ? 0.0f : y * power;
  } else {
    return std::exp2(x);
  }
}

template <typename T>
INLINED T exp_of_negative(T x) {
  if constexpr (std::is_same_v<T, float>) return exp2_of_negative(x * std::numbers::log2e_v<T>);
  return std::exp(x);
}

// What csrc/row_math.h asks for.
struct Math {
  template <typename T>
  static INLINED T exp(T x) { return exp_of_negative(x); }
  template <typename T>
  static INLINED T log(T x) { return std::log(x); }
};

}  // namespace
