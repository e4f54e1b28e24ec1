// Rows of few columns (classification heads): a row per lane of a vector, all looks in L1.
#pragma once
#include "cpu/divergence_blocks.h"

namespace kdfast::KDFAST_VARIANT {

template <class Real>
struct Tile {
  alignas(64) Real at[kNarrow][VectorOf<Real>::count];
};

// Lanes without a row repeat the first one.
template <class Real, class E, class Read>
KDFAST_LOCAL void fill_lanes(Tile<Real>& tile, const DivergenceRow* rows, int count, int64_t columns, int64_t stride,
                             Read read) {
  constexpr int L = VectorOf<Real>::count;
  const E* from[L];
  for (int i = 0; i < L; ++i) from[i] = (const E*)read(rows[i < count ? i : 0]);
  for (int64_t j = 0; j < columns; ++j) {
    for (int i = 0; i < L; ++i) tile.at[j][i] = widened(from[i][j * stride]);
  }
}
template <class Read>
KDFAST_LOCAL void read_lanes(Tile<float>& tile, Element type, const DivergenceRow* rows, int count, int64_t columns,
                             int64_t stride, Read read) {
  if (type == Element::f32) fill_lanes<float, float>(tile, rows, count, columns, stride, read);
  if (type == Element::bf16) fill_lanes<float, BFloat16>(tile, rows, count, columns, stride, read);
  if (type == Element::f16) fill_lanes<float, Float16>(tile, rows, count, columns, stride, read);
}
template <class Read>
KDFAST_LOCAL void read_lanes(Tile<double>& tile, Element, const DivergenceRow* rows, int count, int64_t columns,
                             int64_t stride, Read read) {
  fill_lanes<double, double>(tile, rows, count, columns, stride, read);
}

template <class E, class Real>
KDFAST_LOCAL void empty_lanes(const Tile<Real>& tile, const DivergenceRow* rows, int count, int64_t columns) {
  constexpr int L = VectorOf<Real>::count;
  E* to[L];
  for (int i = 0; i < count; ++i) to[i] = (E*)rows[i].gradient;
  for (int64_t j = 0; j < columns; ++j) {
    for (int i = 0; i < count; ++i) narrow_to(to[i][j], tile.at[j][i]);
  }
}
KDFAST_LOCAL void write_lanes(const Tile<float>& tile, Element type, const DivergenceRow* rows, int count,
                              int64_t columns) {
  if (type == Element::f32) empty_lanes<float>(tile, rows, count, columns);
  if (type == Element::bf16) empty_lanes<BFloat16>(tile, rows, count, columns);
  if (type == Element::f16) empty_lanes<Float16>(tile, rows, count, columns);
}
KDFAST_LOCAL void write_lanes(const Tile<double>& tile, Element, const DivergenceRow* rows, int count,
                              int64_t columns) {
  empty_lanes<double>(tile, rows, count, columns);
}

// A number of each row, as a vector.
template <class Real, class Get>
KDFAST_LOCAL Vector<Real> across(const DivergenceRow* rows, int count, Get get) {
  alignas(64) Real lanes[VectorOf<Real>::count];
  for (int i = 0; i < VectorOf<Real>::count; ++i) lanes[i] = Real(get(rows[i < count ? i : 0]));
  return load(lanes);
}
template <class Real, class Set>
KDFAST_LOCAL void along(Vector<Real> v, DivergenceRow* rows, int count, Set set) {
  alignas(64) Real lanes[VectorOf<Real>::count];
  store(lanes, v);
  for (int i = 0; i < count; ++i) set(rows[i], lanes[i]);
}
constexpr double RowState<double>::* kStateFields[kRowStateSize] = {
    &RowState<double>::max_s,   &RowState<double>::sum_s,    &RowState<double>::max_t,
    &RowState<double>::sum_t,   &RowState<double>::moment_t, &RowState<double>::moment_s,
    &RowState<double>::sum_one, &RowState<double>::total,    &RowState<double>::label};

// As many rows as a vector has lanes, or fewer.
template <template <class> class Terms, class Real>
class NarrowRows {
  using V = Vector<Real>;
  using T = Terms<Lanes<Real>>;

 public:
  NarrowRows(const DivergenceShape& shape, DivergenceRow* rows, int count)
      : shape_(shape),
        rows_(rows),
        count_(count),
        columns_(shape.columns),
        with_{broadcast(Real(shape.settings.mixing)), broadcast(Real(shape.settings.per_vocabulary))},
        scale_(across<Real>(rows, count, [](const DivergenceRow& r) { return r.k; })) {
    read_lanes(s_, shape.student, rows, count, columns_, shape.student_stride, [](auto& r) { return r.student; });
    read_lanes(t_, shape.teacher, rows, count, columns_, shape.teacher_stride, [](auto& r) { return r.teacher; });
  }

  void run(Known known) {
    known == Known::nothing ? look() : take_state();
    if (!T::kDifference) make_powers();
    if (known == Known::nothing && !T::kDifference) count_powers();
    if (shape_.labels) make_powers_at_one();
    if (known == Known::nothing && shape_.labels) count_labels();
    if (T::kLogRatio) shift_ = Lanes<Real>::log2(state_.sum_t / state_.sum_s);
    if (T::kSecondLook && known != Known::everything) look_again();
    const V loss = T::loss(state_, scale_.k, with_);
    along<Real>(loss, rows_, count_, [](DivergenceRow& r, Real x) { r.loss = x; });
    if (shape_.labels) {
      const V log_sum_one = Real(kLn2) * Lanes<Real>::log2(state_.sum_one);
      along<Real>(log_sum_one, rows_, count_, [](DivergenceRow& r, Real x) { r.log_sum_one = x; });
    }
    if (known != Known::everything && (shape_.labels || shape_.keeps_state)) give_state();
    if (rows_->gradient) write_gradient();
  }

 private:
  // The columns one by one, all rows at once.
  template <class F>
  KDFAST_HD_MEMBER void each(F f) const {
    for (int64_t j = 0; j < columns_; ++j) f(j, load(s_.at[j]), load(t_.at[j]));
  }
  V difference(V s, V t) const { return s == t ? V{} : scale_.k * (s - t); }
  V log_ratio(V s, V t) const { return terms::bounded(scale_.k * ((s - state_.max_s) - (t - state_.max_t)) + shift_); }

  void look() {
    const V none = broadcast(Real(kNoMaximum));
    V max_s = none, max_t = none, a{};
    each([&](int64_t, V s, V t) {
      max_s = maximum(s, max_s);
      max_t = maximum(t, max_t);
      if constexpr (T::kDifference) a += difference(s, t) * difference(s, t);
    });
    state_ = {max_s, V{}, max_t, V{}, a, V{}, V{}, V{}, V{}};
  }
  void make_powers() {
    each([&](int64_t j, V s, V t) {
      store(es_.at[j], scale_.power(s - state_.max_s));
      store(et_.at[j], scale_.power(t - state_.max_t));
    });
  }
  void count_powers() {
    RowState<V> r = state_;
    each([&](int64_t j, V s, V t) {
      const V x = s - r.max_s, y = t - r.max_t, es = load(es_.at[j]), et = load(et_.at[j]);
      r.sum_s += es;
      r.sum_t += et;
      if constexpr (T::kOfTeacher) r.moment_t += et * (et > 0 ? T::of_teacher(x, y) : V{});
      if constexpr (T::kOfStudent) r.moment_s += es * (es > 0 ? T::of_student(x, y) : V{});
    });
    state_ = r;
  }
  void make_powers_at_one() {
    each([&](int64_t j, V s, V) { store(one_.at[j], exp2(Real(kLog2e) * (s - state_.max_s))); });
  }
  void count_labels() {
    V sum_one{}, total{};
    each([&](int64_t j, V s, V) {
      sum_one += load(one_.at[j]);
      total += s;
    });
    state_.sum_one = sum_one;
    state_.total = total;
  }
  void look_again() {
    const V n_s = Real(1) / state_.sum_s, n_t = Real(1) / state_.sum_t;
    V loss{}, mean_u{};
    each([&](int64_t j, V s, V t) {
      const V p_s = n_s * load(es_.at[j]), p_t = n_t * load(et_.at[j]), d = log_ratio(s, t);
      if constexpr (T::kSecondLook) loss += T::value(p_s, p_t, d, with_);
      mean_u += T::u(p_s, p_t, d, with_);
    });
    state_.moment_t = loss;
    state_.moment_s = mean_u;
  }

  void take_state() {
    V r[kRowStateSize];
    for (int f = 0; f < kRowStateSize; ++f) {
      r[f] = across<Real>(rows_, count_, [&](const DivergenceRow& row) { return row.state.*kStateFields[f]; });
    }
    state_ = {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
  }
  void give_state() const {
    const V r[kRowStateSize] = {state_.max_s,    state_.sum_s,   state_.max_t, state_.sum_t, state_.moment_t,
                                state_.moment_s, state_.sum_one, state_.total, state_.label};
    for (int f = 0; f < kRowStateSize; ++f) {
      along<Real>(r[f], rows_, count_, [&](DivergenceRow& row, Real x) { row.state.*kStateFields[f] = x; });
    }
  }

  void write_gradient() {
    const V factor = across<Real>(rows_, count_, [](const DivergenceRow& r) { return r.factor; });
    const V n_s = factor / state_.sum_s, n_t = factor / state_.sum_t;
    const V mean_term = n_s * T::mean_u(state_, scale_.k, with_);
    each([&](int64_t j, V s, V t) {
      if constexpr (T::kDifference) {
        store(g_.at[j], factor * T::u(V{}, V{}, difference(s, t), with_));
      } else {
        const V es = load(es_.at[j]), d = T::kLogRatio ? log_ratio(s, t) : V{};
        store(g_.at[j], T::u(n_s * es, n_t * load(et_.at[j]), d, with_) - mean_term * es);
      }
    });
    if (shape_.labels) add_labels();
    write_lanes(g_, shape_.gradient, rows_, count_, columns_);
  }
  void add_labels() {
    const V hard = across<Real>(rows_, count_, [](const DivergenceRow& r) { return r.hard_factor; });
    const V n = hard / state_.sum_one, even = hard * (Real(shape_.smoothing) * with_.per_vocabulary);
    each([&](int64_t j, V, V) { store(g_.at[j], load(g_.at[j]) + (n * load(one_.at[j]) - even)); });
    for (int i = 0; i < count_; ++i) {
      const DivergenceRow& r = rows_[i];
      if (r.label >= 0 && r.label < columns_) g_.at[r.label][i] -= Real(r.hard_factor * (1 - shape_.smoothing));
    }
  }

  const DivergenceShape& shape_;
  DivergenceRow* rows_;
  int count_;
  int64_t columns_;
  Settings<V> with_;
  Scale<Real> scale_;
  RowState<V> state_;
  V shift_{};
  Tile<Real> s_, t_, es_, et_, one_, g_;
};

template <template <class> class Terms, class Real>
void narrow(const DivergenceShape& shape, DivergenceRow* rows, int64_t count, Known known) {
  constexpr int L = VectorOf<Real>::count;
  for (int64_t at = 0; at < count; at += L) {
    NarrowRows<Terms, Real>(shape, rows + at, int(count - at < L ? count - at : L)).run(known);
  }
}

}  // namespace kdfast::KDFAST_VARIANT
