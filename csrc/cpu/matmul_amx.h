// Rows of A as tiles of AMX take them: words of pairs along the inner dimension, whole tiles, zeros beyond what is
// there.
#pragma once
#include "cpu/amx.h"
#include "cpu/block_pack.h"

#if defined(__AVX512BF16__)
namespace kdfast::KDFAST_VARIANT {

// float32 in two parts of bfloat16, which together have 16 of its 24 bits: what is left out is far below the rounding
// of a product with bfloat16.
struct Split : AmxPairs {
  using Number = float;
  static constexpr int kParts = 2;
};
struct Whole : AmxPairs {
  static constexpr int kParts = 1;
};

KDFAST_LOCAL Floats upper_halves(Floats words) { return (Floats)((Ints)words & int32_t(0xffff0000)); }
KDFAST_LOCAL Floats lower_halves(Floats words) { return (Floats)((Ints)words << 16); }
KDFAST_LOCAL __m256i short_of(Floats x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

// The parts of 16 words: 32 numbers side by side.
KDFAST_LOCAL void load_words(const BFloat16* at, Floats* parts) { memcpy(parts, at, sizeof *parts); }
KDFAST_LOCAL void load_words(const float* at, Floats* parts) {
  auto joined = [](Floats x, Floats y) __attribute__((always_inline)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(short_of(x)), short_of(y), 1);
  };
  auto rest = [](Floats x) __attribute__((always_inline)) {
    return x - (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(short_of(x)), 16);
  };
  const Floats x = load(at), y = load(at + 16);
  parts[0] = (Floats)joined(x, y), parts[1] = (Floats)joined(rest(x), rest(y));
}
// The same of 16 numbers of each of two rows.
KDFAST_LOCAL void load_words(const BFloat16* even, const BFloat16* odd, Floats* parts) { *parts = paired(even, odd); }
KDFAST_LOCAL void load_words(const float* even, const float* odd, Floats* parts) {
  auto joined = [](Floats x, Floats y) __attribute__((always_inline)) {
    const __m512i low = _mm512_cvtepu16_epi32(short_of(x)), high = _mm512_cvtepu16_epi32(short_of(y));
    return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  };
  const Floats x = load(even), y = load(odd);
  parts[0] = joined(x, y);
  parts[1] = joined(x - lower_halves(parts[0]), y - upper_halves(parts[0]));
}
// One number's.
KDFAST_LOCAL void parts_of(BFloat16 x, uint16_t* parts) { parts[0] = x.bits; }
KDFAST_LOCAL void parts_of(float x, uint16_t* parts) {
  BFloat16 high, low;
  narrow_to(high, x);
  narrow_to(low, x - widened(high));
  parts[0] = high.bits, parts[1] = low.bits;
}

// `rows` of A, `depth` numbers of each, to [parts, all_rows, words]; both are whole tiles. What comes next is asked
// for: pieces of rows are too short for the processor to see it coming.
template <class A>
void pack_tiles(const typename A::Number* from, int64_t row, int64_t column, int64_t rows, int64_t depth, float* to,
                int64_t all_rows, int64_t words) {
  constexpr int64_t kLine = 64 / sizeof(typename A::Number);
  const int64_t part = all_rows * words;
  int64_t r_done = 0, k_done = 0;  // so many of the first numbers of so many rows
  if (column == 1) {
    r_done = rows, k_done = depth / 32 * 32;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < k_done; k += 32) {
        for (int64_t i = k; i < k + 32 && r + 1 < rows; i += kLine) __builtin_prefetch(from + (r + 1) * row + i);
        Floats parts[A::kParts];
        load_words(from + r * row + k, parts);
        for (int i = 0; i < A::kParts; ++i) store(to + i * part + r * words + k / 2, parts[i]);
      }
    }
  } else if (row == 1) {
    r_done = rows / 16 * 16, k_done = depth / 32 * 32;
    for (int64_t k = 0; k < k_done; k += 32) {
      for (int64_t i = k + 32; i < k + 64 && i < k_done; ++i) {
        for (int64_t r = 0; r < r_done; r += kLine) __builtin_prefetch(from + i * column + r);
      }
      for (int64_t r = 0; r < r_done; r += 16) {
        Floats in[A::kParts][16];
        for (int64_t i = 0; i < 16; ++i) {
          Floats parts[A::kParts];
          load_words(from + (k + 2 * i) * column + r, from + (k + 2 * i + 1) * column + r, parts);
          for (int p = 0; p < A::kParts; ++p) in[p][i] = parts[p];
        }
        for (int p = 0; p < A::kParts; ++p) store_turned(in[p], to + p * part + r * words + k / 2, words);
      }
    }
  }
  for (int64_t r = 0; r < all_rows; ++r) {
    for (int64_t k = r < r_done ? k_done : 0; k < 2 * words; ++k) {
      uint16_t parts[A::kParts] = {};
      if (r < rows && k < depth) parts_of(from[r * row + k * column], parts);
      for (int p = 0; p < A::kParts; ++p) memcpy((char*)(to + p * part + r * words) + 2 * k, &parts[p], 2);
    }
  }
}

}  // namespace kdfast::KDFAST_VARIANT
#endif
