// Rows of logits as the CPU's kernels read them: matrices of any floating dtype, upcast, and what a model does to its head's output.
#pragma once

#include <torch/extension.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "row_math.h"

namespace {

// logits = softcap * tanh(scale * (raw + bias) / softcap); softcap 0: scale * (raw + bias).
struct Transform {
  double scale, softcap;
};

// (rows, V) of any floating dtype; null where the call has none.
struct Matrix {
  void* data;
  int64_t stride;
  at::ScalarType type;
  template <typename T>
  T* row(int64_t index) const { return static_cast<T*>(data) + index * stride; }
};

template <typename From, typename T>
INLINED T* upcast(From* row, int64_t n, T* scratch) {
  if constexpr (std::is_same_v<From, T>) {
    return row;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<T>(row[j]);
    return scratch;
  }
}

// The row in the compute type: itself if it is of that type, else a copy in `scratch`.
template <typename T>
INLINED T* load(const Matrix& logits, int64_t row, int64_t n, T* scratch) {
  switch (logits.type) {
    case at::kFloat: return upcast(logits.row<float>(row), n, scratch);
    case at::kDouble: return upcast(logits.row<double>(row), n, scratch);
    case at::kHalf: return upcast(logits.row<at::Half>(row), n, scratch);
    default: return upcast(logits.row<at::BFloat16>(row), n, scratch);
  }
}

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

// to = row + bias, without a bias (null) a copy; `to` may be `row`.
template <typename T>
INLINED void add_bias(const T* row, const T* bias, int64_t n, T* to) {
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = row[j] + bias[j];
  } else if (to != row) {
    std::memcpy(to, row, n * sizeof(T));
  }
}

using Optional = std::optional<at::Tensor>;

// A vector (rows,); null for None.
template <typename T>
T* data(const Optional& vector) {
  if (!vector) return nullptr;
  TORCH_CHECK(vector->is_contiguous(), "row weights, labels and losses must be contiguous");
  return vector->mutable_data_ptr<T>();
}

Matrix matrix(const Optional& tensor, const at::Tensor& shaped_like) {
  if (!tensor) return {};
  TORCH_CHECK(tensor->sizes() == shaped_like.sizes() && (tensor->size(1) <= 1 || tensor->stride(1) == 1),
              "logits and their gradient must have one shape and stride 1 along the vocabulary");
  const at::ScalarType type = tensor->scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
              "logits and their gradient must be float16, bfloat16, float32 or float64, got ", type);
  return {tensor->mutable_data_ptr(), tensor->stride(0), type};
}

}  // namespace
