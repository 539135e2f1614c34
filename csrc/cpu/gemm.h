// The operands of a product of matrices, as `gemm.cpp` hands them on.

#pragma once

#include <cstdint>

// Entry (i, k), i along the side that the result keeps and k along the one that is summed, lies at data[i * outer + k * inner]; one of the
// two strides is 1.
struct Operand16 {
  const uint16_t* data;
  int64_t outer, inner;
};

// Whether `bf16_gemm` runs on this processor.
bool has_bf16_gemm();

// out (m, n), rows `out_stride` apart, = a (m, k) b (n, k)^T, or += where `accumulate`; bfloat16 operands, sums in float32.
void bf16_gemm(int64_t m, int64_t n, int64_t k, Operand16 a, Operand16 b, float* out, int64_t out_stride, bool accumulate);
