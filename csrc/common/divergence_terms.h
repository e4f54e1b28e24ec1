// The divergences, each a struct of terms: what a column adds to its row, what a row comes to, what a column's gradient
// is. Shared by the CPU variants and the CUDA kernels, which know nothing else of a divergence. Natural logarithms, p =
// softmax(z / T); x and y are logits less their row's maxima, d = log2(p_s / p_t).
//
// With u = p_s * dL/dp_s (up to a multiple of p_s, which cancels) the gradient of every loss over distributions is
// dL/dz_s = (u - p_s * pull) / T, pull = sum u. Where the first look already tells loss and pull, two sums a and b of
// it do (kOfTeacher: a = sum 2^(y*k) * of_teacher(x, y), kOfStudent: b = sum 2^(x*k) * of_student(x, y)). Else a second
// look, with the normalisers known, leaves a = sum of `value` and b = pull (kSecondLook).
//
// `Math` holds the number type V (a float, a double, a vector of a CPU variant), its Real, and exp2, log2 and
// reciprocal of it. The README tells how to add a divergence.
#pragma once
#include "common/rowmath.h"

namespace kdfast {

// As kdfast/ops/_divergence.py numbers them.
enum class Divergence : int {
  kl_div,
  reverse_kl_div,
  js_div,
  skew_kl_div,
  skew_reverse_kl_div,
  total_variation,
  soft_cross_entropy,
  logit_mse,
  symmetric_kl_div,
  topk_bucket,  // of a teacher's top-k, by what becomes of the rest of its probability
  topk_renormalize,
  topk_drop,
  count
};

KDFAST_HD bool is_topk_kind(Divergence kind) {
  return kind == Divergence::topk_bucket || kind == Divergence::topk_renormalize || kind == Divergence::topk_drop;
}

// How much of a row's state is given: a first look leaves the normalisers, a second look the rest. Divergences without
// a second look know everything after the first.
enum class Known : int { nothing, normalisers, everything };

// Of a call: beta or skew, and 1 / the width of the whole vocabulary. Of a row, where terms ask for it (kOfRow): the
// teacher's probability that is kept, and what is left of it over what is left of the student's.
template <class V>
struct Settings {
  V mixing, per_vocabulary, kept{}, rest{};
};

// Of a top-k teacher, as it counts: probabilities below 1e-17 change no result, but would vanish among the columns that
// the teacher does not have where they underflow.
template <class Real>
KDFAST_HD Real counted_log_probability(Real x) {
  return x < Real(-40) ? Real(-40) : x;
}

// What a divergence has unless it says otherwise.
struct TermsBase {
  static constexpr bool kOfTeacher = false, kOfStudent = false;  // a, b are made by the first look
  static constexpr bool kSecondLook = false;
  static constexpr bool kLogRatio = false;    // u asks for d
  static constexpr bool kDifference = false;  // of logits, without a softmax: d = (z_s - z_t) * k, and a = sum d^2
  static constexpr bool kTopk = false;        // the teacher is known in some columns, and -inf elsewhere
  static constexpr bool kOfRow = false;       // u asks for the row's `kept` and `rest`
};

namespace terms {

// Bounds d, which is infinite or (at 0 / 0) NaN where a probability is 0: times that probability it then gives 0.
template <class V>
KDFAST_HD V bounded(V d) {
  const V bound = V{} + 16384.f;
  d = d > -bound ? d : -bound;
  return d < bound ? d : bound;
}

// m = w * p_t + (1 - w) * p_s seen from both, without underflow, overflow or cancellation: from the smaller ratio.
template <class Math>
struct Mixture {
  using V = typename Math::V;
  V log_s, log_t;  // log2(p_s / m), log2(p_t / m)
  V ratio_s;       // p_s / m

  KDFAST_HD_MEMBER Mixture(V w, V d) {
    const V zero{}, one = zero + 1.f;
    const V e = Math::exp2(d > zero ? -d : d), near = d > zero ? one - w : w;
    const V sum = near + (one - near) * e, log_sum = Math::log2(sum);
    log_s = (d > zero ? zero : d) - log_sum;
    log_t = (d > zero ? -d : zero) - log_sum;
    ratio_s = (d > zero ? one : e) * Math::reciprocal(sum);
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
    return Real(kLn2) * (k * r.a / r.sum_t + Math::log2(r.sum_s / r.sum_t));
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>&, V, const Settings<V>&) { return V{} - Real(1); }
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
    return Real(kLn2) * (k * r.b / r.sum_s + Math::log2(r.sum_t / r.sum_s));
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>& r, V k, const Settings<V>& with) { return loss(r, k, with); }
  KDFAST_HD_MEMBER static V u(V p_s, V, V d, const Settings<V>&) { return Real(kLn2) * p_s * d; }
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
    return Real(kLn2 / 2) * k * (r.a / r.sum_t + r.b / r.sum_s);
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>& r, V k, const Settings<V>& with) {
    return Real(0.5) * (ReverseKlDiv<Math>::loss(r, k, with) - Real(1));
  }
  KDFAST_HD_MEMBER static V u(V p_s, V p_t, V d, const Settings<V>&) {
    return Real(0.5) * (Real(kLn2) * p_s * d - p_t);
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
    return Real(kLn2) * (k * r.a / r.sum_t + Math::log2(r.sum_s));
  }
};

// Of the divergences that take a second look: its two sums. The bounded d would hide a row that is no distribution.
struct SecondLook : TermsBase {
  static constexpr bool kSecondLook = true, kLogRatio = true;
  template <class V>
  KDFAST_HD_MEMBER static V nan_unless_distributions(const RowState<V>& r) {
    const V zero{};
    return zero / r.sum_s + zero / r.sum_t;
  }
  template <class V>
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V, const Settings<V>&) {
    return r.a + nan_unless_distributions(r);
  }
  template <class V>
  KDFAST_HD_MEMBER static V pull(const RowState<V>& r, V, const Settings<V>&) {
    return r.b + nan_unless_distributions(r);
  }
};

// beta * KL(t || m) + (1 - beta) * KL(s || m), m = beta * t + (1 - beta) * s.
template <class Math>
struct JsDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  KDFAST_HD_MEMBER static V u(V p_s, V, V d, const Settings<V>& with) {
    return Real(kLn2) * (Real(1) - with.mixing) * p_s * terms::Mixture<Math>(with.mixing, d).log_s;
  }
  KDFAST_HD_MEMBER static V value(V p_s, V p_t, V d, const Settings<V>& with) {
    const terms::Mixture<Math> m(with.mixing, d);
    return Real(kLn2) * (with.mixing * p_t * m.log_t + (Real(1) - with.mixing) * p_s * m.log_s);
  }
};

// KL(t || m), m = skew * t + (1 - skew) * s.
template <class Math>
struct SkewKlDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  KDFAST_HD_MEMBER static V u(V, V p_t, V d, const Settings<V>& with) {
    return (with.mixing - Real(1)) * p_t * terms::Mixture<Math>(with.mixing, d).ratio_s;
  }
  KDFAST_HD_MEMBER static V value(V, V p_t, V d, const Settings<V>& with) {
    return Real(kLn2) * p_t * terms::Mixture<Math>(with.mixing, d).log_t;
  }
};

// KL(s || m), m = skew * s + (1 - skew) * t.
template <class Math>
struct SkewReverseKlDiv : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  KDFAST_HD_MEMBER static V u(V p_s, V, V d, const Settings<V>& with) {
    const terms::Mixture<Math> m(Real(1) - with.mixing, d);
    return p_s * (Real(kLn2) * m.log_s - with.mixing * m.ratio_s);
  }
  KDFAST_HD_MEMBER static V value(V p_s, V, V d, const Settings<V>& with) {
    return Real(kLn2) * p_s * terms::Mixture<Math>(Real(1) - with.mixing, d).log_s;
  }
};

// sum |p_s - p_t| / 2.
template <class Math>
struct TotalVariation : SecondLook {
  using V = typename Math::V;
  using Real = typename Math::Real;
  KDFAST_HD_MEMBER static V u(V p_s, V, V d, const Settings<V>&) {
    const V zero{}, half = Real(0.5) * p_s;
    return d > zero ? half : d < zero ? -half : zero * p_s;
  }
  KDFAST_HD_MEMBER static V value(V p_s, V p_t, V, const Settings<V>&) {
    const V difference = p_s - p_t;
    return Real(0.5) * (difference > V{} ? difference : -difference);
  }
};

// KL of a teacher that is known in its top-k columns K: there its logits are T * log-probability, elsewhere -inf, and
// what they sum to is the probability q that is kept. As if it were all: KL(t / q || s).
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
  KDFAST_HD_MEMBER static V kept(const RowState<V>& r, V k) { return r.sum_t * Math::exp2(r.max_t * k); }
  KDFAST_HD_MEMBER static V rest(const RowState<V>&, V) { return V{}; }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>& with) {
    const V q = kept(r, k);
    return q * (KlDiv<Math>::loss(r, k, with) + Real(kLn2) * Math::log2(q));
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>& r, V k, const Settings<V>&) { return -kept(r, k); }
  KDFAST_HD_MEMBER static V u(V, V p_t, V, const Settings<V>& with) { return -with.kept * p_t; }
};

// The same with all other columns as one: + (1 - q) (log(1 - q) - log of what s has there). b sums the student's powers
// there: 1 less the others would lose it to rounding.
template <class Math>
struct TopkBucket : TopkDrop<Math> {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kOfStudent = true;
  template <class X>
  KDFAST_HD_MEMBER static X of_student(X, X y) {
    const X zero{}, one = zero + 1;
    return y == zero - __builtin_inff() ? one : zero;
  }
  // Nothing where the student has no such column: there rounding has left it.
  KDFAST_HD_MEMBER static V missing(const RowState<V>& r, V k) {
    const V zero{}, q = Real(1) - TopkDrop<Math>::kept(r, k);
    return q < zero || r.b == zero ? zero : q;
  }
  KDFAST_HD_MEMBER static V rest(const RowState<V>& r, V k) {
    const V q = missing(r, k);
    return q == V{} ? q : q * (r.sum_s / r.b);
  }
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V k, const Settings<V>& with) {
    const V q = missing(r, k), of_kept = TopkDrop<Math>::loss(r, k, with);
    return q == V{} ? of_kept : of_kept + Real(kLn2) * q * Math::log2(rest(r, k));
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>& r, V k, const Settings<V>&) {
    return -(TopkDrop<Math>::kept(r, k) + missing(r, k));
  }
  KDFAST_HD_MEMBER static V u(V p_s, V p_t, V, const Settings<V>& with) {
    return p_t == V{} ? -with.rest * p_s : -with.kept * p_t;
  }
};

// The mean over the vocabulary of ((z_s - z_t) / T)^2: no distributions, u is its whole gradient but for 1 / T.
template <class Math>
struct LogitMse : TermsBase {
  using V = typename Math::V;
  using Real = typename Math::Real;
  static constexpr bool kDifference = true;
  KDFAST_HD_MEMBER static V loss(const RowState<V>& r, V, const Settings<V>& with) {
    return Real(kLn2 * kLn2) * r.a * with.per_vocabulary;
  }
  KDFAST_HD_MEMBER static V pull(const RowState<V>&, V, const Settings<V>&) { return V{}; }
  KDFAST_HD_MEMBER static V u(V, V, V d, const Settings<V>& with) { return Real(2 * kLn2) * d * with.per_vocabulary; }
};

}  // namespace kdfast
