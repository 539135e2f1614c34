// A row of the student against a teacher that lists K ids of it: a divergence over K + 1 events, the listed ids and any other.
//
// fastkd/ops/topk_events.py has the mathematics. Included by rows.cpp, whose passes over a row it shares.
#pragma once

template <typename T>
struct Event {
  int64_t id;  // -1: the others together, or no entry
  T logit, log_p;
  T distance;  // log of the mass over that of the row's largest logit
  T q, gradient, label;  // the last: what the label's term adds to the gradient
};

// log sum exp of one member; NaN where all are -infinity.
template <typename T>
INLINED T log_sum_exp(const Event<T>* events, int64_t n, T Event<T>::*member) {
  T largest = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t k = 0; k < n; ++k) largest = std::max(largest, events[k].*member);
  for (int64_t k = 0; k < n; ++k) sum += exp_of_negative(events[k].*member - largest);
  return largest + std::log(sum);
}

// The divergence of the events, whose gradients become those by the logits of the student's events.
template <typename T, Kind kind>
INLINED T event_divergence(Event<T>* events, int64_t n, T log_z, const Mixing<T>& mixing) {
  T value = 0, c_sum = 0, others = 0, accepted = 0;
  int64_t peak = 0;
  for (int64_t k = 0; k < n; ++k) {
    Event<T>& event = events[k];
    const T log_q = event.distance - log_z;
    event.q = exp_of_negative(log_q);
    const T p = exp_of_negative(event.log_p);
    const Entry<T> entry = make_entry<kind, Math>(p, event.q, event.log_p, log_q, mixing);
    if constexpr (kind == nla) accepted += std::min(p, event.q);
    value += entry.value;
    c_sum += event.gradient = entry.coefficient;
    if (event.q > events[peak].q) peak = k;
  }
  if constexpr (kind == nla) {
    value = negative_log(accepted, value);
    c_sum /= accepted;
    for (int64_t k = 0; k < n; ++k) events[k].gradient /= accepted;
  }
  for (int64_t k = 0; k < n; ++k) {
    events[k].gradient -= events[k].q * c_sum;
    others += k == peak ? T(0) : events[k].gradient;
  }
  // As in any_row: what would cancel is minus the sum of the others.
  if (events[peak].q > T(0.5)) events[peak].gradient = -others;
  return value;
}

template <typename T>
INLINED T event_divergence(Kind kind, Event<T>* events, int64_t n, T log_z, const Mixing<T>& mixing) {
  switch (kind) {
    case reverse_kl: return event_divergence<T, reverse_kl>(events, n, log_z, mixing);
    case mixed: return event_divergence<T, mixed>(events, n, log_z, mixing);
    case tvd: return event_divergence<T, tvd>(events, n, log_z, mixing);
    case nla: return event_divergence<T, nla>(events, n, log_z, mixing);
    case jsd: return event_divergence<T, jsd>(events, n, log_z, mixing);
    case skew_kl: return event_divergence<T, skew_kl>(events, n, log_z, mixing);
    case skew_rkl: return event_divergence<T, skew_rkl>(events, n, log_z, mixing);
    default: return event_divergence<T, forward_kl>(events, n, log_z, mixing);
  }
}

// `s` holds the row's tempered logits and is scratch; `g`, which may be `s`, takes their gradient; null: not wanted. `events` has room for
// one more than the list.
template <typename T>
INLINED void topk_row(const Call<T>& call, int64_t row, T* s, T* g, Event<T>* events) {
  const int64_t n = call.vocabulary, entries = call.lists.entries, label = call.labels ? call.labels[row] : -1;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const T temperature = call.temperature, s_label = label >= 0 ? s[label] : T(0);
  for (int64_t k = 0; k < entries; ++k) {
    const int64_t id = call.lists.ids[row * entries + k];
    // An id outside of the vocabulary gives NaN.
    const T logit = id < 0 ? nothing : id < n ? s[id] : std::numeric_limits<T>::quiet_NaN();
    events[k] = {id < n ? id : -1, logit, id < 0 ? nothing : call.lists.log_probabilities[row * entries + k]};
  }
  for (int64_t k = 0; k < entries; ++k)
    if (events[k].id >= 0) s[events[k].id] = nothing;
  Event<T>* const first = std::max_element(events, events + entries, [](auto& a, auto& b) { return a.logit < b.logit; });
  // Lowest, not -infinity: all others may be that.
  const T max_others = std::max(row_max(s, n), std::numeric_limits<T>::lowest());
  const bool is_listed_peak = first->logit >= max_others;
  const T max_s = is_listed_peak ? first->logit : max_others;
  for (int64_t k = 0; k < entries; ++k) events[k].distance = events[k].logit - max_s;
  // The mass of the others is a sum of its own, where one less the list's would cancel.
  const T sum_others = exp_sum(s, n, max_others, T(1));
  Event<T>& others = events[entries];
  others = {-1, nothing, call.lists.log_tail ? call.lists.log_tail[row] : nothing, max_others - max_s + std::log(sum_others)};
  if (call.lists.renormalizes) {
    const T log_mass = log_sum_exp(events, entries, &Event<T>::log_p);
    for (int64_t k = 0; k < entries; ++k) events[k].log_p -= log_mass;
  }
  const T log_z = log_sum_exp(events, entries + 1, &Event<T>::distance);
  const T value = event_divergence(call.kind, events, entries + 1, log_z, make_mixing(T(call.mixing)));
  call.divergence[row] = temperature * temperature * value;

  // The label's term is a softmax at the temperature 1 over all columns.
  T log_z_label = 0, label_weight = 0;
  if (call.labels) call.cross_entropy[row] = 0;
  if (label >= 0) {
    T sum = exp_sum(s, n, max_others, temperature) * exp_of_negative(temperature * (max_others - max_s));
    for (int64_t k = 0; k < entries; ++k) sum += exp_of_negative(temperature * events[k].distance);
    log_z_label = temperature * max_s + std::log(sum);
    call.cross_entropy[row] = log_z_label - temperature * s_label;
    if (call.label_weight) label_weight = call.label_weight[row];
  }
  if (!g) return;
  // The gradient of the columns that are not listed, but for a peak of the label's term among them.
  const Slope<T> slope{T(call.student_transform.scale), T(call.student_transform.softcap), temperature};
  const T row_weight = temperature * call.row_weight[row];
  // What others.gradient is shared out by is a softmax of its own, however little mass it has.
  const T of_others = sum_others == 0 ? T(0) : row_weight * others.gradient / sum_others;
  const bool label_peaks = label_weight != 0 && is_peaked(std::exp(log_z_label - temperature * max_s));
  const int64_t peak = label_peaks && !is_listed_peak ? first_max(s, n, max_s) : -1;
  if (peak >= 0) s[peak] = nothing;
  const auto share = [=](int64_t j) __attribute__((always_inline)) { return of_others * exp_of_negative(s[j] - max_others); };
  T label_sum = fill_gradient(s, g, n, label_weight, log_z_label, slope, share).label;
  bool is_listed_label = false;
  for (int64_t k = 0; k < entries && label_weight != 0; ++k) {
    Event<T>& event = events[k];
    const bool is_label = event.id == label;
    event.label = label_weight * (exp_of_negative(temperature * event.logit - log_z_label) - is_label);
    is_listed_label |= is_label;
    if (!(label_peaks && is_listed_peak && &event == first)) label_sum += event.label;
  }
  if (label_weight != 0 && !is_listed_label) {
    g[label] -= label_weight * slope(s_label);
    if (label != peak) label_sum -= label_weight;
  }
  if (label_peaks && is_listed_peak) first->label = -label_sum;
  if (peak >= 0) g[peak] = (of_others - label_sum) * slope(max_s);
  for (int64_t k = 0; k < entries; ++k) {
    const Event<T>& event = events[k];
    if (event.id >= 0) g[event.id] = (row_weight * event.gradient + event.label) * slope(event.logit);
  }
}
