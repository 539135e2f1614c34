// Products of bfloat16 matrices by AVX512-BF16, for processors that have it and no tiles (AMX).
//
// One instruction adds two products to each of 16 float32 sums, so both operands are packed as pairs along the summed side. A panel of
// `right` columns lies in the first cache while the panels of the left block, `left` rows each, pass by it from the second; a tile of
// left x right sums stays in registers over a depth of the sum.

#include "gemm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int64_t lanes = 16, left = 14, right = 2 * lanes;  // 28 sums, two registers of the right operand; the left is broadcast
constexpr int64_t most_depth = 384;                          // of a panel: right x depth x 2 bytes are 24 KiB
constexpr int64_t most_rows = 8 * left, most_columns = 128 * right;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `count` lanes of a vector, of which there are 16.
__mmask16 first_lanes(int64_t count) { return (1u << std::clamp<int64_t>(count, 0, lanes)) - 1; }

// Pack `count` <= width rows of an operand over `depth` entries as [depth / 2][width] pairs; what is missing becomes zero.
template <int64_t width>
AVX512_BF16 void pack(const uint16_t* data, int64_t outer, int64_t inner, int64_t count, int64_t depth, uint32_t* out) {
  const int64_t pairs = depth / 2;
  if (inner == 1) {
    for (int64_t row = 0; row < width; ++row) {
      const uint16_t* source = data + row * outer;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        uint32_t both = 0;
        if (row < count) __builtin_memcpy(&both, source + 2 * pair, 4);
        out[pair * width + row] = both;
      }
      if (depth % 2) out[pairs * width + row] = row < count ? source[depth - 1] : 0;
    }
    return;
  }
  for (int64_t start = 0; start < width; start += lanes) {
    const __mmask16 given = first_lanes(count - start), kept = first_lanes(width - start);
    for (int64_t pair = 0; 2 * pair < depth; ++pair) {
      const uint16_t* source = data + start + 2 * pair * inner;
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(given, source));
      const __mmask16 second_given = 2 * pair + 1 < depth ? given : 0;
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second_given, source + inner));
      _mm512_mask_storeu_epi32(out + pair * width + start, kept, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

// A tile: rows x columns of out (+)= the product of two panels over `pairs` pairs.
AVX512_BF16 void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out, int64_t stride, int64_t rows, int64_t columns,
                      bool accumulate) {
  __m512 sums[left][2];
#pragma GCC unroll 14
  for (int i = 0; i < left; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair, a += left, b += right) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(b), second = (__m512bh)_mm512_loadu_si512(b + lanes);
#pragma GCC unroll 14
    for (int i = 0; i < left; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(a[i]);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, first);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, second);
    }
  }
  const __mmask16 masks[2] = {first_lanes(columns), first_lanes(columns - lanes)};
#pragma GCC unroll 14
  for (int i = 0; i < left; ++i) {
    if (i >= rows) break;
    for (int half = 0; half < 2; ++half) {
      float* place = out + i * stride + half * lanes;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(masks[half], place) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(place, masks[half], _mm512_add_ps(before, sums[i][half]));
    }
  }
}

}  // namespace

bool has_bf16_gemm() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

void bf16_gemm(int64_t m, int64_t n, int64_t k, Operand16 a, Operand16 b, float* out, int64_t out_stride, bool accumulate) {
  // Blocks of one size: depths, and blocks of rows that all threads have equally many of.
  const int64_t depth_step = 2 * ceil_div(ceil_div(k, ceil_div(k, most_depth)), 2);
  const int64_t threads = at::get_num_threads(), blocks = threads * ceil_div(ceil_div(m, most_rows), threads);
  const int64_t row_step = left * ceil_div(ceil_div(m, blocks), left);
  const at::Tensor packed = at::empty({std::min(most_columns, right * ceil_div(n, right)) * depth_step / 2}, at::kInt);
  uint32_t* const b_panels = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  for (int64_t column = 0; column < n; column += most_columns) {
    const int64_t columns = std::min(most_columns, n - column);
    for (int64_t start = 0; start < k; start += depth_step) {
      const int64_t depth = std::min(depth_step, k - start), pairs = ceil_div(depth, 2);
      at::parallel_for(0, ceil_div(columns, right), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t at = panel * right;
          const uint16_t* source = b.data + (column + at) * b.outer + start * b.inner;
          pack<right>(source, b.outer, b.inner, std::min(right, columns - at), depth, b_panels + at * pairs);
        }
      });
      at::parallel_for(0, ceil_div(m, row_step), 1, [&](int64_t begin, int64_t end) {
        alignas(64) thread_local uint32_t a_panels[most_rows * most_depth / 2 + lanes];
        for (int64_t row = begin * row_step; row < std::min(m, end * row_step); row += row_step) {
          const int64_t rows = std::min(row_step, m - row);
          for (int64_t at = 0; at < rows; at += left) {
            const uint16_t* source = a.data + (row + at) * a.outer + start * a.inner;
            pack<left>(source, a.outer, a.inner, std::min(left, rows - at), depth, a_panels + at * pairs);
          }
          for (int64_t right_at = 0; right_at < columns; right_at += right) {
            for (int64_t at = 0; at < rows; at += left) {
              tile(a_panels + at * pairs, b_panels + right_at * pairs, pairs, out + (row + at) * out_stride + column + right_at, out_stride,
                   rows - at, columns - right_at, accumulate || start > 0);
            }
          }
        }
      });
    }
  }
}

#else

bool has_bf16_gemm() { return false; }

void bf16_gemm(int64_t, int64_t, int64_t, Operand16, Operand16, float*, int64_t, bool) {}

#endif
