// Block-sparse products: what every backend checks of its arguments.
#pragma once
#include "common/checks.h"

namespace kdfast {

// Rows side by side, of numbers of a kernel.
inline void check_block_rows(const char* op, const char* argument, const Tensor& t) {
  const bool is_float = is_short_float(t.scalar_type()) || t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_float && t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1), op, ": ", argument,
                  ": expected rows of float32, bfloat16, float16 or float64, side by side, got ",
                  torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
}

inline void check_block_sides(const char* op, int64_t rows, int64_t columns) {
  for (int64_t side : {rows, columns}) {
    STD_TORCH_CHECK(side >= 32 && side <= 128 && side % 32 == 0, op,
                    ": block: expected sides of 32, 64, 96 or 128, got [", rows, ", ", columns, "]");
  }
}

// begin, index and place of live blocks: [block rows + 1] and twice [blocks]. What is in them is up to the backend.
inline void check_block_indices(const char* op, const Tensor& begin, const Tensor& index, const Tensor& place,
                                const Tensor& like) {
  const std::pair<const char*, const Tensor&> all[] = {{"begin", begin}, {"index", index}, {"place", place}};
  for (const auto& [argument, t] : all) {
    check_device(op, argument, t, like);
    check_dtype(op, argument, t, ScalarType::Long);
    STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), op, ": ", argument, ": expected one dimension, contiguous, got ",
                    shape_of(t));
  }
  STD_TORCH_CHECK(begin.size(0) >= 1 && place.size(0) == index.size(0), op,
                  ": place: expected as many numbers as of index, got ", place.size(0), " and ", index.size(0));
}

// block_sparse_product: x [rows, columns] times live blocks [blocks, out, in], or their transposes.
inline void check_block_product(const Tensor& x, const Tensor& values, const Tensor& begin, const Tensor& index,
                                const Tensor& place, const std::optional<Tensor>& bias, bool turned) {
  constexpr const char* op = "block_sparse_product";
  check_block_rows(op, "x", x);
  check_block_indices(op, begin, index, place, x);
  check_device(op, "values", values, x);
  check_dtype(op, "values", values, x.scalar_type());
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == index.size(0) && values.is_contiguous(), op,
                  ": values: expected [", index.size(0), ", out, in], contiguous, got ", shape_of(values));
  check_block_sides(op, values.size(1), values.size(2));
  const int64_t depth = values.size(turned ? 2 : 1), width = values.size(turned ? 1 : 2);
  STD_TORCH_CHECK(x.size(1) % depth == 0, op, ": x: expected columns in blocks of ", depth, ", got ", shape_of(x));
  if (!bias) return;
  check_device(op, "bias", *bias, x);
  check_dtype(op, "bias", *bias, x.scalar_type());
  const int64_t out = (begin.size(0) - 1) * width;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out && bias->is_contiguous(), op, ": bias: expected [", out,
                  "], contiguous, got ", shape_of(*bias));
}

// block_sparse_gradient: live blocks of grad^T x.
inline void check_block_gradient(const Tensor& grad, const Tensor& x, const Tensor& begin, const Tensor& index,
                                 const Tensor& place, int64_t rows, int64_t columns) {
  constexpr const char* op = "block_sparse_gradient";
  check_block_rows(op, "grad", grad);
  check_block_rows(op, "x", x);
  check_device(op, "grad", grad, x);
  check_dtype(op, "grad", grad, x.scalar_type());
  check_block_indices(op, begin, index, place, x);
  check_block_sides(op, rows, columns);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) % rows == 0 && x.size(1) % columns == 0, op,
                  ": grad, x: expected as many rows, in blocks of ", rows, " and ", columns, ", got ", shape_of(grad),
                  " and ", shape_of(x));
}

}  // namespace kdfast
