// Register tiles of block-sparse products: C (+)= A W over a list of blocks of W, whatever the numbers are in memory.
//
// A tile of C, 6 rows by 4 vectors or 12 by 2, stays in registers while the blocks' words pass: a word is a number, or
// the two neighbours in the inner dimension that one dot product of bfloat16 takes. A is read by broadcast, so that it
// may as well be a transpose. C's lines are asked for before they are written: a miss costs more than a short row's
// products.
#pragma once
#include "cpu/block_rows.h"
#include "cpu/matmul.h"

namespace kdfast::KDFAST_VARIANT {

// ---- kinds of products, by what is in memory ----
// Numbers that are used where they lie.
template <class Real>
struct Direct {
  using Number = Real;
  using Word = Real;
  using Sum = Real;
  static constexpr int kNumbers = 1;      // in a word
  static constexpr bool kInPlace = true;  // A is read, and C written, where it lies
  static constexpr bool kReadsInPlace = true;
  static constexpr int64_t kChunk = 24;       // rows of A that pass by at a time
  static constexpr int64_t kPiece = 64;       // words that are summed before they join the rest: roundings stay small
  static constexpr int64_t kPanelRows = 128;  // rows that a gradient takes at a time, at most
  static constexpr bool kAmx = false;
  using V = Wide<Real>;
  KDFAST_LOCAL V broadcast_word(const char* p) {
    Real x;
    memcpy(&x, p, sizeof x);
    return x - V{};  // not V{} + x: that would have to be calculated, for -0
  }
  KDFAST_LOCAL V add_product(V sum, V x, V w) { return sum + x * w; }
};
// 16-bit numbers widened to float on their way into cache.
template <class E>
struct Widened : Direct<float> {
  using Number = E;
  static constexpr bool kInPlace = false, kReadsInPlace = false;
};
#if defined(__AVX512BF16__)
// Pairs of bfloat16. The dot product takes what is below the least normal number as 0.
struct Pairs : Direct<float> {
  using Number = BFloat16;
  static constexpr int kNumbers = 2;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kPiece = 1 << 20;
  KDFAST_LOCAL V broadcast_word(const char* p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return (V)_mm512_set1_epi32(x);
  }
  KDFAST_LOCAL V add_product(V sum, V x, V w) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// ---- tiles ----
// Where packed words lie: steps from word to word of the inner dimension, and from 16 columns to the next. Tiles of AMX
// are whole kilobytes: rows of them a multiple of 1 KB apart would share a few sets of the cache.
struct Steps {
  int64_t row, group;
};
template <class P>
Steps steps_of(int64_t width, int64_t words) {
  return P::kAmx ? Steps{16, 16 * words} : Steps{width, 16};
}

// Some blocks of one block row. index: null for the only one.
template <class P>
struct Tile {
  const char* a;
  int64_t a_row, a_word, a_block;  // bytes from one to the next
  const typename P::Word* w;
  Steps w_step;
  int64_t w_block;               // words
  int64_t words;                 // of a block's depth
  const int64_t *index, *place;  // place: null where blocks lie one after another
  int64_t count;
  bool add;
  const typename P::Sum* bias;
  typename P::Sum* c;
  int64_t c_row;
};

template <class P, int ROWS, int VECS>
__attribute__((noinline)) void tile(const Tile<P>& t) {
  using V = typename P::V;
  constexpr int L = WideOf<typename P::Sum>::count;
  V sums[ROWS][VECS]{};
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) __builtin_prefetch(t.c + r * t.c_row + v * L, 1, 3);
  }
  const int64_t a_row = t.a_row, w_row = t.w_step.row;
  for (int64_t n = 0; n < t.count; ++n) {
    const typename P::Word* w = t.w + (t.place ? t.place[n] : n) * t.w_block;
    const char* a = t.a + (t.index ? t.index[n] : 0) * t.a_block;
    for (int64_t q = 0; q < t.words; ++q, w += w_row, a += t.a_word) {
      V from[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) memcpy(&from[v], w + v * L, sizeof(V));
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const V x = P::broadcast_word(a + r * a_row);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sums[r][v] = P::add_product(sums[r][v], x, from[v]);
      }
    }
  }
  // What is there already is added last: one rounding at its size.
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      typename P::Sum* to = t.c + r * t.c_row + v * L;
      V before{};
      if (t.add) memcpy(&before, to, sizeof(V));
      if (t.bias) memcpy(&before, t.bias + v * L, sizeof(V));
      sums[r][v] += before;
      memcpy(to, &sums[r][v], sizeof(V));
    }
  }
}

template <class P, int ROWS, int VECS>
void tile_of(const Tile<P>& t, int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile_of<P, ROWS - 1, VECS>(t, rows);
  }
  tile<P, ROWS, VECS>(t);
}
template <class P, int ROWS, int VECS>
void strip(Tile<P> t, int64_t rows) {
  for (int64_t m = 0; m < rows; m += ROWS, t.a += ROWS * t.a_row, t.c += ROWS * t.c_row) {
    tile_of<P, ROWS, VECS>(t, rows - m);
  }
}

// `rows` of C, `width` of it, from blocks of which `t` describes the first. The bias, if any, comes to what is new.
template <class P>
void products(const Tile<P>& t, int64_t rows, int64_t width) {
  constexpr int kMost = kLanes >= 16 ? 4 : 2;
  constexpr int64_t kWide = kMost * WideOf<typename P::Sum>::count;
  const int64_t piece = t.words > 0 && t.words < P::kPiece ? P::kPiece / t.words : 1;  // no words: no rows
  for (int64_t n = 0; n == 0 || n < t.count; n += piece) {
    for (int64_t p = 0; p < width;) {
      Tile<P> at = t;
      at.index = t.index ? t.index + n : nullptr;
      at.place = t.place ? t.place + n : nullptr;
      at.w += (t.place ? 0 : n * t.w_block) + p;
      at.count = t.count - n < piece ? t.count - n : piece;
      at.add = t.add || n > 0;
      at.bias = t.bias && n == 0 ? t.bias + p : nullptr;
      at.c += p;
      if (kWide <= kBlockStep || width - p >= kWide) {
        strip<P, 6, kMost>(at, rows), p += kWide;
      } else {
        strip<P, 12, kMost / 2>(at, rows), p += kWide / 2;
      }
    }
  }
}

}  // namespace kdfast::KDFAST_VARIANT
