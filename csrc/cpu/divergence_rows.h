// What the dispatcher (divergence.cpp) hands to a CPU variant (divergence_rows.cpp): plain data and function pointers,
// because the two are compiled for different processors.
#pragma once
#include "common/divergence_terms.h"
#include "cpu/element.h"

namespace kdfast {

// What all rows of a call share. Strides are between neighbouring columns, in elements; gradient rows are contiguous.
struct DivergenceShape {
  Element student, teacher, gradient;
  int64_t columns;           // that count (vocab_size)
  int64_t gradient_columns;  // that the student has: padding gets a zero gradient
  int64_t student_stride, teacher_stride;
  Settings<double> settings = {};
  bool topk = false;         // rows have the teacher's columns instead of all
  bool labels = false;       // rows have a cross-entropy too
  bool keeps_state = false;  // rows' states are asked for
  double smoothing = 0;      // of the labels
};

// A column that the teacher has.
struct TopkEntry {
  int64_t column;
  double log_probability;
};

struct DivergenceRow {
  const void* student;
  const void* teacher;
  const TopkEntry* entries = nullptr;  // by column
  int64_t entry_count = 0;
  const bool* counted = nullptr;  // of the columns, others are as if -inf on both sides; null: all
  void* gradient;                 // null: not wanted
  double k;                       // log2(e) / temperature, of csrc/common/row_state.h
  double coefficient;             // of the row's divergence in the result
  double factor;                  // coefficient / temperature: of its gradient
  double loss;                    // of the divergence, without the coefficient: a result
  double log_sum_one;             // ln(state.sum_one): a result beside labels
  int64_t label;                  // a column, or outside of them
  double hard_coefficient;        // of the row's cross-entropy in the result
  double hard_factor;             // of its gradient
  void* powers = nullptr;         // room for powers_bytes(): the gradient then needs no second exponential; null: none
  RowState<double> state;
};

// Per block of columns: its two maxima, and the powers of student and teacher relative to them.
static inline int64_t powers_bytes(const DivergenceShape& shape) {
  const int64_t real = shape.student == Element::f64 ? 8 : 4;
  return (shape.columns + kBlock - 1) / kBlock * (2 + 2 * kBlock) * real;
}

// One divergence's kernels. Columns [begin, end) begin at a block's start.
struct DivergenceKernels {
  bool second_look;
  bool difference;  // of logits: `look` writes row.gradient too, where writes_at_once()
  // Sets row.state from the columns and fills row.powers.
  void (*look)(const DivergenceShape&, DivergenceRow&, int64_t begin, int64_t end);
  // Where the divergence needs it: sets the moments of row.state (to the loss and mean_u) from the columns, the
  // normalisers being known.
  void (*look_again)(const DivergenceShape&, DivergenceRow&, int64_t begin, int64_t end);
  // Adds the state of other columns of the row.
  void (*merge)(DivergenceRow& into, const DivergenceRow& other);
  // Sets the results from row.state.
  void (*finish)(const DivergenceShape&, DivergenceRow&);
  // Writes row.gradient[begin, end) from row.state, and from row.powers or the logits.
  void (*gradient)(const DivergenceShape&, const DivergenceRow&, int64_t begin, int64_t end);
  // All of it for `count` rows of few columns, side by side in the lanes of a vector. Null: not in lanes.
  void (*narrow)(const DivergenceShape&, DivergenceRow* rows, int64_t count, Known known);
};
// Of a difference, the label's gradient would have to wait, and so would memory that is not as the student's.
static inline bool writes_at_once(const DivergenceShape& shape) {
  return !shape.labels && shape.gradient == shape.student;
}
// Rows of at most this many columns take `narrow`.
constexpr int64_t kNarrow = 32;

}  // namespace kdfast
