// Sums of columns on the CPU: one source, compiled once per processor variant.
//
// Rows pass by as they lie, four at a time, so that memory is read in order; their sums stay in the first-level cache.
#include "cpu/column_rows.h"

#include "cpu/simd.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

constexpr int64_t kPiece = 64;  // rows that are added up before they join the rest: roundings stay small

// `n` numbers, a vector at most, and zeros.
template <class E>
KDFAST_LOCAL Floats load_zeros(const E* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, int(n), 0);
}

// Adds `rows` rows of `columns` numbers, a block at most, to sums.
template <class E>
KDFAST_LOCAL void add_piece(const E* from, int64_t row, int64_t rows, int64_t columns, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, from += 4 * row) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const E* p = from + c;
      const int64_t n = columns - c;
      const Floats pair = load_zeros(p, n) + load_zeros(p + row, n);
      store(sums + c, load(sums + c) + (pair + (load_zeros(p + 2 * row, n) + load_zeros(p + 3 * row, n))));
    }
  }
  for (; r < rows; ++r, from += row) {
    for (int64_t c = 0; c < columns; c += kLanes) store(sums + c, load(sums + c) + load_zeros(from + c, columns - c));
  }
}

template <class E>
void column_sums(const Columns& call) {
  for (int64_t at = 0; at < call.columns; at += kBlock) {
    const int64_t columns = call.columns - at < kBlock ? call.columns - at : kBlock;
    const E* from = (const E*)call.x + at;
    float all[kBlock] = {}, some[kBlock];
    for (int64_t r = 0; r < call.rows; r += kPiece, from += kPiece * call.row) {
      memset(some, 0, sizeof some);
      add_piece(from, call.row, call.rows - r < kPiece ? call.rows - r : kPiece, columns, some);
      for (int64_t c = 0; c < columns; c += kLanes) store(all + c, load(all + c) + load(some + c));
    }
    E* to = (E*)call.sums + at;
    for (int64_t c = 0; c < columns; c += kLanes) {
      columns - c >= kLanes ? store(to + c, load(all + c)) : store_some(to + c, load(all + c), int(columns - c));
    }
  }
}

}  // namespace

extern const ColumnSums kColumnSums[] = {column_sums<BFloat16>, column_sums<Float16>};

}  // namespace kdfast::KDFAST_VARIANT
