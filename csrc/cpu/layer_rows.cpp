// Rows of the distances between layers on the CPU: one source, compiled once per processor variant.
//
// 3 x elements x size of traffic, which is what bounds these loops: elements of 16 bits are widened in registers, on
// both looks. A row is 128 to a few thousand numbers: the second look, for the gradient, finds it in L1.
#include "cpu/layer_rows.h"

#include "cpu/blocks.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

template <class S, class T>
struct Row {
  const S* student;
  const T* teacher;
  S* gradient;    // null: not wanted
  double factor;  // of the gradient
};

// Blocks of a row from column `at` on: f(begin, n, s, t).
template <class S, class T, class F>
KDFAST_LOCAL void for_row(const LayerShape& shape, const Row<S, T>& row, F f, int64_t at = 0) {
  alignas(64) S s[kBlock];
  alignas(64) T t[kBlock];
  for (; at < shape.columns; at += kBlock) {
    const int64_t n = shape.columns - at < kBlock ? shape.columns - at : kBlock;
    f(at, n, gather(row.student, shape.student_stride, at, n, s), gather(row.teacher, shape.teacher_stride, at, n, t));
  }
}

// What sums of S are made in.
template <class S>
using RealOf = decltype(widened(S{}));

// 0 where a column does not count, or lies at or below the floor. kAll: there is neither.
template <bool kAll, class Real>
struct Counted {
  const bool* columns;
  Real floor;

  KDFAST_HD_MEMBER Vector<Real> operator()(Vector<Real> x, int64_t column, int count) const {
    if constexpr (kAll) return x;
    if (columns) x = where(columns + column, count, x, Vector<Real>{});
    return low(x) ? Vector<Real>{} : x;
  }
  KDFAST_HD_MEMBER auto low(Vector<Real> x) const { return x <= floor; }
};

// The first `half` columns, whole blocks, and as many after these in turn: where nothing is written, processors look
// further ahead of two streams than of one. Those of 16 bits are too short for it to pay.
template <class S, class T>
double squared_halves(const S* s, const T* t, int64_t half) {
  using V = Vector<S>;
  auto squares = [&](int64_t i) __attribute__((always_inline)) {
    const V from_s = load(s + i), from_t = load(t + i), d = from_s == from_t ? V{} : from_s - from_t;
    return d * d;
  };
  double total = 0;
  for (int64_t at = 0; at < half; at += kBlock) {
    V sums[2]{};
    for (int64_t i = at; i < at + kBlock; i += VectorOf<RealOf<S>>::count) {
      sums[0] += squares(i);
      sums[1] += squares(half + i);
    }
    total += sum(sums[0] + sums[1]);
  }
  return total;
}

template <bool kAll, bool kGradient, class S, class T>
double squared(const LayerShape& shape, const bool* columns, const Row<S, T>& row) {
  using V = Vector<S>;
  using Real = RealOf<S>;
  const Counted<kAll, Real> counted{columns, Real(shape.floor)};
  const Real factor = Real(2 * row.factor);
  const bool halves = sizeof(S) > 2 && kAll && !kGradient && shape.student_stride == 1 && shape.teacher_stride == 1;
  const int64_t half = halves ? shape.columns / 2 / kBlock * kBlock : 0;
  double total = squared_halves(row.student, row.teacher, half);
  auto block = [&](int64_t at, int64_t n, const S* from_s, const T* from_t) {
    S* g = kGradient ? row.gradient + at : nullptr;
    V sums[2]{};
    for_vectors<S>(n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
      const V from = load_or_zeros(from_s + i, count), s = counted(from, at + i, count);
      const V t = counted(load_or_zeros(from_t + i, count), at + i, count), d = s == t ? V{} : s - t;
      sums[which] += d * d;
      if constexpr (kGradient) store(g + i, !kAll && counted.low(from) ? V{} : factor * d, count);
    });
    total += sum(sums[0] + sums[1]);
  };
  for_row(shape, row, block, 2 * half);
  return SquaredDistance::of({0, 0, 0, 0, total}).value;
}

template <class S, class T>
double squared(const LayerShape& shape, const bool* columns, const Row<S, T>& row) {
  if (columns || shape.floor == shape.floor) {
    return (row.gradient ? squared<false, true, S, T> : squared<false, false, S, T>)(shape, columns, row);
  }
  return (row.gradient ? squared<true, true, S, T> : squared<true, false, S, T>)(shape, nullptr, row);
}

template <class S, class T>
KDFAST_LOCAL VectorSums look(const LayerShape& shape, const Row<S, T>& row) {
  using V = Vector<S>;
  VectorSums all{};
  for_row(shape, row, [&](int64_t, int64_t n, const S* from_s, const T* from_t) __attribute__((always_inline)) {
    V ss[2]{}, tt[2]{}, st[2]{}, sd[2]{}, dd[2]{};
    for_vectors<S>(n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
      const V s = load_or_zeros(from_s + i, count), t = load_or_zeros(from_t + i, count), d = t - s;
      ss[which] += s * s;
      tt[which] += t * t;
      st[which] += s * t;
      sd[which] += s * d;
      dd[which] += d * d;
    });
    all.ss += sum(ss[0] + ss[1]);
    all.tt += sum(tt[0] + tt[1]);
    all.st += sum(st[0] + st[1]);
    all.sd += sum(sd[0] + sd[1]);
    all.dd += sum(dd[0] + dd[1]);
  });
  return all;
}

template <class Terms, class S, class T>
KDFAST_LOCAL double distance(const LayerShape& shape, const bool* columns, const Row<S, T>& row) {
  if constexpr (Terms::kOneLook) return squared<S, T>(shape, columns, row);
  using V = Vector<S>;
  using Real = RealOf<S>;
  const DistanceResult result = Terms::of(look<S, T>(shape, row));
  if (!row.gradient) return result.value;
  const Real of_student = Real(row.factor * result.of_student), of_other = Real(row.factor * result.of_other);
  for_row(shape, row, [&](int64_t at, int64_t n, const S* from_s, const T* from_t) {
    S* g = row.gradient + at;
    for_vectors<S>(n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      const V s = load_or_zeros(from_s + i, count), t = load_or_zeros(from_t + i, count);
      store(g + i, of_student * s + of_other * (result.near ? s - t : t), count);
    });
  });
  return result.value;
}

template <class Terms, class S, class T>
void distances(const LayerShape& shape, const LayerRun& run) {
  auto at = [](const auto* from, int64_t bytes) { return (decltype(from))((const char*)from + bytes); };
  for (int64_t i = 0; i < run.count; ++i) {
    const Row<S, T> row{
        at((const S*)run.student, i * run.student_step), at((const T*)run.teacher, i * run.teacher_step),
        run.gradient ? (S*)run.gradient + i * shape.columns : nullptr, run.factor * (run.by_row ? run.by_row[i] : 1)};
    run.values[i] = distance<Terms, S, T>(shape, run.counted, row);
  }
}

template <class Terms>
void any(const LayerShape& shape, const LayerRun& run) {
  if (shape.student == Element::f64) return distances<Terms, double, double>(shape, run);
  with_element(shape.student, [&](auto s) {
    with_element(shape.teacher, [&](auto t) { distances<Terms, decltype(s), decltype(t)>(shape, run); });
  });
}

}  // namespace

extern const LayerKernels kLayers = {{any<SquaredDistance>, any<CosineDistance>, any<NormalizedDistance>}};

}  // namespace kdfast::KDFAST_VARIANT
