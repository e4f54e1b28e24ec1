// Block-sparse products on the GPU: one launch each. Indices are not looked at, which would wait for the device: out of
// range ones are undefined.
#include "common/block_sparse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/block_sparse.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

void check_short(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(is_short_float(x.scalar_type()), op,
                  ": x: expected float32, bfloat16 or float16 on the GPU, got float64");
}

// Rows that start on 16 bytes, as the kernels copy them: a copy where these do not.
Tensor in_vectors(const Tensor& t) {
  const int64_t size = int64_t(t.element_size());
  const bool starts = uintptr_t(t.const_data_ptr()) % 16 == 0;
  const bool steps = t.size(0) <= 1 || t.stride(0) * size % 16 == 0;
  if (starts && steps) return t;
  const Tensor copy = new_output(t, {t.size(0), t.size(1)}, t.scalar_type());
  Tensor to = copy;
  torch::stable::copy_(to, t);
  return copy;
}

bool rows_apart(const Tensor& t) { return t.size(0) <= 1 || t.stride(0) >= t.size(1); }
// From row to row; of a single row any stride is as good.
int64_t step_of(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

const int64_t* numbers_of(const Tensor& t) { return (const int64_t*)t.const_data_ptr(); }

Tensor product(Tensor x, Tensor values, Tensor begin, Tensor index, Tensor place, std::optional<Tensor> bias,
               bool turned) {
  constexpr const char* op = "block_sparse_product";
  check_block_product(x, values, begin, index, place, bias, turned);
  check_short(op, x);
  const int depth = int(values.size(turned ? 2 : 1)), width = int(values.size(turned ? 1 : 2));
  const int64_t outer = begin.size(0) - 1, rows = x.size(0);
  const Tensor y = new_output(x, {rows, outer * width}, x.scalar_type());
  const Tensor left = in_vectors(x), right = in_vectors(values);
  const Target target = target_of(op, x);
  const BlockPlan plan = plan_blocks({rows, outer, outer * (x.size(1) / depth), index.size(0), width, depth,
                                      int(x.element_size()), turned, false, rows_apart(left)},
                                     limits_of(op, target));
  const BlockArgs args = {.type = element_of(x.scalar_type()),
                          .left = left.const_data_ptr(),
                          .right = right.const_data_ptr(),
                          .bias = bias ? bias->const_data_ptr() : nullptr,
                          .to = y.mutable_data_ptr(),
                          .begin = numbers_of(begin),
                          .index = numbers_of(index),
                          .place = numbers_of(place),
                          .rows = rows,
                          .outer = outer,
                          .live = index.size(0),
                          .left_columns = x.size(1),
                          .right_columns = values.size(2),
                          .left_step = step_of(left),
                          .right_step = values.size(2),
                          .width = width,
                          .depth = depth,
                          .turned = turned,
                          .by_rows = false};
  (plan.wgmma ? launch_wgmma_product : launch_block_product)(op, target, args, plan);
  return y;
}

Tensor gradient(Tensor grad, Tensor x, Tensor begin, Tensor index, Tensor place, int64_t rows, int64_t columns,
                bool by_rows) {
  constexpr const char* op = "block_sparse_gradient";
  check_block_gradient(grad, x, begin, index, place, rows, columns);
  check_short(op, x);
  const int64_t outer = by_rows ? grad.size(1) / rows : x.size(1) / columns, count = index.size(0);
  STD_TORCH_CHECK(begin.size(0) == outer + 1, op, ": begin: expected ", outer + 1, " numbers, got ", begin.size(0));
  const Tensor to = new_output(x, {count, rows, columns}, x.scalar_type());
  const Tensor left = in_vectors(grad), right = in_vectors(x);
  const Target target = target_of(op, x);
  const BlockPlan plan =
      plan_blocks({x.size(0), outer, grad.size(1) / rows * (x.size(1) / columns), count, int(rows), int(columns),
                   int(x.element_size()), false, true, rows_apart(left) && rows_apart(right)},
                  limits_of(op, target));
  const BlockArgs args = {.type = element_of(x.scalar_type()),
                          .left = left.const_data_ptr(),
                          .right = right.const_data_ptr(),
                          .bias = nullptr,
                          .to = to.mutable_data_ptr(),
                          .begin = numbers_of(begin),
                          .index = numbers_of(index),
                          .place = numbers_of(place),
                          .rows = x.size(0),
                          .outer = outer,
                          .live = count,
                          .left_columns = grad.size(1),
                          .right_columns = x.size(1),
                          .left_step = step_of(left),
                          .right_step = step_of(right),
                          .width = int(rows),
                          .depth = int(columns),
                          .turned = false,
                          .by_rows = by_rows};
  (plan.wgmma ? launch_wgmma_gradient : launch_block_gradient)(op, target, args, plan);
  return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("block_sparse_product", TORCH_BOX(&product));
  m.impl("block_sparse_gradient", TORCH_BOX(&gradient));
}

}  // namespace kdfast::cuda
