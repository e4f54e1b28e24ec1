// Blocks of a row as floats or doubles, whatever the elements in memory are.
#pragma once
#include "cpu/element.h"
#include "cpu/simd.h"

namespace kdfast::KDFAST_VARIANT {

// f(i, count, which) for the vectors from element i on; the last may be of fewer than all lanes. `which` alternates.
template <class Real, class F>
KDFAST_LOCAL void for_vectors(int64_t n, F f) {
  constexpr int L = VectorOf<Real>::count;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) f(i, L, 0), f(i + L, L, 1);
  for (; i + L <= n; i += L) f(i, L, 0);
  if (i < n) f(i, int(n - i), 1);
}
template <class E>
KDFAST_LOCAL Vector<E> load(const E* p, int count) {
  return count == VectorOf<E>::count ? load(p) : load_some(p, count);
}
template <class E>
KDFAST_LOCAL Vector<E> load_or_zeros(const E* p, int count) {
  return count == VectorOf<E>::count ? load(p) : load_some(p, count, 0);
}
template <class E>
KDFAST_LOCAL void store(E* p, Vector<E> v, int count) {
  count == VectorOf<E>::count ? store(p, v) : store_some(p, v, count);
}

// ---- elements of any type ----
// f(E{}) of a type of 32 or 16 bits.
template <class F>
KDFAST_LOCAL void with_element(Element type, F f) {
  type == Element::f32 ? f(float{}) : type == Element::bf16 ? f(BFloat16{}) : f(Float16{});
}
// `n` elements from column `begin` on, side by side: in place, or in `to`.
template <class E>
KDFAST_LOCAL const E* gather(const void* row, int64_t stride, int64_t begin, int64_t n, E* to) {
  const E* from = (const E*)row + begin * stride;
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  return to;
}
template <class E>
void convert(const void* row, int64_t stride, int64_t begin, int64_t n, float* to) {
  const E* from = (const E*)row + begin * stride;
  if (stride == 1) {
    for_vectors<float>(
        n, [&](int64_t i, int count, int) __attribute__((always_inline)) { store(to + i, load(from + i, count)); });
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = widened(from[i * stride]);
  }
}

// The same as floats or doubles.
KDFAST_LOCAL const float* read(Element type, const void* row, int64_t stride, int64_t begin, int64_t n, float* to) {
  if (type == Element::f32 && stride == 1) return (const float*)row + begin;
  if (type == Element::f32) convert<float>(row, stride, begin, n, to);
  if (type == Element::bf16) convert<BFloat16>(row, stride, begin, n, to);
  if (type == Element::f16) convert<Float16>(row, stride, begin, n, to);
  return to;
}
KDFAST_LOCAL const double* read(Element, const void* row, int64_t stride, int64_t begin, int64_t n, double* to) {
  return gather(row, stride, begin, n, to);
}

template <class E>
void narrow_all(const float* from, int64_t n, E* to) {
  for_vectors<float>(n, [&](int64_t i, int count, int)
                            __attribute__((always_inline)) { store(to + i, load(from + i, count), count); });
}
// The gradient of a block is made in its place, or in `g` and then written.
KDFAST_LOCAL float* gradient_place(Element type, void* gradient, int64_t begin, float* g) {
  return type == Element::f32 ? (float*)gradient + begin : g;
}
KDFAST_LOCAL double* gradient_place(Element, void* gradient, int64_t begin, double*) {
  return (double*)gradient + begin;
}
KDFAST_LOCAL void write(Element type, const float* g, int64_t n, void* gradient, int64_t begin) {
  if (type == Element::f32 && g != (float*)gradient + begin) memcpy((float*)gradient + begin, g, n * sizeof(float));
  if (type == Element::bf16) narrow_all(g, n, (BFloat16*)gradient + begin);
  if (type == Element::f16) narrow_all(g, n, (Float16*)gradient + begin);
}
KDFAST_LOCAL void write(Element, const double* g, int64_t n, void* gradient, int64_t begin) {
  if (g != (double*)gradient + begin) memcpy((double*)gradient + begin, g, n * sizeof(double));
}

}  // namespace kdfast::KDFAST_VARIANT
