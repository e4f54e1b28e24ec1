// Rows of which some columns live, packed and spread on the CPU: one source, compiled once per processor variant.
//
// AVX-512 moves 16 columns at a time by vpcompressd and vpexpandd in registers (to memory they are slow on some
// processors), 16-bit elements widened to lanes of 32 (the 16-bit forms need VBMI2, which not every AVX-512 has); so a
// row costs about its traffic. Elsewhere, and for doubles, they go one by one.
#include "cpu/part_rows.h"

#include "cpu/simd.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

// ---- one by one ----
// f(place in the packed row, column). By index: to walk the bits mispredicts the end of every word.
template <class F>
KDFAST_LOCAL void for_live(const PartShape& shape, F f) {
  if (shape.index) {
    for (int64_t i = 0; i < shape.packed; ++i) f(i, shape.index[i]);
  } else {
    for (int64_t i = 0; i < shape.packed; ++i) f(i, i);
  }
}

template <class E>
struct Scalar {
  static void pack(const PartShape& shape, const void* row, void* packed) {
    for_live(shape, [&](int64_t i, int64_t column) { ((E*)packed)[i] = ((const E*)row)[column]; });
  }
  static void add(const PartShape& shape, const void* packed, void* row) {
    for_live(shape, [&](int64_t i, int64_t column) {
      E& to = ((E*)row)[column];
      narrow_to(to, widened(to) + widened(((const E*)packed)[i]));
    });
  }
  static void spread(const PartShape& shape, const void* packed, void* row) {
    memset(row, 0, shape.columns * sizeof(E));
    for_live(shape, [&](int64_t i, int64_t column) { ((E*)row)[column] = ((const E*)packed)[i]; });
  }
};

#if defined(__AVX512F__)
// ---- 16 at a time ----
constexpr int kWord = 32;
// Elements as lanes of 32 bits; with a mask no other is touched. Some processors take 40 to 150 cycles for a masked
// store, so they are only made where a row ends.
KDFAST_LOCAL __m512i load_lanes(const float* p, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, p); }
KDFAST_LOCAL void store_lanes(float* p, __m512i v) { _mm512_storeu_si512(p, v); }
KDFAST_LOCAL void store_lanes(float* p, __m512i v, __mmask16 some) { _mm512_mask_storeu_epi32(p, some, v); }
template <class E>
KDFAST_LOCAL __m512i load_lanes(const E* p, __mmask16 some) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
}
template <class E>
KDFAST_LOCAL void store_lanes(E* p, __m512i v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v));
}
template <class E>
KDFAST_LOCAL void store_lanes(E* p, __m512i v, __mmask16 some) {
  _mm256_mask_storeu_epi16(p, some, _mm512_cvtepi32_epi16(v));
}
KDFAST_LOCAL Floats as_floats(float, __m512i lanes) { return (Floats)lanes; }
KDFAST_LOCAL Floats as_floats(BFloat16, __m512i lanes) { return (Floats)_mm512_slli_epi32(lanes, 16); }
KDFAST_LOCAL Floats as_floats(Float16, __m512i lanes) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes)); }

constexpr __mmask16 kAll = -1;
KDFAST_LOCAL __mmask16 first(int64_t count) { return count < kLanes ? __mmask16((1u << count) - 1) : kAll; }

// Sums of 16 columns of which some live, the dead ones as they were.
KDFAST_LOCAL void add_lanes(float* to, __mmask16 live, Floats v) {
  const __m512 old = _mm512_loadu_ps(to);
  _mm512_storeu_ps(to, _mm512_mask_add_ps(old, live, old, (__m512)v));
}
template <class E>
KDFAST_LOCAL void add_lanes(E* to, __mmask16 live, Floats v) {
  const __m256i old = _mm256_loadu_si256((const __m256i*)to);
  E sums[kLanes];
  store(sums, load(to) + v);
  _mm256_storeu_si256((__m256i*)to, _mm256_mask_mov_epi16(old, live, _mm256_loadu_si256((const __m256i*)sums)));
}

template <class E>
struct Wide {
  static void pack(const PartShape& shape, const void* row, void* packed) {
    const E* from = (const E*)row;
    E *to = (E*)packed, *const end = to + shape.packed;
    for_lanes(shape, [&](int64_t at, __mmask16 live) __attribute__((always_inline)) {
      if (live == kAll) {
        memcpy(to, from + at, kLanes * sizeof(E));
      } else if (live) {
        const __m512i v = _mm512_maskz_compress_epi32(live, load_lanes(from + at, live));
        end - to < kLanes ? store_lanes(to, v, first(end - to)) : store_lanes(to, v);  // what is too much comes next
      }
      to += __builtin_popcount(live);
    });
  }
  static void add(const PartShape& shape, const void* packed, void* row) {
    const E *from = (const E*)packed, *const end = from + shape.packed;
    for_lanes(shape, [&](int64_t at, __mmask16 live) __attribute__((always_inline)) {
      E* to = (E*)row + at;
      if (live == kAll) {
        store(to, load(to) + load(from));
      } else if (live && shape.columns - at >= kLanes) {
        add_lanes(to, live, as_floats(E{}, spread_lanes(from, end, live)));
      } else {
        add_last(from, live, to);
      }
      from += __builtin_popcount(live);
    });
  }
  static void spread(const PartShape& shape, const void* packed, void* row) {
    const E *from = (const E*)packed, *const end = from + shape.packed;
    for_lanes(shape, [&](int64_t at, __mmask16 live) __attribute__((always_inline)) {
      E* to = (E*)row + at;
      if (live == kAll) {
        memcpy(to, from, kLanes * sizeof(E));
      } else if (shape.columns - at >= kLanes) {
        store_lanes(to, spread_lanes(from, end, live));
      } else {
        store_lanes(to, spread_lanes(from, end, live), first(shape.columns - at));
      }
      from += __builtin_popcount(live);
    });
  }

 private:
  // f(the first of 16 columns, which of them live).
  template <class F>
  KDFAST_LOCAL void for_lanes(const PartShape& shape, F f) {
    for (int64_t at = 0; at < shape.columns; at += kLanes) f(at, __mmask16(shape.live[at / kWord] >> at % kWord));
  }
  KDFAST_LOCAL __m512i spread_lanes(const E* from, const E* end, __mmask16 live) {
    return _mm512_maskz_expand_epi32(live, load_lanes(from, first(end - from)));
  }
  KDFAST_LOCAL void add_last(const E* from, uint32_t live, E* to) {
    for (; live; live &= live - 1) {
      E& sum = to[__builtin_ctz(live)];
      narrow_to(sum, widened(sum) + widened(*from++));
    }
  }
};
template <>
struct Wide<double> : Scalar<double> {};
#else
template <class E>
struct Wide : Scalar<E> {};
#endif

template <class F>
KDFAST_LOCAL void with_element(Element type, F f) {
  if (type == Element::f32) return f(Wide<float>{});
  if (type == Element::bf16) return f(Wide<BFloat16>{});
  if (type == Element::f16) return f(Wide<Float16>{});
  f(Wide<double>{});
}

void pack(const PartShape& shape, const void* row, void* packed) {
  with_element(shape.type, [&](auto kernels) { kernels.pack(shape, row, packed); });
}
void add(const PartShape& shape, const void* packed, void* row) {
  with_element(shape.type, [&](auto kernels) { kernels.add(shape, packed, row); });
}
void spread(const PartShape& shape, const void* packed, void* row) {
  with_element(shape.type, [&](auto kernels) { kernels.spread(shape, packed, row); });
}

}  // namespace

extern const PartKernels kParts = {pack, add, spread};

}  // namespace kdfast::KDFAST_VARIANT
