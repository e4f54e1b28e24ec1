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
struct RowLabels {
  const int64_t* data = nullptr;
  RowOffsets offsets;
  int64_t ignored;                  // a label that counts nothing
  int64_t vocabulary, vocab_start;  // of all columns, of which these are a shard from there on
};

// *loss = the sum of `rows` losses, and where there are components, the sums of both. In double and one block each: the
// same for every run and device.
void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums);
// counts[0] = the number of rows that the mask counts, counts[1] = of those the ones whose label is not ignored: means
// need them before the first gradient.
void launch_count(const char* op, const Target& target, const RowMask& mask, const RowLabels& labels, int64_t rows,
                  float* counts);

}  // namespace kdfast::cuda
