// Rows of the divergences on the CPU: one source, compiled once per processor variant.
//
// Per row, 3 x columns x element size of traffic: student and teacher are read, the gradient is written. The first look
// takes a block of columns twice while it lies in L1 (maxima, then sums), and leaves the block's float sums to a double
// state, so that rounding does not grow with the vocabulary. Where a gradient is wanted it keeps the powers it has
// computed in L2, relative to the block's maxima: half of the exponentials, which are what bounds these loops. The
// normalisers stay factors of the gradient: folded into the exponents they would cost accuracy at large logits and save
// nothing.
#include "cpu/divergence_rows.h"

#include "cpu/simd.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

// The scale k of a row, and the smallest (logit - maximum) whose power does not vanish.
template <class Real>
struct Scale {
  Vector<Real> k, least;
  __attribute__((always_inline)) explicit Scale(Vector<Real> k) : k(k), least(Real(kExp2Least) / k) {}
  __attribute__((always_inline)) Vector<Real> power(Vector<Real> x) const { return exp2(x, k, least); }
};

template <class Real>
struct Sums {
  Vector<Real> s{}, t{}, dot{};
  // x and y: logits less their maxima, es and et: their powers. A teacher's 0 counts nothing, whatever the student
  // holds.
  __attribute__((always_inline)) void count(Vector<Real> x, Vector<Real> y, Vector<Real> es, Vector<Real> et) {
    s += es;
    t += et;
    dot += et * (et > 0 ? y - x : Vector<Real>{});
  }
};

// A block's part of DivergenceRow::powers.
template <class Real>
struct BlockPowers {
  Real maxima[2], s[kBlock], t[kBlock];
};
template <class Real>
KDFAST_LOCAL BlockPowers<Real>* powers_at(const DivergenceRow& row, int64_t column) {
  return row.powers ? (BlockPowers<Real>*)row.powers + column / kBlock : nullptr;
}

template <bool kKeep, class Real, class S, class T>
RowState<double> look_at_block(const S* s, const T* t, int64_t n, Real k, BlockPowers<Real>* powers) {
  using V = Vector<Real>;
  constexpr int L = VectorOf<Real>::count;
  const int64_t whole = n / L * L, rest = n - whole;
  V most_s[2] = {broadcast(Real(-__builtin_inff())), broadcast(Real(-__builtin_inff()))};
  V most_t[2] = {most_s[0], most_s[0]};
  int64_t i = 0;
  for (; i + 2 * L <= whole; i += 2 * L) {
    for (int u = 0; u < 2; ++u) {
      most_s[u] = maximum(most_s[u], V(load(s + i + u * L)));
      most_t[u] = maximum(most_t[u], V(load(t + i + u * L)));
    }
  }
  for (; i < whole; i += L) {
    most_s[0] = maximum(most_s[0], V(load(s + i)));
    most_t[0] = maximum(most_t[0], V(load(t + i)));
  }
  const V last_s = load_some(s + whole, rest), last_t = load_some(t + whole, rest);
  const Real max_s = maximum(Real(kNoMaximum), top(maximum(maximum(most_s[0], most_s[1]), last_s)));
  const Real max_t = maximum(Real(kNoMaximum), top(maximum(maximum(most_t[0], most_t[1]), last_t)));
  const Scale<Real> scale(broadcast(k));
  Sums<Real> sums[2];
  if (kKeep) powers->maxima[0] = max_s, powers->maxima[1] = max_t;
  auto count = [&](Sums<Real>& into, V s, V t, int64_t at) __attribute__((always_inline)) {
    const V x = s - max_s, y = t - max_t, es = scale.power(x), et = scale.power(y);
    into.count(x, y, es, et);
    if (kKeep) store(powers->s + at, es), store(powers->t + at, et);
  };
  for (i = 0; i + 2 * L <= whole; i += 2 * L) {
    for (int u = 0; u < 2; ++u) {
      // The next block comes from memory while this one keeps the arithmetic busy.
      __builtin_prefetch(s + i + u * L + kBlock);
      __builtin_prefetch(t + i + u * L + kBlock);
      count(sums[u], load(s + i + u * L), load(t + i + u * L), i + u * L);
    }
  }
  for (; i < whole; i += L) count(sums[0], load(s + i), load(t + i), i);
  if (rest) count(sums[1], last_s, last_t, i);
  return {max_s, sum(sums[0].s + sums[1].s), max_t, sum(sums[0].t + sums[1].t), sum(sums[0].dot + sums[1].dot)};
}

template <class Real, class S, class T>
void gradient_of_block(const S* s, const T* t, S* g, int64_t n, Real k, const RowState<double>& state, double factor) {
  using V = Vector<Real>;
  constexpr int L = VectorOf<Real>::count;
  const Scale<Real> scale(broadcast(k));
  const Real max_s = Real(state.max_s), max_t = Real(state.max_t);
  const V factor_s = broadcast(Real(factor / state.sum_s)), factor_t = broadcast(Real(factor / state.sum_t));
  auto gradient = [&](V x, V y) __attribute__((always_inline)) {
    return factor_s * scale.power(x - max_s) - factor_t * scale.power(y - max_t);
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    for (int u = 0; u < 2; ++u) store(g + i + u * L, gradient(load(s + i + u * L), load(t + i + u * L)));
  }
  for (; i + L <= n; i += L) store(g + i, gradient(load(s + i), load(t + i)));
  if (i < n) store_some(g + i, gradient(load_some(s + i, n - i), load_some(t + i, n - i)), n - i);
}

// The same from the powers that the first look has kept.
template <class Real, class S>
void gradient_of_powers(const BlockPowers<Real>& powers, S* g, int64_t n, const DivergenceRow& row) {
  using V = Vector<Real>;
  constexpr int L = VectorOf<Real>::count;
  const RowState<double>& state = row.state;
  const V factor_s = broadcast(Real(row.factor / state.sum_s * ::exp2((powers.maxima[0] - state.max_s) * row.k)));
  const V factor_t = broadcast(Real(row.factor / state.sum_t * ::exp2((powers.maxima[1] - state.max_t) * row.k)));
  auto gradient = [&](int64_t i) __attribute__((always_inline)) {
    return factor_s * load(powers.s + i) - factor_t * load(powers.t + i);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) store(g + i, gradient(i));
  if (i < n) store_some(g + i, gradient(i), int(n - i));
}

// `n` elements from `begin` on, side by side: in place, or gathered into `scratch` where the columns have a stride.
template <class E>
KDFAST_LOCAL const E* columns(const void* row, int64_t stride, int64_t begin, int64_t n, E* scratch) {
  const E* first = (const E*)row + begin * stride;
  if (stride == 1) return first;
  for (int64_t i = 0; i < n; ++i) scratch[i] = first[i * stride];
  return scratch;
}

template <class Real, class S, class T>
void look(const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
  S scratch_s[kBlock];
  T scratch_t[kBlock];
  const Real k = Real(row.k);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    const S* student = columns(row.student, shape.student_stride, at, n, scratch_s);
    const T* teacher = columns(row.teacher, shape.teacher_stride, at, n, scratch_t);
    BlockPowers<Real>* powers = powers_at<Real>(row, at);
    const RowState<double> block = powers ? look_at_block<true>(student, teacher, n, k, powers)
                                          : look_at_block<false>(student, teacher, n, k, powers);
    at == begin ? void(row.state = block) : merge(row.state, block, double(k));
  }
}

template <class Real, class S, class T>
void gradient(const DivergenceShape& shape, const DivergenceRow& row, int64_t begin, int64_t end) {
  S scratch_s[kBlock];
  T scratch_t[kBlock];
  const Real k = Real(row.k);
  // Backwards: what the first look has left in L2 is its end.
  for (int64_t at = begin + (end - begin - 1) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    S* g = (S*)row.gradient + at;
    if (const BlockPowers<Real>* powers = powers_at<Real>(row, at)) {
      gradient_of_powers(*powers, g, n, row);
      continue;
    }
    gradient_of_block(columns(row.student, shape.student_stride, at, n, scratch_s),
                      columns(row.teacher, shape.teacher_stride, at, n, scratch_t), g, n, k, row.state, row.factor);
  }
}

// ---- few columns: a row per lane ----
template <class Real>
struct Tile {
  alignas(64) Real at[kNarrow][VectorOf<Real>::count] = {};
};

template <class Real, class E>
KDFAST_LOCAL void read_lane(Tile<Real>& tile, int lane, const void* row, int64_t columns, int64_t stride) {
  for (int64_t j = 0; j < columns; ++j) tile.at[j][lane] = widened(((const E*)row)[j * stride]);
}

// Replaces the logits of the tiles by 2^(scaled logit - maximum), and fills the states unless they are given.
template <class Real>
KDFAST_LOCAL void look_at_lanes(Tile<Real>& s, Tile<Real>& t, int64_t columns, DivergenceRow* rows, int count,
                                bool have_state) {
  using V = Vector<Real>;
  constexpr int L = VectorOf<Real>::count;
  alignas(64) Real k[L], max_s[L] = {}, max_t[L] = {}, sum_s[L], sum_t[L], dot[L];
  for (int i = 0; i < L; ++i) k[i] = Real(rows[i < count ? i : 0].k);
  for (int i = 0; i < count; ++i) {
    max_s[i] = Real(rows[i].state.max_s);
    max_t[i] = Real(rows[i].state.max_t);
  }
  const Scale<Real> scale(load(k));
  V top_s = load(max_s), top_t = load(max_t);
  if (!have_state) {
    top_s = top_t = broadcast(Real(-__builtin_inff()));
    for (int64_t j = 0; j < columns; ++j) {
      top_s = maximum(top_s, load(s.at[j]));
      top_t = maximum(top_t, load(t.at[j]));
    }
    top_s = maximum(broadcast(Real(kNoMaximum)), top_s);
    top_t = maximum(broadcast(Real(kNoMaximum)), top_t);
  }
  Sums<Real> sums;
  for (int64_t j = 0; j < columns; ++j) {
    const V x = load(s.at[j]) - top_s, y = load(t.at[j]) - top_t, es = scale.power(x), et = scale.power(y);
    sums.count(x, y, es, et);
    store(s.at[j], es);
    store(t.at[j], et);
  }
  if (have_state) return;
  store(max_s, top_s), store(max_t, top_t), store(sum_s, sums.s), store(sum_t, sums.t), store(dot, sums.dot);
  for (int i = 0; i < count; ++i) rows[i].state = {max_s[i], sum_s[i], max_t[i], sum_t[i], dot[i]};
}

template <class Real, class S>
KDFAST_LOCAL void write_lanes(Tile<Real>& s, const Tile<Real>& t, int64_t columns, const DivergenceRow* rows,
                              int count) {
  using V = Vector<Real>;
  constexpr int L = VectorOf<Real>::count;
  alignas(64) Real factor[L] = {}, sum_s[L], sum_t[L];
  for (int i = 0; i < L; ++i) sum_s[i] = sum_t[i] = 1;
  for (int i = 0; i < count; ++i) {
    factor[i] = Real(rows[i].factor);
    sum_s[i] = Real(rows[i].state.sum_s);
    sum_t[i] = Real(rows[i].state.sum_t);
  }
  const V factor_s = load(factor) / load(sum_s), factor_t = load(factor) / load(sum_t);
  for (int64_t j = 0; j < columns; ++j) store(s.at[j], factor_s * load(s.at[j]) - factor_t * load(t.at[j]));
  for (int i = 0; i < count; ++i) {
    for (int64_t j = 0; j < columns; ++j) narrow_to(((S*)rows[i].gradient)[j], s.at[j][i]);
  }
}

template <class Real, class S, class T>
void narrow(const DivergenceShape& shape, DivergenceRow* rows, int64_t count, bool have_state) {
  constexpr int L = VectorOf<Real>::count;
  Tile<Real> s, t;
  for (int64_t at = 0; at < count; at += L, rows += L) {
    const int n = int(count - at < L ? count - at : L);
    for (int i = 0; i < n; ++i) {
      read_lane<Real, S>(s, i, rows[i].student, shape.columns, shape.student_stride);
      read_lane<Real, T>(t, i, rows[i].teacher, shape.columns, shape.teacher_stride);
    }
    look_at_lanes(s, t, shape.columns, rows, n, have_state);
    if (rows->gradient) write_lanes<Real, S>(s, t, shape.columns, rows, n);
  }
}

// Calls f with the computing type and the types of student and teacher. float64 comes in pairs.
template <class F>
void visit(const DivergenceShape& shape, F f) {
  auto with_student = [&](auto s) {
    if (shape.teacher == Element::f32) return f(0.f, s, 0.f);
    if (shape.teacher == Element::bf16) return f(0.f, s, BFloat16{});
    f(0.f, s, Float16{});
  };
  if (shape.student == Element::f64) return f(0., 0., 0.);
  if (shape.student == Element::f32) return with_student(0.f);
  if (shape.student == Element::bf16) return with_student(BFloat16{});
  with_student(Float16{});
}

}  // namespace

extern const DivergenceKernels kDivergence = {
    [](const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
      visit(shape,
            [&](auto real, auto s, auto t) { look<decltype(real), decltype(s), decltype(t)>(shape, row, begin, end); });
    },
    [](const DivergenceShape& shape, const DivergenceRow& row, int64_t begin, int64_t end) {
      visit(shape, [&](auto real, auto s, auto t) {
        gradient<decltype(real), decltype(s), decltype(t)>(shape, row, begin, end);
      });
    },
    [](const DivergenceShape& shape, DivergenceRow* rows, int64_t count, bool have_state) {
      visit(shape, [&](auto real, auto s, auto t) {
        narrow<decltype(real), decltype(s), decltype(t)>(shape, rows, count, have_state);
      });
    },
    [](const float* x, float* y, int64_t n) {
      const Scale<float> scale(broadcast(1.f));
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(y + i, scale.power(load(x + i)));
      if (i < n) store_some(y + i, scale.power(load_some(x + i, int(n - i))), int(n - i));
    },
};

}  // namespace kdfast::KDFAST_VARIANT
