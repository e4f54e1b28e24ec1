// Elements and 16-byte vectors of them: widened to float for arithmetic, narrowed for memory.
#pragma once
#include <math.h>

#include "cuda/device.h"
#include "cuda/element.h"

namespace kdfast::cuda {

// 16-bit elements, in pairs.
template <class T>
struct Vector {
  static constexpr int count = 8;
  KDFAST_DEVICE static void widen(uint4 v, float* x) {
    widen_pair(T{}, v.x, x);
    widen_pair(T{}, v.y, x + 2);
    widen_pair(T{}, v.z, x + 4);
    widen_pair(T{}, v.w, x + 6);
  }
  KDFAST_DEVICE static uint4 narrow(const float* x) {
    return {narrow_pair(T{}, x[0], x[1]), narrow_pair(T{}, x[2], x[3]), narrow_pair(T{}, x[4], x[5]),
            narrow_pair(T{}, x[6], x[7])};
  }
  KDFAST_DEVICE static uint4 maximum(uint4 a, uint4 b) {
    return {max_pair(T{}, a.x, b.x), max_pair(T{}, a.y, b.y), max_pair(T{}, a.z, b.z), max_pair(T{}, a.w, b.w)};
  }
  KDFAST_DEVICE static float top(uint4 v) {
    float x[2];
    widen_pair(T{}, max_pair(T{}, max_pair(T{}, v.x, v.y), max_pair(T{}, v.z, v.w)), x);
    return fmaxf(x[0], x[1]);
  }
  KDFAST_DEVICE static uint4 lowest() {
    const uint32_t pair = narrow_pair(T{}, -INFINITY, -INFINITY);
    return {pair, pair, pair, pair};
  }
  KDFAST_DEVICE static float widen_one(T x) {
    float both[2];
    widen_pair(T{}, x.bits, both);
    return both[0];
  }
  KDFAST_DEVICE static T narrow_one(float x) { return {uint16_t(narrow_pair(T{}, x, 0.f))}; }
};

template <>
struct Vector<float> {
  static constexpr int count = 4;
  KDFAST_DEVICE static void widen(uint4 v, float* x) {
    x[0] = as_float(v.x);
    x[1] = as_float(v.y);
    x[2] = as_float(v.z);
    x[3] = as_float(v.w);
  }
  KDFAST_DEVICE static uint4 narrow(const float* x) {
    return {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
  }
  KDFAST_DEVICE static uint4 maximum(uint4 a, uint4 b) {
    return {most(a.x, b.x), most(a.y, b.y), most(a.z, b.z), most(a.w, b.w)};
  }
  KDFAST_DEVICE static float top(uint4 v) { return as_float(most(most(v.x, v.y), most(v.z, v.w))); }
  KDFAST_DEVICE static uint4 lowest() {
    const uint32_t one = as_bits(-INFINITY);
    return {one, one, one, one};
  }
  KDFAST_DEVICE static float widen_one(float x) { return x; }
  KDFAST_DEVICE static float narrow_one(float x) { return x; }

 private:
  KDFAST_DEVICE static uint32_t most(uint32_t a, uint32_t b) { return as_bits(fmaxf(as_float(a), as_float(b))); }
};

// ---- elements of a type that only the launch knows ----
KDFAST_DEVICE int size_of(Element type) { return type == Element::f32 ? 4 : 2; }
KDFAST_DEVICE float load_any(Element type, const void* p, int64_t i) {
  if (type == Element::f32) return ((const float*)p)[i];
  if (type == Element::bf16) return Vector<BFloat16>::widen_one(((const BFloat16*)p)[i]);
  return Vector<Float16>::widen_one(((const Float16*)p)[i]);
}
KDFAST_DEVICE void store_any(Element type, void* p, int64_t i, float x) {
  if (type == Element::f32) return void(((float*)p)[i] = x);
  if (type == Element::bf16) return void(((BFloat16*)p)[i] = Vector<BFloat16>::narrow_one(x));
  ((Float16*)p)[i] = Vector<Float16>::narrow_one(x);
}

// 8 neighbours from element `at` on, as they lie: 16-bit ones in the first half. Multiples of 16 bytes.
KDFAST_DEVICE void load_eight(Element type, const void* p, int64_t at, uint4* raw) {
  raw[0] = load16((const char*)p + at * size_of(type));
  if (type == Element::f32) raw[1] = load16((const float*)p + at + 4);
}
KDFAST_DEVICE void widen_eight(Element type, const uint4* raw, float* x) {
  if (type == Element::bf16) return Vector<BFloat16>::widen(raw[0], x);
  if (type == Element::f16) return Vector<Float16>::widen(raw[0], x);
  Vector<float>::widen(raw[0], x);
  Vector<float>::widen(raw[1], x + 4);
}

// Four as float32. A multiple of their bytes.
KDFAST_DEVICE uint4 load_four(Element type, const void* p, int64_t at) {
  if (type == Element::f32) return load16((const float*)p + at);
  const uint2 pairs = load8((const uint16_t*)p + at);
  float x[4];
  if (type == Element::bf16) {
    widen_pair(BFloat16{}, pairs.x, x);
    widen_pair(BFloat16{}, pairs.y, x + 2);
  } else {
    widen_pair(Float16{}, pairs.x, x);
    widen_pair(Float16{}, pairs.y, x + 2);
  }
  return Vector<float>::narrow(x);
}

// Numbers made of T, into memory of T, or where T is float of any type: the places from element `at` of `row` on.
template <class T>
KDFAST_DEVICE void store_vector(Element type, void* row, int64_t at, const float* x) {
  if constexpr (sizeof(T) == 4) {
    if (type == Element::bf16) {
      return store8((BFloat16*)row + at, {narrow_pair(BFloat16{}, x[0], x[1]), narrow_pair(BFloat16{}, x[2], x[3])});
    }
    if (type == Element::f16) {
      return store8((Float16*)row + at, {narrow_pair(Float16{}, x[0], x[1]), narrow_pair(Float16{}, x[2], x[3])});
    }
  }
  store16((T*)row + at, Vector<T>::narrow(x));
}
template <class T>
KDFAST_DEVICE void store_one(Element type, void* row, int64_t at, float x) {
  if constexpr (sizeof(T) == 4) return store_any(type, row, at, x);
  ((T*)row)[at] = Vector<T>::narrow_one(x);
}

// Zeroes `count` 16-bit units from `p` on, any alignment, shared among `threads` threads of which this is `thread`.
KDFAST_DEVICE void clear(uint16_t* p, int64_t count, int thread, int threads) {
  const int64_t to_boundary = int64_t((0 - uintptr_t(p) / 2) & 7), head = to_boundary < count ? to_boundary : count;
  const int64_t vectors = (count - head) / 8, tail = head + vectors * 8;
  for (int64_t i = thread; i < head; i += threads) p[i] = 0;
  for (int64_t i = thread; i < vectors; i += threads) store16(p + head + i * 8, uint4{0, 0, 0, 0});
  for (int64_t i = tail + thread; i < count; i += threads) p[i] = 0;
}

}  // namespace kdfast::cuda
