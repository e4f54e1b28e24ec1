// What the dispatcher (layers.cpp) hands to a CPU variant (layer_rows.cpp) for the distances of layer_terms.h.
#pragma once
#include "common/layer_terms.h"
#include "cpu/element.h"

namespace kdfast {

// What all rows of a call share. Strides are between neighbouring elements of a row; gradient rows are contiguous.
struct LayerShape {
  Element student, teacher;
  int64_t columns, student_stride, teacher_stride;
  double floor;  // squared distances: numbers at or below it count as 0 and have no gradient; NaN: none
};

// Rows with the same step from each to the next, in bytes. Those of the gradient lie side by side.
struct LayerRun {
  const void *student, *teacher;
  int64_t student_step, teacher_step;
  int64_t count;
  const bool* counted;   // of the columns; null: all
  void* gradient;        // null: not wanted
  double factor;         // of the gradient
  const double* by_row;  // more of it, for each; null: none
  double* values;        // of the distances: results
};

// Distances of rows: sets the run's values and writes its gradient.
struct LayerKernels {
  void (*distance[kDistances])(const LayerShape&, const LayerRun&);
};

}  // namespace kdfast
