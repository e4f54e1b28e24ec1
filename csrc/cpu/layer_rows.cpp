// Rows of the distances between layers on the CPU: one source, compiled once per processor variant.
//
// A row is 128 to a few thousand numbers: the second look, for the gradient, finds it in L1. 3 x elements x size of
// traffic.
#include "cpu/layer_rows.h"

#include "cpu/blocks.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

// Blocks of a row as floats or doubles: f(begin, n, s, t).
template <class Real, class F>
KDFAST_LOCAL void for_row(const LayerShape& shape, const LayerRow& row, F f) {
  alignas(64) Real s[kBlock], t[kBlock];
  for (int64_t at = 0; at < shape.columns; at += kBlock) {
    const int64_t n = shape.columns - at < kBlock ? shape.columns - at : kBlock;
    f(at, n, read(shape.student, row.student, shape.student_stride, at, n, s),
      read(shape.teacher, row.teacher, shape.teacher_stride, at, n, t));
  }
}

// 0 where a column does not count, or lies at or below the floor.
template <class Real>
struct Counted {
  const bool* columns;
  Real floor;

  Counted(const LayerShape& shape, const LayerRow& row) : columns(row.counted), floor(Real(shape.floor)) {}
  KDFAST_HD_MEMBER Vector<Real> operator()(const Real* from, int64_t column, int64_t i, int count) const {
    Vector<Real> x = load_or_zeros(from + i, count);
    if (columns) x = where(columns + column + i, count, x, Vector<Real>{});
    return x <= floor ? Vector<Real>{} : x;
  }
};

template <class Real>
void squared(const LayerShape& shape, LayerRow& row) {
  using V = Vector<Real>;
  const Counted<Real> counted(shape, row);
  const Real factor = Real(2 * row.factor), floor = Real(shape.floor);
  alignas(64) Real made[kBlock];
  double total = 0;
  for_row<Real>(shape, row, [&](int64_t at, int64_t n, const Real* s, const Real* t) {
    Real* g = row.gradient ? gradient_place(shape.student, row.gradient, at, made) : nullptr;
    V sums[2]{};
    for_vectors<Real>(n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
      const V from = counted(s, at, i, count), to = counted(t, at, i, count), d = from == to ? V{} : from - to;
      sums[which] += d * d;
      if (g) store(g + i, load(s + i, count) <= floor ? V{} : factor * d, count);
    });
    total += sum(sums[0] + sums[1]);
    if (g) write(shape.student, g, n, row.gradient, at);
  });
  row.value = SquaredDistance::of({0, 0, 0, 0, total}).value;
}

template <class Real>
VectorSums look(const LayerShape& shape, const LayerRow& row) {
  using V = Vector<Real>;
  VectorSums all{};
  for_row<Real>(shape, row, [&](int64_t, int64_t n, const Real* from_s, const Real* from_t) {
    V ss[2]{}, tt[2]{}, st[2]{}, sd[2]{}, dd[2]{};
    for_vectors<Real>(n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
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

template <class Terms, class Real>
void distance(const LayerShape& shape, LayerRow& row) {
  if constexpr (Terms::kOneLook) return squared<Real>(shape, row);
  using V = Vector<Real>;
  const DistanceResult result = Terms::of(look<Real>(shape, row));
  row.value = result.value;
  if (!row.gradient) return;
  const Real of_student = Real(row.factor * result.of_student), of_other = Real(row.factor * result.of_other);
  alignas(64) Real made[kBlock];
  for_row<Real>(shape, row, [&](int64_t at, int64_t n, const Real* from_s, const Real* from_t) {
    Real* g = gradient_place(shape.student, row.gradient, at, made);
    for_vectors<Real>(n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      const V s = load_or_zeros(from_s + i, count), t = load_or_zeros(from_t + i, count);
      store(g + i, of_student * s + of_other * (result.near ? s - t : t), count);
    });
    write(shape.student, g, n, row.gradient, at);
  });
}

template <class Terms>
void any(const LayerShape& shape, LayerRow& row) {
  (shape.student == Element::f64 ? distance<Terms, double> : distance<Terms, float>)(shape, row);
}

}  // namespace

extern const LayerKernels kLayers = {{any<SquaredDistance>, any<CosineDistance>, any<NormalizedDistance>}};

}  // namespace kdfast::KDFAST_VARIANT
