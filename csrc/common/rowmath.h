// The mathematics of a row of logits, written once for the CPU variants, the CUDA kernels and their host shim.
//
// With k = log2(e) / T a logit z contributes 2^((z - max) * k). `RowState` is the online-softmax state of a student row
// and a teacher row seen together; states of disjoint columns merge in any order. Maxima are subtracted before anything
// is multiplied, so that a row of -3e38 (a finite mask) is as exact as one near 0. Where logits are already scaled, k
// is 1.
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

// Over the columns seen: maxima, sums of 2^((z - max) * k), and the divergence's own sum
// dot = sum 2^((t - max_t) * k) * ((t - max_t) - (s - max_s)).
template <class Real>
struct RowState {
  Real max_s = kNoMaximum, sum_s = 0, max_t = kNoMaximum, sum_t = 0, dot = 0;
};
constexpr int kRowStateSize = 5;

KDFAST_HD double exp2_of(double x) { return ::exp2(x); }
KDFAST_HD double log2_of(double x) { return ::log2(x); }
KDFAST_HD float exp2_of(float x) { return ::exp2f(x); }
KDFAST_HD float log2_of(float x) { return ::log2f(x); }

// `a` referred to higher maxima: each term of dot loses (shift of t) and gains (shift of s). A sum that vanishes takes
// its dot along: 0 * inf would be NaN where a student's -inf met a teacher probability too small to represent.
template <class Real>
KDFAST_HD RowState<Real> referred(const RowState<Real>& a, Real max_s, Real max_t, Real k) {
  auto scale = [&](Real shift) { return shift == 0 ? Real(1) : exp2_of(shift * k); };
  const Real shift_s = a.max_s - max_s, shift_t = a.max_t - max_t, scale_t = scale(shift_t);
  const Real sum_t = a.sum_t * scale_t;
  return {max_s, a.sum_s * scale(shift_s), max_t, sum_t,
          sum_t == 0 ? Real(0) : scale_t * (a.dot + a.sum_t * (shift_t - shift_s))};
}

template <class Real>
KDFAST_HD void merge(RowState<Real>& into, const RowState<Real>& other, Real k = 1) {
  const Real max_s = into.max_s > other.max_s ? into.max_s : other.max_s;
  const Real max_t = into.max_t > other.max_t ? into.max_t : other.max_t;
  const RowState<Real> a = referred(into, max_s, max_t, k), b = referred(other, max_s, max_t, k);
  into = {max_s, a.sum_s + b.sum_s, max_t, a.sum_t + b.sum_t, a.dot + b.dot};
}

// KL(t || s) = sum p_t (ln p_t - ln p_s) in nats. A row that is all -inf, or holds +inf or NaN, gives NaN.
template <class Real>
KDFAST_HD Real kl_of(const RowState<Real>& r, Real k = 1) {
  return Real(kLn2) * (k * r.dot / r.sum_t + log2_of(r.sum_s / r.sum_t));
}

}  // namespace kdfast
