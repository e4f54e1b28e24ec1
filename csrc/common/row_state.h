// The state of a row of logits while it is looked at, written once for the CPU variants, the CUDA kernels and their
// host shim.
//
// With k = log2(e) / T a logit z contributes 2^((z - max) * k). `RowState` is the online-softmax state of a student row
// and a teacher row seen together; states of disjoint columns merge in any order. Maxima are subtracted before anything
// is multiplied, so that a row of -3e38 (a finite mask) is as exact as one near 0.
#pragma once
#include <math.h>

#if defined(__CUDACC__)
#define KDFAST_HD __host__ __device__ __forceinline__
#define KDFAST_HD_MEMBER __host__ __device__ __forceinline__
#else
// Internal linkage: each CPU variant keeps its own copy (csrc/cpu/simd.h).
#define KDFAST_HD static inline __attribute__((always_inline))
#define KDFAST_HD_MEMBER __attribute__((always_inline))
#endif

namespace kdfast {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// Stands for the maximum of columns that are all -inf: keeps differences of maxima finite.
constexpr float kNoMaximum = -3.4028234663852886e38f;

// Over the columns seen, with x and y the student's and teacher's logits less their maxima. As numbers in memory, a
// row's state is these in this order. Of a teacher that is known in some columns (Terms::kTopk) the powers are
// probabilities, which need no maximum: y is its logit itself. The second maximum is then of the student's rest, the
// columns that the teacher does not have, where that is asked for (Terms::kRest): these may all be less likely than
// others by more than a power can tell.
template <class Real>
struct RowState {
  Real max_s, sum_s;        // sum of 2^(x * k)
  Real max_t, sum_t;        // sum of 2^(y * k)
  Real moment_t, moment_s;  // the divergence's own two sums (csrc/common/divergence_terms.h)
  Real sum_one;             // sum of e^x: the student's at temperature 1. This and the rest only beside labels.
  Real total;               // sum of the student's logits
  Real label;               // the student's logit of the label
};
constexpr int kRowStateSize = 9;

template <class Real>
KDFAST_HD RowState<Real> no_columns() {
  return {Real(kNoMaximum), 0, Real(kNoMaximum), 0, 0, 0, 0, 0, 0};
}

KDFAST_HD double exp2_of(double x) { return ::exp2(x); }
KDFAST_HD double log2_of(double x) { return ::log2(x); }
KDFAST_HD float exp2_of(float x) { return ::exp2f(x); }
KDFAST_HD float log2_of(float x) { return ::log2f(x); }

// `r` referred to higher maxima. The terms of the moments are powers times something linear in x and y
// (Terms::of_teacher, Terms::of_student), and so are moved by the same of the maxima's shifts. A sum that vanishes
// takes them along: 0 * inf would be NaN where a -inf met a power too small to represent.
template <class Terms, class Real>
KDFAST_HD RowState<Real> referred(const RowState<Real>& r, Real max_s, Real max_t, Real k) {
  const Real shift_s = r.max_s - max_s, shift_t = Terms::kTopk ? Real(0) : r.max_t - max_t;
  auto scale = [](Real shift, Real k) { return shift == 0 ? Real(1) : exp2_of(shift * k); };
  const Real scale_s = scale(shift_s, k), scale_t = scale(shift_t, k);
  RowState<Real> to = r;
  to.max_s = max_s, to.sum_s = r.sum_s * scale_s;
  to.max_t = max_t, to.sum_t = r.sum_t * scale_t;
  if constexpr (Terms::kOfTeacher) {
    to.moment_t = to.sum_t == 0 ? Real(0) : scale_t * (r.moment_t + r.sum_t * Terms::of_teacher(shift_s, shift_t));
  }
  if constexpr (Terms::kOfStudent) {
    to.moment_s = to.sum_s == 0 ? Real(0) : scale_s * (r.moment_s + r.sum_s * Terms::of_student(shift_s, shift_t));
  }
  if constexpr (Terms::kRest) to.moment_s = r.moment_s * scale(r.max_t - max_t, k);
  to.sum_one = r.sum_one == 0 ? Real(0) : r.sum_one * scale(shift_s, Real(kLog2e));
  return to;
}

template <class Terms, class Real>
KDFAST_HD void merge(RowState<Real>& into, const RowState<Real>& other, Real k) {
  const Real max_s = into.max_s > other.max_s ? into.max_s : other.max_s;
  const Real max_t = into.max_t > other.max_t ? into.max_t : other.max_t;
  const RowState<Real> x = referred<Terms>(into, max_s, max_t, k), y = referred<Terms>(other, max_s, max_t, k);
  into = {max_s,
          x.sum_s + y.sum_s,
          max_t,
          x.sum_t + y.sum_t,
          x.moment_t + y.moment_t,
          x.moment_s + y.moment_s,
          x.sum_one + y.sum_one,
          x.total + y.total,
          x.label + y.label};
}

}  // namespace kdfast
