// The arguments of a divergence operator, checked and laid out row by row: shared by the CPU and CUDA launchers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/checks.h"
#include "common/row_offsets.h"

namespace kdfast {

// As kdfast/ops/divergence.py numbers them.
enum class Reduction : int64_t { none, mean, sum, batchmean };
// What the forward leaves for the backward: nothing, the state of every row, or the gradient for an upstream of 1.
enum class Save : int64_t { nothing, state, gradient };

// A value per row, expanded to the logits' leading dimensions: mask, weight, temperature.
struct RowInput {
  const void* data = nullptr;  // null: not given
  RowOffsets offsets;
};

struct DivergenceCall {
  const char* op;
  Tensor student, teacher;
  std::optional<Tensor> row_temperature, mask, weight, num_items;
  double temperature;
  int64_t columns;
  Reduction reduction;
  double scale;

  int64_t leading() const { return student.dim() - 1; }
  std::vector<int64_t> leading_sizes() const { return {student.sizes().begin(), student.sizes().begin() + leading()}; }
  int64_t rows() const {
    int64_t n = 1;
    for (int64_t d = 0; d < leading(); ++d) n *= student.size(d);
    return n;
  }
  bool is_double() const { return student.scalar_type() == ScalarType::Double; }
  ScalarType loss_type() const { return is_double() ? ScalarType::Double : ScalarType::Float; }

  RowOffsets offsets_of(const Tensor& t, const char* argument) const {
    RowOffsets offsets;
    STD_TORCH_CHECK(row_offsets(t.sizes().data(), t.strides().data(), leading(), &offsets), op, ": ", argument,
                    ": expected at most ", RowOffsets::kMax, " leading dimensions that memory keeps apart, got ",
                    shape_of(t));
    return offsets;
  }
  RowInput row_input(const std::optional<Tensor>& t, const char* argument) const {
    return t ? RowInput{t->const_data_ptr(), offsets_of(*t, argument)} : RowInput{};
  }

  void check() const {
    const ScalarType dtype = student.scalar_type(), other = teacher.scalar_type();
    auto is_float = [](ScalarType t) {
      return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
    };
    STD_TORCH_CHECK((is_float(dtype) && is_float(other)) || (is_double() && other == dtype), op,
                    ": logits: expected float32, bfloat16 or float16 each, or float64 both, got ",
                    torch::headeronly::toString(dtype), " and ", torch::headeronly::toString(other));
    STD_TORCH_CHECK(student.dim() >= 1 && teacher.dim() == student.dim(), op, ": teacher_logits: expected ",
                    student.dim(), " dimensions, got ", teacher.dim());
    for (int64_t d = 0; d < leading(); ++d) {
      STD_TORCH_CHECK(student.size(d) == teacher.size(d), op, ": teacher_logits: expected the leading dimensions of ",
                      shape_of(student), ", got ", shape_of(teacher));
    }
    STD_TORCH_CHECK(columns >= 0 && columns <= student.size(leading()) && columns <= teacher.size(leading()), op,
                    ": vocab_size: expected at most the logits' widths, got ", columns);
    check_device(op, "teacher_logits", teacher, student);
    auto check_rows = [&](const std::optional<Tensor>& t, const char* argument, ScalarType expected) {
      if (!t) return;
      check_device(op, argument, *t, student);
      check_dtype(op, argument, *t, expected);
      check_leading(op, argument, *t, student, leading());
    };
    check_rows(mask, "mask", ScalarType::Bool);
    check_rows(weight, "weight", loss_type());
    check_rows(row_temperature, "temperature", loss_type());
    if (num_items) {
      check_device(op, "num_items", *num_items, student);
      check_dtype(op, "num_items", *num_items, loss_type());
      STD_TORCH_CHECK(num_items->numel() == 1, op, ": num_items: expected one number, got ", shape_of(*num_items));
    }
  }
};

}  // namespace kdfast
