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

struct LayerRow {
  const void* student;
  const void* teacher;
  const bool* counted;  // of the columns; null: all
  void* gradient;       // null: not wanted
  double factor;        // of the gradient
  double value;         // of the distance: a result
};

// A row of a distance: sets row.value and writes row.gradient.
struct LayerKernels {
  void (*distance[kDistances])(const LayerShape&, LayerRow&);
};

}  // namespace kdfast
