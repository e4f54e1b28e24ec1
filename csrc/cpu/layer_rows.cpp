// Rows of the distances between layers on the CPU: one source, compiled once per processor variant.
//
// 3 x elements x size of traffic, which is what bounds these loops: elements of 16 bits are widened in registers, on
// both looks. A row is 128 to a few thousand numbers: the second look, for the gradient, finds it in L1.
#include "cpu/layer_rows.h"

#include "cpu/blocks.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

// Blocks of a row of elements S and T: f(begin, n, s, t).
template <class S, class T, class F>
KDFAST_LOCAL void for_row(const LayerShape& shape, const LayerRow& row, F f) {
  alignas(64) S s[kBlock];
  alignas(64) T t[kBlock];
  for (int64_t at = 0; at < shape.columns; at += kBlock) {
    const int64_t n = shape.columns - at < kBlock ? shape.columns - at : kBlock;
    f(at, n, gather(row.student, shape.student_stride, at, n, s), gather(row.teacher, shape.teacher_stride, at, n, t));
  }
}

// What sums of S are made in.
template <class S>
using RealOf = decltype(widened(S{}));

// 0 where a column does not count, or lies at or below the floor.
template <class Real>
struct Counted {
  const bool* columns;
  Real floor;

  Counted(const LayerShape& shape, const LayerRow& row) : columns(row.counted), floor(Real(shape.floor)) {}
  KDFAST_HD_MEMBER Vector<Real> operator()(Vector<Real> x, int64_t column, int count) const {
    if (columns) x = where(columns + column, count, x, Vector<Real>{});
    return x <= floor ? Vector<Real>{} : x;
  }
};

template <class S, class T>
void squared(const LayerShape& shape, LayerRow& row) {
  using V = Vector<S>;
  using Real = RealOf<S>;
  const Counted<Real> counted(shape, row);
  const Real factor = Real(2 * row.factor), floor = Real(shape.floor);
  double total = 0;
  for_row<S, T>(shape, row, [&](int64_t at, int64_t n, const S* from_s, const T* from_t) {
    S* g = row.gradient ? (S*)row.gradient + at : nullptr;
    V sums[2]{};
    for_vectors<S>(n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
      const V from = load_or_zeros(from_s + i, count), s = counted(from, at + i, count);
      const V t = counted(load_or_zeros(from_t + i, count), at + i, count), d = s == t ? V{} : s - t;
      sums[which] += d * d;
      if (g) store(g + i, from <= floor ? V{} : factor * d, count);
    });
    total += sum(sums[0] + sums[1]);
  });
  row.value = SquaredDistance::of({0, 0, 0, 0, total}).value;
}

template <class S, class T>
VectorSums look(const LayerShape& shape, const LayerRow& row) {
  using V = Vector<S>;
  VectorSums all{};
  for_row<S, T>(shape, row, [&](int64_t, int64_t n, const S* from_s, const T* from_t) {
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
void distance(const LayerShape& shape, LayerRow& row) {
  if constexpr (Terms::kOneLook) return squared<S, T>(shape, row);
  using V = Vector<S>;
  using Real = RealOf<S>;
  const DistanceResult result = Terms::of(look<S, T>(shape, row));
  row.value = result.value;
  if (!row.gradient) return;
  const Real of_student = Real(row.factor * result.of_student), of_other = Real(row.factor * result.of_other);
  for_row<S, T>(shape, row, [&](int64_t at, int64_t n, const S* from_s, const T* from_t) {
    S* g = (S*)row.gradient + at;
    for_vectors<S>(n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      const V s = load_or_zeros(from_s + i, count), t = load_or_zeros(from_t + i, count);
      store(g + i, of_student * s + of_other * (result.near ? s - t : t), count);
    });
  });
}

template <class Terms>
void any(const LayerShape& shape, LayerRow& row) {
  if (shape.student == Element::f64) return distance<Terms, double, double>(shape, row);
  with_element(shape.student, [&](auto s) {
    with_element(shape.teacher, [&](auto t) { distance<Terms, decltype(s), decltype(t)>(shape, row); });
  });
}

}  // namespace

extern const LayerKernels kLayers = {{any<SquaredDistance>, any<CosineDistance>, any<NormalizedDistance>}};

}  // namespace kdfast::KDFAST_VARIANT
