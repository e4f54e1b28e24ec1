// Small matrix products in cache: C = A B or C += A B with A read by broadcast, so that A may as well be a transpose.
//
// Six rows by four vectors of C stay in registers while k runs: 24 multiply-adds for 10 loads. C has its rows rounded
// up to whole tiles, and A is readable as far; what is beyond is not meant.
#pragma once
#include "cpu/simd.h"

namespace kdfast::KDFAST_VARIANT {

// A full vector of either type (VectorOf<double> is a single number).
template <class Real>
struct WideOf {
  typedef Real type __attribute__((vector_size(4 * kLanes)));
  static constexpr int count = 4 * kLanes / int(sizeof(Real));
  typedef double Doubles __attribute__((vector_size(8 * (4 * kLanes / sizeof(Real)))));  // of as many
};
template <class Real>
using Wide = typename WideOf<Real>::type;

constexpr int kTileRows = 6;
// Of a single vector, where they divide the rows: six sums do not keep the adders busy.
constexpr int kTallTileRows = 8;
constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Columns of a matrix are padded to whole vectors.
template <class Real>
constexpr int64_t padded(int64_t n) {
  return rounded_up(n, WideOf<Real>::count);
}

template <class Real>
struct Factor {
  const Real* data;
  int64_t row, k;  // steps
};

template <int kVectors, int kRows = kTileRows, class Real>
KDFAST_LOCAL void multiply_tile(const Factor<Real>& a, const Real* b, int64_t b_row, Real* c, int64_t c_row, int64_t k,
                                bool add) {
  using V = Wide<Real>;
  constexpr int L = WideOf<Real>::count;
  V sums[kRows][kVectors]{};
  for (int64_t i = 0; i < k; ++i) {
    V from[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) memcpy(&from[v], b + i * b_row + v * L, sizeof(V));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Real x = a.data[r * a.row + i * a.k];  // broadcast as it is read, which V{} + x is not
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x * from[v];
    }
  }
  // What is there already is added last: one rounding at its size, not k.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Real* to = c + r * c_row + v * L;
      V before{};
      if (add) memcpy(&before, to, sizeof(V));
      sums[r][v] += before;
      memcpy(to, &sums[r][v], sizeof(V));
    }
  }
}

// [rows, k] times [k, columns]; columns are whole vectors. `upper`: vectors below the diagonal are left alone.
template <class Real>
void multiply(int64_t rows, int64_t columns, int64_t k, const Factor<Real>& a, const Real* b, int64_t b_row, Real* c,
              int64_t c_row, bool add, bool upper = false) {
  constexpr int L = WideOf<Real>::count, kMost = kLanes >= 16 ? 4 : 2;
  for (int64_t j = 0; j < columns; j += kMost * L) {
    const int64_t most = columns - j < kMost * L ? columns - j : kMost * L;
    const int64_t end = upper && j + most < rows ? j + most : rows;
    for (int64_t i = 0; i < end;) {
      const int64_t from = upper && i > j ? (i - j) / L * L : 0, vectors = (most - from) / L;
      const bool tall = vectors == 1 && (end - i) % kTallTileRows == 0;
      const Factor<Real> at{a.data + i * a.row, a.row, a.k};
      const Real* of_b = b + j + from;
      Real* to = c + i * c_row + j + from;
      if (vectors == 4) multiply_tile<4>(at, of_b, b_row, to, c_row, k, add);
      if (vectors == 3) multiply_tile<3>(at, of_b, b_row, to, c_row, k, add);
      if (vectors == 2) multiply_tile<2>(at, of_b, b_row, to, c_row, k, add);
      if (tall) multiply_tile<1, kTallTileRows>(at, of_b, b_row, to, c_row, k, add);
      if (vectors == 1 && !tall) multiply_tile<1>(at, of_b, b_row, to, c_row, k, add);
      i += tall ? kTallTileRows : kTileRows;
    }
  }
}

}  // namespace kdfast::KDFAST_VARIANT
