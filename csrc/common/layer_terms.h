// Distances between a student's and a teacher's vector s and t, each a struct of terms, shared by the CPU variants and
// the CUDA kernels, which know nothing else of a distance.
//
// Five sums over the elements tell all of them. Those of d = t - s are for a student that is near its teacher: 1 - cos
// made of s.s, t.t and s.t is noise where it is below 1e-7, and so is a gradient that is made of s and t.
#pragma once
#include "common/row_state.h"

namespace kdfast {

enum class Distance : int { squared, cosine, normalized, kl, count };
// Those of this file; kl is a divergence of rows (divergence_terms.h).
constexpr int kDistances = int(Distance::kl);

struct VectorSums {
  double ss, tt, st, sd, dd;
};
// The gradient is of_student * s + of_other * x, x = s - t where near, else t.
struct DistanceResult {
  double value, of_student, of_other;
  bool near;
};

KDFAST_HD double sqrt_of(double x) { return ::sqrt(x); }

// sum (s - t)^2, which needs no sums before its gradient.
struct SquaredDistance {
  static constexpr bool kOneLook = true;
  KDFAST_HD_MEMBER static DistanceResult of(const VectorSums& v) { return {v.dd, 0, 2, true}; }
};

// 1 - s.t / sqrt((s.s + eps) * (t.t + eps)), eps = 1e-12 as in torch.nn.CosineEmbeddingLoss.
struct CosineDistance {
  static constexpr bool kOneLook = false;
  KDFAST_HD_MEMBER static DistanceResult with(const VectorSums& v, double eps) {
    const double a = v.ss + eps, norms = sqrt_of(a * (v.tt + eps));
    if (v.dd < v.ss && v.dd < v.tt) {
      const double dot = v.ss + v.sd;
      // norms^2 - dot^2: what both have is taken out before
      const double gap = v.ss * v.dd - v.sd * v.sd + eps * (v.ss + v.tt + eps);
      return {gap / ((norms + dot) * norms), (v.sd - eps) / (a * norms), 1 / norms, true};
    }
    return {1 - v.st / norms, v.st / (a * norms), -1 / norms, false};
  }
  KDFAST_HD_MEMBER static DistanceResult of(const VectorSums& v) { return with(v, 1e-12); }
};

// sum (s / |s| - t / |t|)^2, norms no smaller than 1e-12 as in torch.nn.functional.normalize; a student's vector below
// that has no gradient.
struct NormalizedDistance {
  static constexpr bool kOneLook = false;
  KDFAST_HD_MEMBER static DistanceResult of(const VectorSums& v) {
    const double least = 1e-12, norm_s = sqrt_of(v.ss), norm_t = sqrt_of(v.tt);
    if (norm_s >= least && norm_t >= least) {
      const DistanceResult cosine = CosineDistance::with(v, 0);
      return {2 * cosine.value, 2 * cosine.of_student, 2 * cosine.of_other, cosine.near};
    }
    const double by_s = 1 / (norm_s < least ? least : norm_s), by_t = 1 / (norm_t < least ? least : norm_t);
    const double dot = by_s * by_t * v.st, value = by_s * by_s * v.ss + by_t * by_t * v.tt - 2 * dot;
    if (norm_s < least) return {value, 0, 0, false};
    return {value, 2 * by_s * by_s * dot, -2 * by_s * by_t, false};
  }
};

}  // namespace kdfast
