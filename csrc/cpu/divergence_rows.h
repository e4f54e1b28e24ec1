// What the dispatcher (divergence.cpp) hands to a CPU variant (divergence_rows.cpp): plain data and function pointers,
// because the two are compiled for different processors.
#pragma once
#include <stdint.h>

#include "common/rowmath.h"

namespace kdfast {

enum class Element : int { f32, bf16, f16, f64 };

// What all rows of a call share. Strides are between neighbouring columns, in elements; gradient rows are contiguous.
struct DivergenceShape {
  Element student, teacher;
  int64_t columns;           // that count (vocab_size)
  int64_t gradient_columns;  // that the student has: padding gets a zero gradient
  int64_t student_stride, teacher_stride;
};

struct DivergenceRow {
  const void* student;
  const void* teacher;
  void* gradient;      // null: not wanted
  double k;            // log2(e) / temperature, of csrc/common/rowmath.h
  double coefficient;  // of the row's divergence in the result
  double factor;       // coefficient / temperature: of the gradient
  RowState<double> state;
  void* powers = nullptr;  // room for powers_bytes(): the gradient then needs no second exponential; null: none
};

// Columns that the first look takes at a time: two blocks of floats fill half of a 32 KB L1.
constexpr int64_t kBlock = 2048;

// Per block of columns: its two maxima, and the powers of student and teacher relative to them.
static inline int64_t powers_bytes(const DivergenceShape& shape) {
  const int64_t real = shape.student == Element::f64 ? 8 : 4;
  return (shape.columns + kBlock - 1) / kBlock * (2 + 2 * kBlock) * real;
}

struct DivergenceKernels {
  // Sets row.state from the columns [begin, end), begin at a block's start, and fills row.powers.
  void (*look)(const DivergenceShape&, DivergenceRow&, int64_t begin, int64_t end);
  // Writes row.gradient[begin, end) from row.state, and from row.powers or the logits.
  void (*gradient)(const DivergenceShape&, const DivergenceRow&, int64_t begin, int64_t end);
  // Both for `count` rows of few columns, side by side in the lanes of a vector. Element by element, any stride.
  void (*narrow)(const DivergenceShape&, DivergenceRow* rows, int64_t count, bool have_state);
  // y[i] = 2^x[i]: the vector exponential on its own, for its test.
  void (*exp2)(const float* x, float* y, int64_t count);
};
// Rows of at most this many columns take `narrow`.
constexpr int64_t kNarrow = 32;

namespace portable {
extern const DivergenceKernels kDivergence;
}
namespace avx2 {
extern const DivergenceKernels kDivergence;
}
namespace avx512 {
extern const DivergenceKernels kDivergence;
}
namespace avx512_bf16 {
extern const DivergenceKernels kDivergence;
}

}  // namespace kdfast
