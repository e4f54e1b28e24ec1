// What the launcher of the divergences (divergence.cpp) hands to their kernels (divergence.cu): plain data.
#pragma once
#include <vector>

#include "cuda/plan.h"
#include "cuda/rows.h"

namespace kdfast::cuda {

enum class Element : int { f32, bf16, f16 };

// In device memory, except for the numbers themselves. Offsets and strides are in elements; gradient, losses and states
// are contiguous.
struct DivergenceArgs {
  Element student_type, teacher_type;
  const void *student, *teacher;
  RowOffsets student_rows, teacher_rows;
  int64_t student_stride, teacher_stride;  // between columns
  int64_t rows, columns, gradient_columns;
  float temperature, factor;  // of every row
  RowMask mask;
  RowNumbers row_temperature, weight, upstream;
  const float* denominator = nullptr;  // divides the factor; null: it already does
  const float* given = nullptr;        // states; null: made from the logits
  void* gradient = nullptr;            // the rest are results; null: not wanted
  float* losses = nullptr;
  float* states = nullptr;
  int log_cluster = 0;
};

// Losses, states and gradients of all rows, in one launch.
void launch_kl_div(const char* op, const Target& target, const RowPlan& plan, DivergenceArgs args);

// One of each kind, by name, for their attributes.
std::vector<NamedKernel> divergence_kernels();

}  // namespace kdfast::cuda
