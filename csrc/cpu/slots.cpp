// Logits over slots, each of which stands for several columns: their log-sums, in vectorised passes over a row that stays in the cache.

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "logits.h"

namespace {

template <typename T>
void slot_rows(const Matrix& raw, const T* bias, const at::Tensor& order, const at::Tensor& ends, const at::Tensor& out, T* rest,
               Transform transform, T temperature) {
  const int64_t n = order.size(0), slots = ends.size(0) - 1;
  const int64_t *const columns = order.const_data_ptr<int64_t>(), *const end = ends.const_data_ptr<int64_t>();
  at::parallel_for(0, out.size(0), 1, [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique_for_overwrite<T[]>(2 * n + 2 * (slots + 1));
    T *const z = scratch.get(), *const terms = z + n, *const largest = terms + n, *const sum = largest + slots + 1;
    for (int64_t row = first; row < last; ++row) {
      add_bias(load(raw, row, n, z), bias, n, z);
      transform_row(z, n, transform, T(1) / temperature);
      for (int64_t slot = 0, i = 0; slot <= slots; ++slot) {
        const int64_t begin = i;
        // Lowest, not -infinity: the distance of -infinity to it still is.
        T most = std::numeric_limits<T>::lowest();
        for (; i < end[slot]; ++i) most = std::max(most, terms[i] = z[columns[i]]);
        for (int64_t k = begin; k < i; ++k) terms[k] -= most;
        largest[slot] = most;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) terms[i] = exp_of_negative(terms[i]);
      for (int64_t slot = 0, i = 0; slot <= slots; ++slot) {
        T total = 0;
        for (; i < end[slot]; ++i) total += terms[i];
        sum[slot] = total;
      }
      T* const to = out.mutable_data_ptr<T>() + row * out.stride(0);
#pragma omp simd
      for (int64_t slot = 0; slot < slots; ++slot) to[slot] = temperature * (largest[slot] + std::log(sum[slot]));
      rest[row] = largest[slots] + std::log(sum[slots]);
    }
  });
}

}  // namespace

// `slot_logits_` of fastkd/ops/backend_cpp.py.
void slot_logits_(at::Tensor raw, Optional bias, at::Tensor order, at::Tensor ends, at::Tensor out, at::Tensor rest, double scale,
                  double softcap, double temperature) {
  const auto run = [&]<typename T>(T) {
    slot_rows<T>(matrix(raw, raw), data<T>(bias), order, ends, out, rest.mutable_data_ptr<T>(), {scale, softcap}, T(temperature));
  };
  out.scalar_type() == at::kFloat ? run(float()) : run(double());
}
