// Blocks of columns, float or double whatever the logits are: what the wide rows of divergence_rows.cpp are made of.
#pragma once
#include "cpu/blocks.h"
#include "cpu/divergence_rows.h"

namespace kdfast::KDFAST_VARIANT {

// The numbers of csrc/common/divergence_terms.h: a vector of floats, or a double.
template <class R>
struct Lanes {
  using Real = R;
  using V = Vector<R>;
  KDFAST_HD_MEMBER static V exp2(V x) { return KDFAST_VARIANT::exp2(x); }
  KDFAST_HD_MEMBER static V log2(V x) { return KDFAST_VARIANT::log2(x); }
  KDFAST_HD_MEMBER static V reciprocal(V x) { return Real(1) / x; }
};

// The scale k of a row, and the smallest (logit - maximum) whose power does not vanish.
template <class Real>
struct Scale {
  Vector<Real> k, least;
  KDFAST_HD_MEMBER explicit Scale(Vector<Real> k) : k(k), least(Real(kExp2Least) / k) {}
  KDFAST_HD_MEMBER Vector<Real> power(Vector<Real> x) const { return exp2(x, k, least); }
};

template <class Real>
struct Block {
  int64_t n;
  const Real *s, *t;            // logits
  Real *es, *et;                // their powers, in whole vectors
  Real max_s, max_t;            // that the powers are relative to; of a top-k see LessMaxima
  bool teacher;                 // has a column here; else t is not there
  const char *next_s, *next_t;  // the logits of the next block, in memory
};

// In L1.
template <class Real>
struct Workspace {
  alignas(64) Real s[kBlock], t[kBlock], es[kBlock], et[kBlock], g[kBlock];
};

// A block's part of DivergenceRow::powers. A second look puts u (divergence_terms.h) in the place of the teacher's.
template <class Real>
struct BlockPowers {
  Real maxima[2], s[kBlock], t[kBlock];
};
template <class Real>
KDFAST_LOCAL BlockPowers<Real>* powers_at(const DivergenceRow& row, int64_t column) {
  return row.powers ? (BlockPowers<Real>*)row.powers + column / kBlock : nullptr;
}

// Columns that do not count, as -inf.
template <class Real>
KDFAST_LOCAL const Real* only(const bool* counted, const Real* from, int64_t n, Real* to) {
  for_vectors<Real>(n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
    const Vector<Real> none = broadcast(Real(-__builtin_inff()));
    store(to + i, where(counted + i, count, load(from + i, count), none), count);
  });
  return to;
}

// The teacher's columns of a block among -inf; null: none.
template <class Real>
KDFAST_LOCAL const Real* scatter(const DivergenceRow& row, int64_t begin, int64_t n, Real* to) {
  int64_t first = 0, last = row.entry_count;
  while (first < last) {  // the first that is not before the block
    const int64_t middle = (first + last) / 2;
    row.entries[middle].column < begin ? first = middle + 1 : last = middle;
  }
  if (first == row.entry_count || row.entries[first].column >= begin + n) return nullptr;
  const Vector<Real> none = broadcast(Real(-__builtin_inff()));
  for_vectors<Real>(n, [&](int64_t i, int count, int) { store(to + i, none, count); });
  for (int64_t e = first; e < row.entry_count && row.entries[e].column < begin + n; ++e) {
    to[row.entries[e].column - begin] = Real(row.entries[e].log_probability * (kLog2e / row.k));
  }
  return to;
}

template <class Real>
Block<Real> read_block(const DivergenceShape& shape, const DivergenceRow& row, int64_t begin, int64_t n,
                       Workspace<Real>& work) {
  const int64_t next = begin + kBlock;
  BlockPowers<Real>* powers = powers_at<Real>(row, begin);
  const Real* s = read(shape.student, row.student, shape.student_stride, begin, n, work.s);
  const Real* t = shape.topk ? scatter(row, begin, n, work.t)
                             : read(shape.teacher, row.teacher, shape.teacher_stride, begin, n, work.t);
  return {n,
          row.counted ? only(row.counted + begin, s, n, work.s) : s,
          row.counted ? only(row.counted + begin, t, n, work.t) : t,
          powers ? powers->s : work.es,
          powers ? powers->t : work.et,
          powers ? powers->maxima[0] : Real(row.state.max_s),
          powers ? powers->maxima[1] : Real(row.state.max_t),
          t != nullptr,
          (const char*)row.student + next * shape.student_stride * size_of(shape.student),
          (const char*)row.teacher + next * shape.teacher_stride * size_of(shape.teacher)};
}

// ---- the cross-entropy of labels ----
// Where e^(z - maximum) of a block comes from: made anew; kept from temperature 1; or the square of what is kept,
// from 2.
enum class AtOneFrom { logits, power, square };

// f(i, count, e^(z - maximum)) of the vectors of a block.
template <class Real>
class AtOne {
 public:
  AtOne(const Block<Real>& block, double k, bool have_powers) : block_(block), scale_(broadcast(Real(kLog2e))) {
    if (have_powers && k == kLog2e) from_ = AtOneFrom::power;
    if (have_powers && k == kLog2e / 2) from_ = AtOneFrom::square;
  }
  template <class F>
  KDFAST_HD_MEMBER void each(F f) const {
    from_ == AtOneFrom::logits  ? each<AtOneFrom::logits>(f)
    : from_ == AtOneFrom::power ? each<AtOneFrom::power>(f)
                                : each<AtOneFrom::square>(f);
  }

 private:
  template <AtOneFrom from, class F>
  KDFAST_HD_MEMBER void each(F f) const {
    for_vectors<Real>(block_.n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      if constexpr (from == AtOneFrom::logits) {
        f(i, count, scale_.power(load(block_.s + i, count) - block_.max_s));
      } else {
        const Vector<Real> e = load(block_.es + i);
        f(i, count, from == AtOneFrom::power ? e : e * e);
      }
    });
  }
  const Block<Real>& block_;
  AtOneFrom from_ = AtOneFrom::logits;
  Scale<Real> scale_;
};

template <class Real>
void look_for_labels(const Block<Real>& block, double k, bool have_powers, bool smooth, RowState<double>& state) {
  Vector<Real> sum_one{};
  AtOne<Real>(block, k, have_powers).each([&](int64_t, int, Vector<Real> e) __attribute__((always_inline)) {
    sum_one += e;
  });
  state.sum_one = sum(sum_one);
  if (!smooth) return;
  Vector<Real> total{};
  constexpr int L = VectorOf<Real>::count;
  const int64_t whole = block.n / L * L;
  for (int64_t i = 0; i < whole; i += L) total += load(block.s + i);
  state.total = sum(total);
  for (int64_t i = whole; i < block.n; ++i) state.total += block.s[i];
}

// Adds hard_factor * (softmax(z) - (1 - smoothing) * [column = label] - smoothing / vocabulary).
template <class Real>
void add_label_gradient(const DivergenceShape& shape, const DivergenceRow& row, const Block<Real>& block,
                        bool have_powers, int64_t begin, Real* g) {
  const double shift = ::exp2((block.max_s - row.state.max_s) * kLog2e);
  const Vector<Real> factor = broadcast(Real(row.hard_factor * shift / row.state.sum_one));
  const Vector<Real> even = broadcast(Real(row.hard_factor * shape.smoothing * shape.settings.per_vocabulary));
  AtOne<Real>(block, row.k, have_powers).each([&](int64_t i, int count, Vector<Real> e) __attribute__((always_inline)) {
    store(g + i, load(g + i, count) + (factor * e - even), count);
  });
  const int64_t label = row.label - begin;
  if (label >= 0 && label < block.n) g[label] -= Real(row.hard_factor * (1 - shape.smoothing));
}

}  // namespace kdfast::KDFAST_VARIANT
