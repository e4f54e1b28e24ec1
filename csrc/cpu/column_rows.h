// What the dispatcher (column_sums.cpp) hands to a CPU variant (column_rows.cpp): columns of 16-bit numbers.
#pragma once
#include "cpu/element.h"

namespace kdfast {

struct Columns {
  const void* x;
  int64_t rows, columns;
  int64_t row;  // from row to row, in numbers
  void* sums;   // [columns], of x's type
};

using ColumnSums = void (*)(const Columns&);

}  // namespace kdfast
