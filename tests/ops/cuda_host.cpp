// The CUDA kernel on the host: the very functions of csrc/cuda/row_math.h on the very parameter of a launch, with a cluster's blocks and
// threads as loops. What threads do together (rows.cu) is done here by one loop over all of them.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "row_math.h"

using namespace fastkd;

namespace {

constexpr int threads = 8, pack = 4;

float number(const void* from, int type, int64_t index) {
  if (type == float32) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  if (type == bfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
}

void store(void* to, int type, int64_t index, float x) {
  if (type == float32) {
    static_cast<float*>(to)[index] = x;
  } else if (type == bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    static_cast<uint16_t*>(to)[index] = x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  } else {
    static_cast<_Float16*>(to)[index] = x;
  }
}

std::vector<float> logits(const void* from, int type, int64_t begin, int count, const float* bias, Transform transform) {
  std::vector<float> row(count);
  for (int i = 0; i < count; ++i) row[i] = logit(number(from, type, begin + i) + (bias ? bias[i] : 0), transform);
  return row;
}

// The columns of `thread` of a block that begins at `begin`, as each_column of rows.cu has them.
std::vector<int> columns(int begin, int end, int thread) {
  std::vector<int> mine;
  const int even = begin + (end - begin) / pack * pack;
  for (int column = begin + thread * pack; column < even; column += threads * pack)
    for (int i = 0; i < pack; ++i) mine.push_back(column + i);
  if (even + thread < end) mine.push_back(even + thread);
  return mine;
}

float largest(const std::vector<float>& row, int begin, int end) {
  float x = nothing;
  for (int i = begin; i < end; ++i) x = fmaxf(x, row[i]);
  return x;
}

int first(const std::vector<float>& row, int begin, int end, float x) {
  for (int i = begin; i < end; ++i)
    if (row[i] == x) return i;
  return no_column;
}

// Each sum of a part, or of a row, to that of the whole.
template <Kind kind, typename Part>
void add(Part& whole, Part& part, bool extras) {
  std::vector<float> sums;
  each_sum<kind>(part, extras, [&](float x) { sums.push_back(x); });
  auto next = sums.begin();
  each_sum<kind>(whole, extras, [&](float& x) { x += *next++; });
}

template <Kind kind>
Statistics merge(std::vector<Statistics> parts, int label_block, const Call& call) {
  Statistics whole = no_statistics();
  for (const Statistics& part : parts) {
    whole.student_from = fmaxf(whole.student_from, part.student_from);
    whole.teacher_from = fmaxf(whole.teacher_from, part.teacher_from);
    whole.label_from = fmaxf(whole.label_from, part.label_from);
    whole.student_peak = fmaxf(whole.student_peak, part.student_peak);
    whole.teacher_peak = fmaxf(whole.teacher_peak, part.teacher_peak);
  }
  for (const Statistics& part : parts) {
    if (part.student_peak == whole.student_peak) whole.peak = std::min(whole.peak, part.peak);
    if (part.teacher_peak == whole.teacher_peak) whole.teacher_best = std::min(whole.teacher_best, part.teacher_best);
  }
  for (Statistics& part : parts) {
    raise<kind>(part, whole.student_from, whole.teacher_from, whole.label_from);
    if (part.peak == whole.peak) whole.teacher_at_peak = part.teacher_at_peak;
    else if (part.peak != no_column) accumulate<kind>(part, part.student_peak, part.teacher_at_peak, call.rate, call.labels);
    add<kind>(whole, part, call.labels);
  }
  whole.label_logit = parts[label_block].label_logit;
  return whole;
}

template <Kind kind>
void serve_row(const Call& call, int64_t index, int blocks) {
  const int n = call.vocabulary;
  const auto s = logits(call.student, call.student_type, index * call.student_stride, n, call.student_bias, call.student_transform);
  const auto t = kind == none ? s : logits(call.teacher, call.teacher_type, index * call.teacher_stride, n, call.teacher_bias,
                                           call.teacher_transform);
  const bool has_labels = call.labels, stats = call.student_entropy;
  const int64_t label = has_labels ? call.labels[index] : -1;
  const int label_column = label >= 0 && label < n ? int(label) : -1;

  std::vector<Statistics> parts;
  for (int block = 0; block < blocks; ++block) {
    const int begin = std::min(n, block * call.slice), end = std::min(n, begin + call.slice);
    Statistics part = no_statistics();
    part.student_peak = largest(s, begin, end), part.teacher_peak = largest(t, begin, end);
    part.student_from = bits_of(part.student_peak, call.rate), part.teacher_from = bits_of(part.teacher_peak, call.rate);
    part.label_from = bits_of(part.student_peak, log2_e);
    if (part.student_peak != nothing) part.peak = first(s, begin, end, part.student_peak);
    if (part.peak != no_column) part.teacher_at_peak = t[part.peak];
    part.teacher_best = first(t, begin, end, part.teacher_peak);
    if (label_column >= begin && label_column < end) part.label_logit = s[label_column];
    const Statistics empty = part;
    for (int thread = 0; thread < threads; ++thread) {
      Statistics own = empty;
      for (int column : columns(begin, end, thread)) {
        const bool held = column == part.peak;
        accumulate<kind>(own, held ? nothing : s[column], held ? nothing : t[column], call.rate, has_labels);
      }
      add<kind>(part, own, has_labels);
    }
    parts.push_back(part);
  }
  const float log_rest = call.teacher_rest ? call.teacher_rest[index] : nothing;
  Row row = make_row<kind>(merge<kind>(parts, label_column >= 0 ? label_column / call.slice : 0, call), call.rate, has_labels, log_rest);
  if (label_column < 0) row.whole.label_logit = NAN;

  Sums sums{};
  for (int block = 0; block < blocks; ++block) {
    const int begin = std::min(n, block * call.slice), end = std::min(n, begin + call.slice);
    for (int thread = 0; thread < threads; ++thread) {
      Sums own{};
      for (int column : columns(begin, end, thread)) {
        const bool held = column == row.whole.peak;
        add_entry<kind>(own, held ? nothing : s[column], held ? nothing : t[column], row, call, stats);
      }
      add<kind>(sums, own, stats);
    }
  }
  const float label_weight = label_column >= 0 && call.label_weight ? call.label_weight[index] : 0;
  const Factors factors = finish<kind>(sums, row, call, call.row_weight[index], label_weight, label_column);
  if (kind != none) call.divergence[index] = call.temperature * call.temperature * sums.value;
  if (has_labels) call.cross_entropy[index] = label >= 0 ? cross_entropy(row) : 0;
  if (stats) {
    call.student_entropy[index] = sums.student_entropy * ln_2;
    call.teacher_entropy[index] = sums.teacher_entropy * ln_2;
    call.top1_agreement[index] = row.whole.peak == row.whole.teacher_best;
    call.acceptance[index] = sums.acceptance;
  }
  if (!call.gradient) return;
  for (int column = 0; column < n; ++column) {
    const float of_label = column == label_column ? factors.label : 0;
    float g = (gradient<kind>(s[column], t[column], factors, row, call, has_labels) - of_label) * slope(s[column], call.student_transform);
    if (column == row.whole.peak) g = factors.at_peak;
    store(call.gradient, call.gradient_type, index * call.gradient_stride + column, g);
  }
}

}  // namespace

extern "C" void host_rows(int kind, const Call* call, int64_t rows, int blocks) {
  void (*const of_kinds[])(const Call&, int64_t, int) = {serve_row<none>, serve_row<forward_kl>, serve_row<reverse_kl>,
                                                        serve_row<mixed>, serve_row<tvd>, serve_row<nla>, serve_row<jsd>,
                                                        serve_row<skew_kl>, serve_row<skew_rkl>};
  for (int64_t row = 0; row < rows; ++row) of_kinds[kind](*call, row, blocks);
}

// Where a field of the kernel's parameter lies; -1 for a name that it does not have.
extern "C" int offset_of(const char* name) {
#define FIELD(field) \
  if (!std::strcmp(name, #field)) return int(offsetof(Call, field));
  FIELD(student) FIELD(teacher) FIELD(gradient) FIELD(student_bias) FIELD(teacher_bias) FIELD(teacher_rest) FIELD(row_weight)
  FIELD(labels) FIELD(label_weight) FIELD(divergence) FIELD(cross_entropy) FIELD(student_entropy) FIELD(teacher_entropy)
  FIELD(top1_agreement) FIELD(acceptance) FIELD(student_stride) FIELD(teacher_stride) FIELD(gradient_stride) FIELD(student_type) FIELD(teacher_type)
  FIELD(gradient_type) FIELD(vocabulary) FIELD(slice) FIELD(temperature) FIELD(rate) FIELD(student_transform)
  FIELD(teacher_transform) FIELD(mixing)
  return -1;
}

extern "C" int size_of_call() { return sizeof(Call); }
