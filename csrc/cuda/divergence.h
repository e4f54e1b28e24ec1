// What the launcher of the divergences (divergence.cpp) hands to their kernels (divergence.cu): plain data.
#pragma once
#include <vector>

#include "common/divergence_terms.h"
#include "common/row_offsets.h"
#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/reduce.h"

namespace kdfast::cuda {

// Values per row; `data` null: not given.
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
struct RowNumbers {
  const float* data = nullptr;
  RowOffsets offsets;
};

// The columns of the teacher's log-probabilities, `count` per row; `data` null: the teacher has all.
struct TopkIndices {
  const int64_t* data = nullptr;
  RowOffsets offsets;
  int64_t stride, count;
  int64_t vocabulary, vocab_start;  // of all columns, of which these are a shard from there on
};

// In device memory, except for the numbers themselves. Offsets and strides are in elements; gradient, losses,
// components and states are contiguous.
struct DivergenceArgs {
  Element student_type, teacher_type, gradient_type;
  const void *student, *teacher;
  RowOffsets student_rows, teacher_rows;
  int64_t student_stride, teacher_stride;  // between columns
  int64_t rows, columns, gradient_columns;
  TopkIndices indices;
  RowMask mask;
  RowLabels labels;
  RowNumbers row_temperature, weight, upstream;
  float temperature;  // of every row
  Settings<float> settings;
  bool distillation;                            // the divergence counts T^2
  float scale;                                  // of both components
  float divergence_share, cross_entropy_share;  // of the components in the result
  float smoothing, even_smoothing;              // of the labels, and of it each column's part
  // One number each, 0 of which counts nothing; null: 1.
  const float *divergence_divisor = nullptr, *cross_entropy_divisor = nullptr;
  Known known = Known::nothing;
  const float* given = nullptr;  // states; null: made from the logits
  void* gradient = nullptr;      // the rest are results; null: not wanted
  float* losses = nullptr;
  float* components = nullptr;  // two per row
  float* states = nullptr;
  int log_cluster = 0;
};

// One divergence's. Defined by divergence.cu, which is compiled once for each.
struct DivergenceKernels {
  bool second_look;
  // Whether the device has room for a cluster of the plan, of logits of a type.
  bool (*has_room)(const char* op, const Target& target, const RowPlan& plan, Element type);
  // Losses, states and gradients of all rows, in one launch.
  void (*launch)(const char* op, const Target& target, const RowPlan& plan, DivergenceArgs args);
  // `states` referred to `maxima` (all of the student's, then all of the teacher's), to `results`.
  void (*refer)(const Target& target, const float* states, const float* maxima, const RowNumbers& row_temperature,
                float temperature, int64_t rows, float* results);
  // One of each kind, by name, for their attributes.
  std::vector<NamedKernel> (*list)();
};
template <template <class> class Terms>
DivergenceKernels divergence_kernels_of();

// The kernels of all divergences, by name.
std::vector<NamedKernel> divergence_kernels();

}  // namespace kdfast::cuda
