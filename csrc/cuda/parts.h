// What the launcher of live rows and columns (parts.cpp) hands to its kernels (parts.cu): plain data, by value.
#pragma once
#include <stdint.h>

#include "cuda/element.h"
#include "cuda/target.h"

namespace kdfast::cuda {

enum class PartMove : int { pack, set, add };  // into the part; into the matrix

struct PartArgs {
  Element type;
  void *matrix, *part;
  int64_t matrix_step, part_step;   // from row to row, in elements
  const int64_t *rows, *columns;    // of the matrix; null: all
  int64_t row_count, column_count;  // of the part
};

void launch_part(const char* op, const Target& target, PartMove move, const PartArgs& args);

}  // namespace kdfast::cuda
