// Blocks and panels as the tiles of block_tiles.h take them: words side by side in cache.
#pragma once
#include "cpu/block_tiles.h"

namespace kdfast::KDFAST_VARIANT {

#if defined(__AVX512F__)
// 16 x 16 words.
KDFAST_LOCAL void store_turned(const Floats in[16], float* to, int64_t to_row) {
  __m512i r[16], t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}
#endif

#if defined(__AVX512BF16__)
// The words of 16 numbers each of two rows, one above the other; without the second, zeros.
KDFAST_LOCAL Floats paired(const BFloat16* even, const BFloat16* odd) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  if (!odd) return (Floats)a;
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  return (Floats)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
#endif

// Rows of `width` numbers, whole vectors, to words [rows / kNumbers, width].
template <class P>
void pack_rows(const typename P::Number* from, int64_t from_row, int64_t rows, int64_t width, typename P::Word* to,
               Steps step) {
  constexpr int L = VectorOf<typename P::Sum>::count;
  for (int64_t i = 0; i < rows; i += P::kNumbers, from += P::kNumbers * from_row, to += step.row) {
    if constexpr (P::kNumbers == 1) {
      for (int64_t p = 0; p < width; p += L) store(to + p, load(from + p));
    } else {
      const auto* odd = i + 1 < rows ? from + from_row : nullptr;
      for (int64_t p = 0; p < width; p += L) {
        store(to + p / L * step.group, paired(from + p, odd ? odd + p : nullptr));
      }
    }
  }
}

// `width` rows of words that lie side by side, 16 by 16, to [words, width].
template <class P>
void pack_turned(const typename P::Number* from, int64_t from_row, int64_t width, int64_t words, typename P::Word* to,
                 Steps step) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename P::Word) == 4) {
    for (int64_t p = 0; p < width; p += 16) {
      for (int64_t q = 0; q < words; q += 16) {
        Floats in[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const auto* at = from + (p + i) * from_row + q * P::kNumbers;
          if constexpr (P::kNumbers == 1) {
            in[i] = load(at);
          } else {
            memcpy(&in[i], at, sizeof(Floats));
          }
        }
        store_turned(in, to + q * step.row + p / 16 * step.group, step.row);
      }
    }
    return;
  }
#endif
  for (int64_t p = 0; p < width; ++p) {
    for (int64_t q = 0; q < words; ++q) to[q * step.row + p] = widened(from[p * from_row + q]);
  }
}

// The packed form of a block of `blocks`: [depth in words, width].
template <class P>
void pack_block(const typename P::Number* from, const Blocks& b, typename P::Word* to) {
  const int64_t words = b.depth / P::kNumbers;
  const Steps steps = steps_of<P>(b.width, words);
  b.turned ? pack_turned<P>(from, b.depth, b.width, words, to, steps)
           : pack_rows<P>(from, b.width, b.depth, b.width, to, steps);
}

// Sums, with a bias where there is one, in their dtype.
template <class E>
void narrow_rows(const float* from, int64_t from_row, int64_t rows, int64_t width, const E* bias, E* to,
                 int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    for (int64_t p = 0; p < width; p += kLanes) {
      const Floats v = load(from + p);
      store(to + p, bias ? v + load(bias + p) : v);
    }
  }
}

}  // namespace kdfast::KDFAST_VARIANT
