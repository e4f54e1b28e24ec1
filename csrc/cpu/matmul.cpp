// Products of two dense matrices on the CPU, where no library has them or has them fast: rectangles of the result,
// shared among the threads.
//
// 2 · rows · columns · inner operations. Every thread packs what it reads of both matrices (matmul_rows.cpp): so
// rectangles are as near to squares as the number of threads allows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

constexpr const char* kOp = "matmul_";
// Rows and columns of a rectangle are multiples of these, but for the last.
constexpr int64_t kRowStep = 24, kColumnStep = 64;
constexpr int64_t kThreadWork = int64_t(1) << 20;  // products of a thread, at least: less is done before another wakes

int64_t steps(int64_t n, int64_t step) { return (n + step - 1) / step; }

Operands operands_of(const Tensor& a, const Tensor& b) {
  const ScalarType left = a.scalar_type(), right = b.scalar_type();
  if (left == right && left == ScalarType::Float) return Operands::f32;
  if (left == right && left == ScalarType::BFloat16) return Operands::bf16;
  if (left == right && left == ScalarType::Half) return Operands::f16;
  if (left == right && left == ScalarType::Double) return Operands::f64;
  if (left == ScalarType::Float && right == ScalarType::BFloat16) return Operands::f32_bf16;
  if (left == ScalarType::Float && right == ScalarType::Half) return Operands::f32_f16;
  return Operands::count;
}

void check(const Tensor& c, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool add) {
  for (const auto& [argument, t] : {std::pair("a", a), std::pair("b", b), std::pair("c", c)}) {
    check_device(kOp, argument, t, c);
    STD_TORCH_CHECK(t.dim() == 2, kOp, ": ", argument, ": expected a matrix, got ", shape_of(t));
  }
  STD_TORCH_CHECK(operands_of(a, b) != Operands::count, kOp,
                  ": a, b: expected numbers of one type, or float32 and 16 bits, got ",
                  torch::headeronly::toString(a.scalar_type()), " and ", torch::headeronly::toString(b.scalar_type()));
  STD_TORCH_CHECK(a.size(1) == b.size(0), kOp, ": b: expected ", a.size(1), " rows, got ", shape_of(b));
  STD_TORCH_CHECK(c.size(0) == a.size(0) && c.size(1) == b.size(1), kOp, ": c: expected [", a.size(0), ", ", b.size(1),
                  "], got ", shape_of(c));
  const ScalarType sums = b.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(c.scalar_type() == sums || c.scalar_type() == b.scalar_type(), kOp, ": c: expected dtype ",
                  torch::headeronly::toString(sums), " or b's, got ", torch::headeronly::toString(c.scalar_type()));
  if (!bias) return;
  check_device(kOp, "bias", *bias, c);
  check_dtype(kOp, "bias", *bias, c.scalar_type());
  STD_TORCH_CHECK(!add && bias->dim() == 1 && bias->size(0) == c.size(1) && bias->is_contiguous(), kOp,
                  ": bias: expected [", c.size(1), "], contiguous, where c is not added to, got ", shape_of(*bias));
}

bool lies_in_rows(const Tensor& c) { return c.stride(1) == 1 || c.size(1) <= 1; }

Operand operand(const Tensor& t, bool turned) {
  return {t.const_data_ptr(), t.stride(turned ? 1 : 0), t.stride(turned ? 0 : 1)};
}

// A grid of rectangles, one for each thread: the least work for the busiest, and of these the least to pack.
struct Grid {
  int64_t rows, columns;
};
Grid grid_of(const Product& p, int64_t threads) {
  const int64_t rows = steps(p.rows, kRowStep), columns = steps(p.columns, kColumnStep);
  const double work = double(p.rows) * double(p.columns) * double(std::max<int64_t>(p.inner, 1));
  threads = std::min<int64_t>(threads, std::max<int64_t>(1, int64_t(work / kThreadWork)));
  Grid best{1, 1};
  double least = 0;
  for (int64_t high = 1; high <= std::min(threads, rows); ++high) {
    const int64_t wide = std::min(threads / high, columns);
    const int64_t each_rows = steps(rows, high) * kRowStep, each_columns = steps(columns, wide) * kColumnStep;
    const double cost = double(each_rows) * double(each_columns) + 16.0 * double(each_rows + each_columns);
    if (high == 1 || cost < least) best = {high, wide}, least = cost;
  }
  return best;
}

void matmul(Tensor c, Tensor a, Tensor b, std::optional<Tensor> bias, bool add) {
  check(c, a, b, bias, add);
  const bool turned = !lies_in_rows(c);  // then its transpose is made of the others'
  const Operands operands = operands_of(a, b);
  STD_TORCH_CHECK(!turned || (c.stride(0) == 1 && !bias && operands < Operands::f32_bf16), kOp,
                  ": c: expected rows side by side, or columns where a and b are of one type and there is no bias");
  Product p{c.size(0),
            c.size(1),
            a.size(1),
            operand(a, false),
            operand(b, false),
            nullptr,
            c.mutable_data_ptr(),
            c.stride(turned ? 1 : 0),
            c.scalar_type() == b.scalar_type(),
            add,
            nullptr};
  if (turned) std::swap(p.rows, p.columns), p.a = operand(b, true), p.b = operand(a, true);
  if (p.rows == 0 || p.columns == 0) return;
  const ProductKernels& kernels = cpu_variant().kernels->products[int(operands)];
  const int64_t a_size = a.element_size(), b_size = b.element_size(), c_size = c.element_size();
  const Grid grid = grid_of(p, torch::stable::get_num_threads());
  const int64_t row_steps = steps(p.rows, kRowStep), column_steps = steps(p.columns, kColumnStep);
  torch::stable::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t from, int64_t until) {
    for (int64_t i = from; i < until; ++i) {
      auto cut = [](int64_t all, int64_t at, int64_t of, int64_t step, int64_t most) {
        return std::min(all * at / of * step, most);
      };
      const int64_t row = i / grid.columns, column = i % grid.columns;
      const int64_t top = cut(row_steps, row, grid.rows, kRowStep, p.rows);
      const int64_t left = cut(column_steps, column, grid.columns, kColumnStep, p.columns);
      Product part = p;
      part.rows = cut(row_steps, row + 1, grid.rows, kRowStep, p.rows) - top;
      part.columns = cut(column_steps, column + 1, grid.columns, kColumnStep, p.columns) - left;
      part.a.data = (const char*)p.a.data + top * p.a.row * a_size;
      part.b.data = (const char*)p.b.data + left * p.b.column * b_size;
      part.c = (char*)p.c + (top * p.c_row + left) * c_size;
      part.bias = bias ? (const char*)bias->const_data_ptr() + left * c_size : nullptr;
      const Room memory(kernels.room(part));
      part.room = memory.data();
      kernels.run(part);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("matmul_", TORCH_BOX(&matmul)); }

}  // namespace kdfast
