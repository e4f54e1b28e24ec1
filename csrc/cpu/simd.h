// The vector type of a CPU variant: GCC/Clang vector extensions, intrinsics only where they pay.
//
// Included once per variant (KDFAST_VARIANT = portable, avx2, avx512, avx512_bf16), inside that variant's namespace and
// free of std and torch templates: a linker may hand the baseline caller a wider variant's copy of a shared inline
// function, so everything here has internal linkage.
//
// `Vector<Real>`: kLanes floats, or a single double (the accuracy reference needs no speed). Both take + - * and ?:.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "common/row_state.h"

#define KDFAST_LOCAL static inline __attribute__((always_inline))

namespace kdfast::KDFAST_VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));  // of which sums may overflow
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// bfloat16 and float16 as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
  static constexpr int count = kLanes;
};
template <>
struct VectorOf<BFloat16> : VectorOf<float> {};  // which they are read as
template <>
struct VectorOf<Float16> : VectorOf<float> {};
template <>
struct VectorOf<double> {
  using type = double;
  static constexpr int count = 1;
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

template <class Real>
KDFAST_LOCAL Vector<Real> broadcast(Real x) {
  return Vector<Real>{} + x;
}

// ---- maximum; where an argument is NaN, the second one ----
KDFAST_LOCAL double maximum(double a, double b) { return a > b ? a : b; }
KDFAST_LOCAL float maximum(float a, float b) { return a > b ? a : b; }
KDFAST_LOCAL Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// ---- horizontal sums and maxima ----
KDFAST_LOCAL double sum(double x) { return x; }
KDFAST_LOCAL double sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += x[i] + x[i + kLanes / 2];
  return total;
#endif
}
KDFAST_LOCAL double top(double x) { return x; }
KDFAST_LOCAL float top(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = most > x[i] ? most : x[i];
  return most;
#endif
}

// ---- 2^(x * k) ----
// For x * k in [-126, 128) the error is below 1 ulp (1.25 without fused multiply-add); from -126.5 down it is 0, and so
// for -inf. NaN stays. Degree 6 minimax on [-0.5, 0.5] with the constant term fixed at 1 (relative error 2e-9 before
// rounding).
KDFAST_LOCAL Floats exp2_fraction(Floats r) {
  Floats p = broadcast(1.535336196e-4f);
  p = p * r + 1.339887385e-3f;
  p = p * r + 9.618436918e-3f;
  p = p * r + 5.550332367e-2f;
  p = p * r + 2.402264774e-1f;
  p = p * r + 6.931471825e-1f;
  return p * r + 1.f;
}
constexpr float kExp2Least = -127;
KDFAST_LOCAL double exp2(double x, double k, double) { return __builtin_exp2(x * k); }
KDFAST_LOCAL Floats exp2(Floats x, Floats k, Floats least) {  // least: kExp2Least / k
#if !defined(__AVX512F__)
  x = maximum(least, x);
#endif
  const Floats shift = broadcast(12582912.f);  // 1.5 * 2^23: a sum with it has no bits after the point
  const Floats sum = x * k + shift, n = sum - shift, p = exp2_fraction(x * k - n);
  // The sum's low bits are n: moved into the exponent they are 2^n, and 0 for n = -127.
  const Floats power = (Floats)(((Words)sum << 23) + (127u << 23));
#if defined(__AVX512F__)  // zeroed on the way instead: the port that compares has less to do than those that calculate
  return (Floats)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLE_UQ), (__m512)p,
                                     (__m512)power);
#else
  return p * power;
#endif
}
template <class V>
KDFAST_LOCAL V exp2(V x) {
  return exp2(x, V{} + 1.f, V{} + kExp2Least);
}

// ---- log2(x) ----
// Error on normal numbers: below 1.5 ulp or 2^-24 of the exponent; 0 gives -inf, inf and NaN stay. Degree 8 minimax of
// log2(1 + f) / f on [sqrt(1/2), sqrt(2)] - 1 (relative error 3e-8).
KDFAST_LOCAL double log2(double x) { return __builtin_log2(x); }
KDFAST_LOCAL Floats log2(Floats x) {
  const Words half = Words{} + 0x3f3504f3u;  // the bits of sqrt(1/2)
  const Ints n = (Ints)((Words)x - half) >> 23;
  const Floats f = (Floats)((Words)x - ((Words)n << 23)) - 1.f;
  Floats p = broadcast(1.2583689e-1f);
  p = p * f - 2.0726968e-1f;
  p = p * f + 2.1571562e-1f;
  p = p * f - 2.3894483e-1f;
  p = p * f + 2.8791624e-1f;
  p = p * f - 3.6070368e-1f;
  p = p * f + 4.8091063e-1f;
  p = p * f - 7.2134733e-1f;
  p = p * f + 1.442695f;
  const Floats y = p * f + __builtin_convertvector(n, Floats);
  const Floats inf = broadcast(__builtin_inff());
  return x > 0.f ? (x < inf ? y : x) : (x == 0.f ? -inf : x - x);
}

// ---- loads and stores of whole vectors ----
KDFAST_LOCAL double load(const double* p) { return *p; }
KDFAST_LOCAL Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
KDFAST_LOCAL Floats load(const BFloat16* p) {
#if defined(__AVX512F__)  // which GCC widens in two parts
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Ints) << 16);
#endif
}
KDFAST_LOCAL float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = magnitude << 13 | 0x7f800000;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float denormal = float(magnitude) * 0x1p-24f;
    memcpy(&bits, &denormal, 4);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
KDFAST_LOCAL uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // denormal: the float adder rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &magnitude, 4);
    return sign | uint16_t(rounded - 0x3f000000);
  }
  return sign | uint16_t((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}
KDFAST_LOCAL Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

KDFAST_LOCAL void store(double* p, double v) { *p = v; }
KDFAST_LOCAL void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
KDFAST_LOCAL void store(BFloat16* p, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves h = __builtin_convertvector(v == v ? rounded : (bits >> 16 | 0x40), Halves);
#endif
  memcpy(p, &h, sizeof h);
}
KDFAST_LOCAL void store(Float16* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// ---- a where `counted`, of `n` elements at most, is true, else b ----
KDFAST_LOCAL Floats where(const bool* counted, int n, Floats a, Floats b) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes{};
  n == kLanes ? memcpy(&bytes, counted, kLanes) : memcpy(&bytes, counted, n);
  return __builtin_convertvector(bytes, Ints) != 0 ? a : b;
}
KDFAST_LOCAL double where(const bool* counted, int, double a, double b) { return *counted ? a : b; }

// ---- one element ----
KDFAST_LOCAL double widened(double x) { return x; }
KDFAST_LOCAL float widened(float x) { return x; }
KDFAST_LOCAL float widened(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
KDFAST_LOCAL float widened(Float16 x) { return half_to_float(x.bits); }
KDFAST_LOCAL void narrow_to(double& to, double x) { to = x; }
KDFAST_LOCAL void narrow_to(float& to, float x) { to = x; }
KDFAST_LOCAL void narrow_to(BFloat16& to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to.bits = uint16_t(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : (bits >> 16 | 0x40));
}
KDFAST_LOCAL void narrow_to(Float16& to, float x) { to.bits = float_to_half(x); }

// ---- the end of a row: `n` < lanes elements; absent ones read as -inf, which no sum of powers counts ----
template <class Element>
KDFAST_LOCAL Floats load_some(const Element* p, int n, float absent = -__builtin_inff()) {
  Ints index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
#if defined(__AVX512F__)
  Element lanes[kLanes];  // a masked load and store of the bits: no loop, no wait for narrow stores
  if constexpr (sizeof(Element) == 4) {
    _mm512_storeu_epi32(lanes, _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p));
  } else {
    _mm256_storeu_epi16(lanes, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
#else
  Element lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
#endif
  return index < n ? load(lanes) : broadcast(absent);
}
KDFAST_LOCAL double load_some(const double*, int, double = 0) { return -__builtin_inf(); }

template <class Element>
KDFAST_LOCAL void store_some(Element* p, Floats v, int n) {
  Element lanes[kLanes];
  store(lanes, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(Element) == 4) {
    _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), _mm512_loadu_epi32(lanes));
  } else {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_loadu_epi16(lanes));
  }
#else
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}
KDFAST_LOCAL void store_some(double*, double, int) {}

}  // namespace kdfast::KDFAST_VARIANT
