// The divergences, each a struct of terms: what a column adds to its row, what a row comes to, what a column's gradient
// is. Shared by the CPU variants and the CUDA kernels, which know nothing else of a divergence. Natural logarithms, p =
// softmax(z / T); x and y are logits less their row's maxima, log_ratio = log2(p_s / p_t).
//
// With u = p_s * dL/dp_s (up to a multiple of p_s, which cancels) the gradient of every loss over distributions is
// dL/dz_s = (u - p_s * mean_u) / T, mean_u = sum u: the mean of dL/dp_s under p_s. Where the first look already tells
// loss and mean_u, two moments of it do (kOfTeacher: moment_t = sum 2^(y*k) * of_teacher(x, y), kOfStudent: moment_s =
// sum 2^(x*k) * of_student(x, y)). Else a second look, with the normalisers known, leaves moment_t = sum of `value` and
// moment_s = mean_u (kSecondLook).
//
// `Math` holds the number type V (a float, a double, a vector of a CPU variant), its Real, and exp2, log2 and
// reciprocal of it. docs/extending.md tells how to add a divergence.
#pragma once
#include "common/row_state.h"

// The list: of every divergence the name that Python has for it and its terms. `Divergence` and the tables of both
// backends are made of it, and CMake compiles the CUDA kernels of each line by itself.
#define KDFAST_DIVERGENCES(X)              \
  X(kl_div, KlDiv)                         \
  X(reverse_kl_div, ReverseKlDiv)          \
  X(js_div, JsDiv)                         \
  X(skew_kl_div, SkewKlDiv)                \
  X(skew_reverse_kl_div, SkewReverseKlDiv) \
  X(total_variation, TotalVariation)       \
  X(soft_cross_entropy, SoftCrossEntropy)  \
  X(logit_mse, LogitMse)                   \
  X(symmetric_kl_div, SymmetricKlDiv)      \
  X(topk_bucket, TopkBucket)               \
  X(topk_renormalize, TopkRenormalize)     \
  X(topk_drop, TopkDrop)

namespace kdfast {

enum class Divergence : int {
#define KDFAST_NAME(name, Terms) name,
  KDFAST_DIVERGENCES(KDFAST_NAME)
#undef KDFAST_NAME
      count
};

// How much of a row's state is given: a first look leaves the normalisers, a second look the rest. Divergences without
// a second look know everything after the first.
enum class Known : int { nothing, normalisers, everything };

// Numbers of a call: beta or skew, and 1 / the width of the whole vocabulary; and of a row, where terms ask for them
// (kOfRow, kRest): the teacher's probability that is kept, and the gradient of a column that it does not have, over its
// power.
template <class V>
struct Settings {
  V mixing, per_vocabulary, kept{}, rest{};
};

// A top-k teacher's log-probability, as it counts: probabilities below 1e-17 change no result, but would vanish among
// the columns that the teacher does not have where they underflow.
template <class Real>
KDFAST_HD Real counted_log_probability(Real x) {
  return x < Real(-40) ? Real(-40) : x;
}

// What a divergence has unless it says otherwise.
struct TermsBase {
  static constexpr bool kOfTeacher = false, kOfStudent = false;  // which moments the first look makes
  static constexpr bool kSecondLook = false;
  static constexpr bool kLogRatio = false;  // u asks for log_ratio
  // Whether it is of logits, without a softmax: log_ratio = (z_s - z_t) * k, and moment_t = the sum of its squares.
  static constexpr bool kDifference = false;
  static constexpr bool kTopk = false;   // the teacher is known in some columns, and -inf elsewhere
  static constexpr bool kRest = false;   // moment_s = the sum of 2^((z - max_t) * k) where the teacher has no column
  static constexpr bool kOfRow = false;  // u asks for the row's `kept`
  // Of a mixture: what Python calls `mixing`, and the divergences that it is by definition where that is 0 or 1.
  static constexpr const char* kMixing = "";
  static constexpr Divergence kAtZero = Divergence::count, kAtOne = Divergence::count;  // count: itself
};

namespace terms {

// Bounds log_ratio, which is infinite or (at 0 / 0) NaN where a probability is 0: times that probability it then gives
// 0.
template <class V>
KDFAST_HD V bounded(V log_ratio) {
  const V bound = V{} + 16384.f;
  log_ratio = log_ratio > -bound ? log_ratio : -bound;
  return log_ratio < bound ? log_ratio : bound;
}

// m = w * p_t + (1 - w) * p_s seen from both, without underflow, overflow or cancellation: from the smaller ratio.
template <class Math>
struct Mixture {
  using V = typename Math::V;
  V log_s, log_t;  // log2(p_s / m), log2(p_t / m)
  V ratio_s;       // p_s / m

  KDFAST_HD_MEMBER Mixture(V w, V log_ratio) {
    const V zero{}, one = zero + 1.f;
    const V e = Math::exp2(log_ratio > zero ? -log_ratio : log_ratio), near = log_ratio > zero ? one - w : w;
    const V sum = near + (one - near) * e, log_sum = Math::log2(sum);
    log_s = (log_ratio > zero ? zero : log_ratio) - log_sum;
    log_t = (log_ratio > zero ? -log_ratio : zero) - log_sum;
    ratio_s = (log_ratio > zero ? one : e) * Math::reciprocal(sum);
  }
};

}  // namespace terms

// KL(t || s) = sum p_t (log p_t - log p_s).
template <class Math>
struct KlDiv : TermsBase {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kOfTeacher = true;
  template <class X>
  KDFAST_HD_MEMBER static X of_teacher(X x, X y) {
    return y - x;
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>&) {
    return Real(kLn2) * (k * r.moment_t / r.sum_t + Math::log2(r.sum_s / r.sum_t));
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>&, V, const Settings<V>&) { return V{} - Real(1); }
  KDFAST_HD_MEMBER static V u(V, V p_t, V, const Settings<V>&) { return -p_t; }
};

// KL(s || t).
template <class Math>
struct ReverseKlDiv : TermsBase {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kOfStudent = true, kLogRatio = true;
  template <class X>
  KDFAST_HD_MEMBER static X of_student(X x, X y) {
    return x - y;
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>&) {
    return Real(kLn2) * (k * r.moment_s / r.sum_s + Math::log2(r.sum_t / r.sum_s));
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>& r, V k, const Settings<V>& with) { return loss(r, k, with); }
  KDFAST_HD_MEMBER static V u(V p_s, V, V log_ratio, const Settings<V>&) { return Real(kLn2) * p_s * log_ratio; }
};

// (KL(t || s) + KL(s || t)) / 2.
template <class Math>
struct SymmetricKlDiv : ReverseKlDiv<Math> {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kOfTeacher = true;
  template <class X>
  KDFAST_HD_MEMBER static X of_teacher(X x, X y) {
    return y - x;
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>&) {
    return Real(kLn2 / 2) * k * (r.moment_t / r.sum_t + r.moment_s / r.sum_s);
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>& r, V k, const Settings<V>& with) {
    return Real(0.5) * (ReverseKlDiv<Math>::loss(r, k, with) - Real(1));
  }
  KDFAST_HD_MEMBER static V u(V p_s, V p_t, V log_ratio, const Settings<V>&) {
    return Real(0.5) * (Real(kLn2) * p_s * log_ratio - p_t);
  }
};

// -sum p_t log p_s.
template <class Math>
struct SoftCrossEntropy : KlDiv<Math> {
  using V = typename Math::V;
  using Real = typename Math::Real;
  template <class X>
  KDFAST_HD_MEMBER static X of_teacher(X x, X) {
    return -x;
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>&) {
    return Real(kLn2) * (k * r.moment_t / r.sum_t + Math::log2(r.sum_s));
  }
};

// The divergences that take a second look, with its two sums. The bounded log_ratio would hide a row that is no
// distribution.
struct SecondLook : TermsBase {
  static constexpr bool kSecondLook = true, kLogRatio = true;
  template <class V>
  KDFAST_HD_MEMBER static V nan_unless_distributions(const RowState<V>& r) {
    const V zero{};
    return zero / r.sum_s + zero / r.sum_t;
  }
  template <class V>
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V, const Settings<V>&) {
    return r.moment_t + nan_unless_distributions(r);
  }
  template <class V>
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>& r, V, const Settings<V>&) {
    return r.moment_s + nan_unless_distributions(r);
  }
};

// beta * KL(t || m) + (1 - beta) * KL(s || m), m = beta * t + (1 - beta) * s.
template <class Math>
struct JsDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr const char* kMixing = "beta";
  static constexpr Divergence kAtZero = Divergence::kl_div, kAtOne = Divergence::reverse_kl_div;
  KDFAST_HD_MEMBER static V u(V p_s, V, V log_ratio, const Settings<V>& with) {
    return Real(kLn2) * (Real(1) - with.mixing) * p_s * terms::Mixture<Math>(with.mixing, log_ratio).log_s;
  }
  KDFAST_HD_MEMBER static V value(V p_s, V p_t, V log_ratio, const Settings<V>& with) {
    const terms::Mixture<Math> m(with.mixing, log_ratio);
    return Real(kLn2) * (with.mixing * p_t * m.log_t + (Real(1) - with.mixing) * p_s * m.log_s);
  }
};

// KL(t || m), m = skew * t + (1 - skew) * s.
template <class Math>
struct SkewKlDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr const char* kMixing = "skew";
  static constexpr Divergence kAtZero = Divergence::kl_div;
  KDFAST_HD_MEMBER static V u(V, V p_t, V log_ratio, const Settings<V>& with) {
    return (with.mixing - Real(1)) * p_t * terms::Mixture<Math>(with.mixing, log_ratio).ratio_s;
  }
  KDFAST_HD_MEMBER static V value(V, V p_t, V log_ratio, const Settings<V>& with) {
    return Real(kLn2) * p_t * terms::Mixture<Math>(with.mixing, log_ratio).log_t;
  }
};

// KL(s || m), m = skew * s + (1 - skew) * t.
template <class Math>
struct SkewReverseKlDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr const char* kMixing = "skew";
  static constexpr Divergence kAtZero = Divergence::reverse_kl_div;
  KDFAST_HD_MEMBER static V u(V p_s, V, V log_ratio, const Settings<V>& with) {
    const terms::Mixture<Math> m(Real(1) - with.mixing, log_ratio);
    return p_s * (Real(kLn2) * m.log_s - with.mixing * m.ratio_s);
  }
  KDFAST_HD_MEMBER static V value(V p_s, V, V log_ratio, const Settings<V>& with) {
    return Real(kLn2) * p_s * terms::Mixture<Math>(Real(1) - with.mixing, log_ratio).log_s;
  }
};

// sum |p_s - p_t| / 2.
template <class Math>
struct TotalVariation : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  KDFAST_HD_MEMBER static V u(V p_s, V, V log_ratio, const Settings<V>&) {
    const V zero{}, half = Real(0.5) * p_s;
    return log_ratio > zero ? half : log_ratio < zero ? -half : zero * p_s;
  }
  KDFAST_HD_MEMBER static V value(V p_s, V p_t, V, const Settings<V>&) {
    const V difference = p_s - p_t;
    return Real(0.5) * (difference > V{} ? difference : -difference);
  }
};

// KL of a teacher that is known in its top-k columns K: there its logits are T * log-probability, elsewhere -inf, and
// what their powers sum to is the probability q that is kept. As if it were all: KL(t / q || s).
template <class Math>
struct TopkRenormalize : KlDiv<Math> {
  static constexpr bool kTopk = true;
};

// sum over K of t (log t - log s): q * KL(t / q || s) + q log q.
template <class Math>
struct TopkDrop : TopkRenormalize<Math> {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kOfRow = true;
  KDFAST_HD_MEMBER static V kept(const RowState<V>& r) { return r.sum_t == V{} ? V{} + NAN : r.sum_t; }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>& with) {
    const V q = kept(r);
    return q * (KlDiv<Math>::loss(r, k, with) + Real(kLn2) * Math::log2(q));
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>& r, V, const Settings<V>&) { return -kept(r); }
  KDFAST_HD_MEMBER static V u(V, V p_t, V, const Settings<V>& with) { return -with.kept * p_t; }
};

// The same with all other columns as one: + (1 - q) (log(1 - q) - log of what s has there), which is summed by itself:
// 1 less the others would lose it to rounding.
template <class Math>
struct TopkBucket : TopkDrop<Math> {
  using V = typename Math::V;
  using Real = typename Math::Real;
  using TopkDrop<Math>::kept;
  static constexpr bool kRest = true;
  // Nothing where the student has no such column: there rounding has left it.
  KDFAST_HD_MEMBER static V missing(const RowState<V>& r) {
    const V zero{}, q = Real(1) - kept(r);
    return q < zero || r.moment_s == zero ? zero : q;
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>& with) {
    const V q = missing(r), of_kept = TopkDrop<Math>::loss(r, k, with);
    const V maxima_apart = Real(kLn2) * k * (r.max_s - r.max_t);
    return q == V{} ? of_kept : of_kept + q * (maxima_apart + Real(kLn2) * Math::log2(q * (r.sum_s / r.moment_s)));
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>& r, V, const Settings<V>&) { return -(kept(r) + missing(r)); }
  // The gradient of a column that the teacher does not have, over its power of z less max_t.
  KDFAST_HD_MEMBER static V rest(const RowState<V>& r, V k) {
    const V q = missing(r), of_all = Math::exp2((r.max_t - r.max_s) * k) / r.sum_s;
    return (kept(r) + q) * of_all - (q == V{} ? q : q / r.moment_s);
  }
};

// The mean over the vocabulary of ((z_s - z_t) / T)^2: no distributions, u is its whole gradient but for 1 / T.
template <class Math>
struct LogitMse : TermsBase {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kDifference = true;
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V, const Settings<V>& with) {
    return Real(kLn2 * kLn2) * r.moment_t * with.per_vocabulary;
  }
  KDFAST_HD_MEMBER static V mean_u(const RowState<V>&, V, const Settings<V>&) { return V{}; }
  KDFAST_HD_MEMBER static V u(V, V, V log_ratio, const Settings<V>& with) {
    return Real(2 * kLn2) * log_ratio * with.per_vocabulary;
  }
};

}  // namespace kdfast
