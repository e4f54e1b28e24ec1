// What the dispatcher (block_sparse.cpp) hands to a CPU variant (block_rows.cpp): products with a matrix W [out, in] of
// which some blocks live. Sides of blocks are multiples of 32 up to 128.
#pragma once
#include "cpu/element.h"

namespace kdfast {

constexpr int64_t kBlockStep = 32, kLargestBlock = 128;

// W as a product walks it: block rows of the result, each with its live blocks. For y these are W's rows, for dx its
// columns.
struct Blocks {
  const int64_t* begin;        // [rows + 1]: where a block row's live blocks are in the next two
  const int64_t* index;        // which block of the inner dimension
  const int64_t* place;        // where its values lie
  int64_t rows, width, depth;  // a block's width is the result's, its depth the inner dimension's
  bool turned;                 // the values of a block lie [width, depth], not [depth, width]
};

// Rows of c, of some block rows: a times the live blocks, and the bias where there is one.
struct BlockProduct {
  const Blocks* blocks;
  int64_t first, last;   // block rows
  int64_t rows;          // of a and c
  int64_t a_row, c_row;  // from row to row, in numbers
  int64_t a_columns;     // of a
  const void *a, *values, *bias;
  void* c;
  char* room;
};

// Live blocks first..last, in the order of `blocks`, of dy^T x over all rows. `turned` blocks go by W's rows, others by
// its columns.
struct BlockGradient {
  const Blocks* blocks;
  int64_t first, last;
  int64_t rows, inner_blocks;  // of dy and x; of the dimension that `index` counts in
  int64_t dy_row, x_row;       // from row to row, in numbers
  const void *dy, *x;
  float* sums;  // [blocks, out, in] of a block; null: in place
  void* to;     // the same
  char* room;
};

struct BlockKernels {
  // Bytes of workspace, which lies on 64 bytes: of a product whose block rows have `most` blocks at most; of a
  // gradient.
  int64_t (*product_room)(const Blocks&, int64_t a_columns, int64_t most);
  void (*product)(const BlockProduct&);
  int64_t (*gradient_room)(const Blocks&, int64_t inner_blocks);
  void (*gradient)(const BlockGradient&);
};

}  // namespace kdfast
