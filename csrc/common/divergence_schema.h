// What the schemas of the divergences share (csrc/library.cpp, kdfast/ops/_linear.py).
#pragma once
#include <string>

namespace kdfast {

// Every argument that DivergenceCall (divergence.h) has after student and teacher, in its order.
inline std::string divergence_arguments() {
  const std::string rows = "Tensor? indices, Tensor? labels, Tensor? row_temperature, Tensor? mask, Tensor? weight";
  const std::string numbers =
      "int kind, float mixing, float temperature, SymInt columns, SymInt vocabulary, SymInt vocab_start, float scale, "
      "bool per_row, bool distillation, float alpha, float smoothing, int ignore_index";
  return rows + ", Tensor? divisor, " + numbers;
}

}  // namespace kdfast
