// What the dispatcher (matmul.cpp) hands to a CPU variant (matmul_rows.cpp): a product of two dense matrices.
#pragma once
#include "cpu/element.h"

namespace kdfast {

// By the numbers of A and B: of one type, or float32 with B's 16 bits.
enum class Operands : int { f32, bf16, f16, f64, f32_bf16, f32_f16, count };

// Steps from row to row and from column to column, in numbers.
struct Operand {
  const void* data;
  int64_t row, column;
};

// C [rows, columns] = A [rows, inner] B [inner, columns] + bias, or C += A B. C's rows lie side by side.
struct Product {
  int64_t rows, columns, inner;
  Operand a, b;
  const void* bias;  // of C's type
  void* c;
  int64_t c_row;
  bool narrow, add;  // C is of B's type, not of the sums'; C has a part of the sum already
  char* room;
};

struct ProductKernels {
  int64_t (*room)(const Product&);  // bytes of workspace, which lies on 64 bytes
  void (*run)(const Product&);
};

}  // namespace kdfast
