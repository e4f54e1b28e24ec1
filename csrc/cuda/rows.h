// Values per row, and the launches that reduce them: shared by the operators that work row by row.
#pragma once
#include "common/row_offsets.h"
#include "cuda/target.h"

namespace kdfast::cuda {

// `data` null: not given.
struct RowNumbers {
  const float* data = nullptr;
  RowOffsets offsets;
};
struct RowMask {
  const bool* data = nullptr;
  RowOffsets offsets;
};

// *to = the sum of `count` numbers, in one block and in double: the same for every run and device.
void launch_sum(const char* op, const Target& target, const float* numbers, int64_t count, float* to);
// *to = the number of rows that the mask counts: a masked mean needs it before the first gradient.
void launch_count(const char* op, const Target& target, const RowMask& mask, int64_t rows, float* to);

}  // namespace kdfast::cuda
