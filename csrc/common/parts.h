// Live rows and columns of a matrix: what both backends check.
#pragma once
#include "common/checks.h"

namespace kdfast {

// Indices of rows or columns: of all where there are none.
inline void check_indices(const char* op, const char* argument, const std::optional<Tensor>& indices,
                          const Tensor& matrix) {
  if (!indices) return;
  check_device(op, argument, *indices, matrix);
  check_dtype(op, argument, *indices, ScalarType::Long);
  STD_TORCH_CHECK(indices->dim() == 1 && indices->is_contiguous(), op, ": ", argument,
                  ": expected one dimension, contiguous, got ", shape_of(*indices));
}

inline void check_matrix(const char* op, const char* argument, const Tensor& t) {
  const bool is_float = is_short_float(t.scalar_type()) || t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_float && t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1), op, ": ", argument,
                  ": expected a matrix of float32, bfloat16, float16 or float64 with rows side by side, got ",
                  torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
}

inline int64_t count_of(const std::optional<Tensor>& indices, int64_t all) { return indices ? indices->numel() : all; }

// pack_part: the part [rows, columns] of a matrix.
inline void check_pack(const Tensor& matrix, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  constexpr const char* op = "pack_part";
  check_matrix(op, "matrix", matrix);
  check_indices(op, "rows", rows, matrix);
  check_indices(op, "columns", columns, matrix);
}

// unpack_part_: a part into its place.
inline void check_unpack(const Tensor& matrix, const Tensor& part, const std::optional<Tensor>& rows,
                         const std::optional<Tensor>& columns) {
  constexpr const char* op = "unpack_part_";
  check_matrix(op, "matrix", matrix);
  check_matrix(op, "part", part);
  check_indices(op, "rows", rows, matrix);
  check_indices(op, "columns", columns, matrix);
  check_device(op, "part", part, matrix);
  check_dtype(op, "part", part, matrix.scalar_type());
  const int64_t r = count_of(rows, matrix.size(0)), c = count_of(columns, matrix.size(1));
  STD_TORCH_CHECK(part.size(0) == r && part.size(1) == c, op, ": part: expected [", r, ", ", c, "], got ",
                  shape_of(part));
}

}  // namespace kdfast
