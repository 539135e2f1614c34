// Products of 16-bit matrices on the CPU whose sums and result are in float32: MKL's, which torch's MKL builds carry, or our own.
//
// The names below are weak references: in a build of torch without MKL they are null and `has_mm_16bit` says so.

#include "gemm.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>

extern "C" {
using Gemm = void(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const void* a, int a_stride,
                  const void* b, int b_stride, float beta, float* out, int out_stride);
__attribute__((weak)) Gemm cblas_gemm_bf16bf16f32;
__attribute__((weak)) Gemm cblas_gemm_f16f16f32;
}

namespace {

enum Cblas { row_major = 101, as_it_is = 111, transposed = 112 };

int checked_int(int64_t value) {
  TORCH_CHECK(value <= std::numeric_limits<int>::max(), "mm_16bit_ takes sizes and strides below 2^31, got ", value);
  return static_cast<int>(value);
}

// How BLAS reads a matrix: row by row, or column by column as the transpose of one that is.
struct Operand {
  const void* data;
  Cblas order;
  int stride;
};

Operand operand(const at::Tensor& matrix) {
  // The stride of a dimension of size 1 means nothing, and BLAS wants one that could.
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const int64_t row_stride = rows == 1 ? columns : matrix.stride(0), column_stride = columns == 1 ? rows : matrix.stride(1);
  const bool by_rows = (columns == 1 || matrix.stride(1) == 1) && row_stride >= columns;
  TORCH_CHECK(by_rows || ((rows == 1 || matrix.stride(0) == 1) && column_stride >= rows),
              "mm_16bit_ needs stride 1 along one dimension, got strides ", matrix.strides(), " of shape ", matrix.sizes());
  return {matrix.const_data_ptr(), by_rows ? as_it_is : transposed, checked_int(by_rows ? row_stride : column_stride)};
}

}  // namespace

bool has_mm_16bit() { return cblas_gemm_bf16bf16f32 && cblas_gemm_f16f16f32; }

// out (M, N) float32, row by row = a (M, K) b (K, N), both bfloat16 or both float16; accumulate: +=. own: by `bf16_gemm`, else by MKL.
void mm_16bit_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool own) {
  const at::ScalarType type = a.scalar_type();
  TORCH_CHECK(own ? type == at::kBFloat16 && has_bf16_gemm() : has_mm_16bit(), "mm_16bit_ has no product of ", type, " here");
  TORCH_CHECK((type == at::kBFloat16 || type == at::kHalf) && b.scalar_type() == type && out.scalar_type() == at::kFloat,
              "mm_16bit_ takes two bfloat16 or two float16 matrices into float32, got ", type, ", ", b.scalar_type(), " into ",
              out.scalar_type());
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) && out.size(0) == a.size(0) &&
                  out.size(1) == b.size(1),
              "mm_16bit_ got shapes ", a.sizes(), " x ", b.sizes(), " into ", out.sizes());
  const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
  if (out.numel() == 0) return;
  if (k == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const int64_t out_stride = m == 1 ? n : out.stride(0);
  TORCH_CHECK((n == 1 || out.stride(1) == 1) && out_stride >= n, "mm_16bit_ writes rows of stride 1, got strides ", out.strides());
  const Operand left = operand(a), right = operand(b);
  if (own) {
    const auto strided = [](const Operand& x, bool by_outer) {
      return Operand16{static_cast<const uint16_t*>(x.data), by_outer ? x.stride : 1, by_outer ? 1 : x.stride};
    };
    bf16_gemm(m, n, k, strided(left, left.order == as_it_is), strided(right, right.order == transposed), out.mutable_data_ptr<float>(),
              out_stride, accumulate);
    return;
  }
  Gemm* gemm = type == at::kHalf ? cblas_gemm_f16f16f32 : cblas_gemm_bf16bf16f32;
  gemm(row_major, left.order, right.order, checked_int(m), checked_int(n), checked_int(k), 1.0f, left.data, left.stride, right.data,
       right.stride, accumulate ? 1.0f : 0.0f, out.mutable_data_ptr<float>(), checked_int(out_stride));
}
