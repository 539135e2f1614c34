// One row of the CUDA kernel on the host: the very functions of csrc/cuda/row_math.h, with a cluster's threads as a loop over its blocks'
// slices and their threads' columns, and its shuffles as a loop over the same tree.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "row_math.h"

using namespace fastkd;

namespace {

constexpr int threads = 8, pack = 4;

struct Call {
  const float *student, *teacher;
  float *gradient, *losses;  // (vocabulary,) or null; divergence, cross-entropy, both entropies, agreement
  int64_t vocabulary, slice;
  int cluster_size;
  Options options;
  float row_weight, label_weight;
  int64_t label;
};

// body(Width, thread, column), block by block and thread by thread, each thread's columns ascending.
template <typename Body>
void each_column(const Call& call, Body body) {
  for (int block = 0; block < call.cluster_size; ++block) {
    const int64_t begin = block * call.slice, end = std::min(begin + call.slice, call.vocabulary);
    const int64_t packed = begin >= end ? begin : begin + (end - begin) / pack * pack;
    for (int thread = 0; thread < threads; ++thread) {
      const int index = block * threads + thread;
      for (int64_t column = begin + thread * pack; column < packed; column += threads * pack)
        body(std::integral_constant<int, pack>{}, index, column);
      for (int64_t column = packed + thread; column < end; column += threads) body(std::integral_constant<int, 1>{}, index, column);
    }
  }
}

// Every thread's merger; all must agree to the last bit, as the blocks of a cluster do.
template <typename Part, typename Merge>
Part reduce(std::vector<Part> parts, Merge merge) {
  for (size_t distance = 1; distance < parts.size(); distance *= 2) {
    const std::vector<Part> before = parts;
    for (size_t i = 0; i < parts.size(); ++i) parts[i] = merge(before[i], before[i ^ distance]);
  }
  return parts.back();
}

template <Kind kind>
void run(const Call& call) {
  const Options& options = call.options;
  const auto logits = [&](auto& s, auto& t, int64_t column, int n) {
    for (int i = 0; i < n; ++i) {
      s[i] = logit(call.student[column + i], options.student);
      t[i] = logit(call.teacher[column + i], options.teacher);
    }
  };
  std::vector<Statistics> statistics(call.cluster_size * threads, no_statistics());
  each_column(call, [&](auto width, int thread, int64_t column) {
    float s[width], t[width];
    logits(s, t, column, width);
    accumulate<kind>(statistics[thread], s, t, int(column), options);
  });
  const Statistics whole =
      reduce(statistics, [&](const Statistics& a, const Statistics& b) { return merge<kind>(a, b, options); });
  const Row row = make_row(whole);

  std::vector<Sums> parts(call.cluster_size * threads, Sums{});
  if (!has_moment<kind> || options.stats)
    each_column(call, [&](auto width, int thread, int64_t column) {
      float s[width], t[width];
      logits(s, t, column, width);
      for (int i = 0; i < width; ++i) add_entry<kind>(parts[thread], s[i], t[i], row, options);
    });
  Sums sums = reduce(parts, [](const Sums& a, const Sums& b) { return merge(a, b); });
  if constexpr (has_moment<kind>) {
    const Sums known = sums_of_moment<kind>(whole, row, options);
    sums.value = known.value, sums.coefficient = known.coefficient;
  }
  call.losses[0] = options.temperature * options.temperature * sums.value;
  if (options.labels) {
    const float label_logit = call.label < 0 ? 0.0f : logit(call.student[call.label], options.student);
    call.losses[1] = call.label < 0 ? 0.0f : cross_entropy(label_logit, whole);
  }
  call.losses[2] = sums.student_entropy;
  call.losses[3] = sums.teacher_entropy;
  call.losses[4] = whole.student_best == whole.teacher_best;

  if (call.gradient == nullptr) return;
  Factors factors{options.temperature * call.row_weight, 0.0f, 0.0f};
  if (options.labels && call.label >= 0) {
    factors.label = call.label_weight;
    factors.label_share = factors.label / whole.label_sum;
  }
  each_column(call, [&](auto width, int, int64_t column) {
    float s[width], t[width];
    logits(s, t, column, width);
    for (int i = 0; i < width; ++i)
      call.gradient[column + i] = gradient<kind>(s[i], t[i], column + i == call.label, sums.coefficient, factors, row, options);
  });
}

}  // namespace

extern "C" void host_row(const float* student, const float* teacher, float* gradient, float* losses, int64_t vocabulary, int cluster_size,
                         int kind, double mixing, double temperature, double student_scale, double student_softcap, double teacher_scale,
                         double teacher_softcap, double row_weight, double label_weight, int64_t label, int labels, int stats) {
  const int64_t multiple = 8 * cluster_size;
  const Call call{student, teacher, gradient, losses, vocabulary, (vocabulary + multiple - 1) / multiple * 8, cluster_size,
                  make_options(mixing, temperature, {float(student_scale), float(student_softcap)},
                               {float(teacher_scale), float(teacher_softcap)}, labels != 0, stats != 0),
                  float(row_weight), float(label_weight), label};
  const std::function<void(const Call&)> kinds[] = {run<forward_kl>, run<reverse_kl>, run<tvd>, run<jsd>, run<skew_kl>, run<skew_rkl>};
  kinds[kind - forward_kl](call);
}
