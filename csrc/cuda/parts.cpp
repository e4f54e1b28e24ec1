// Live rows and columns of a matrix on the GPU: one launch, and one more of torch's where a fresh matrix is cleared.
// Indices are not looked at, which would wait for the device: out of range ones are undefined.
#include "common/parts.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/parts.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

using Indices = std::optional<Tensor>;

PartArgs args_of(const Tensor& matrix, const Tensor& part, const Indices& rows, const Indices& columns) {
  auto of = [](const Indices& x) { return x ? (const int64_t*)x->const_data_ptr() : nullptr; };
  return {element_of(matrix.scalar_type()),
          const_cast<void*>(matrix.const_data_ptr()),
          const_cast<void*>(part.const_data_ptr()),
          matrix.stride(0),
          part.stride(0),
          of(rows),
          of(columns),
          part.size(0),
          part.size(1)};
}

void check_short(const char* op, const Tensor& matrix) {
  STD_TORCH_CHECK(is_short_float(matrix.scalar_type()), op,
                  ": matrix: expected float32, bfloat16 or float16 on the GPU, got float64");
}

Tensor pack_part(Tensor matrix, Indices rows, Indices columns) {
  check_pack(matrix, rows, columns);
  check_short("pack_part", matrix);
  const Tensor part =
      new_output(matrix, {count_of(rows, matrix.size(0)), count_of(columns, matrix.size(1))}, matrix.scalar_type());
  launch_part("pack_part", target_of("pack_part", matrix), PartMove::pack, args_of(matrix, part, rows, columns));
  return part;
}

void unpack_part_(Tensor matrix, Tensor part, Indices rows, Indices columns, bool accumulate) {
  check_unpack(matrix, part, rows, columns);
  check_short("unpack_part_", matrix);
  if (!accumulate) torch::stable::zero_(matrix);
  launch_part("unpack_part_", target_of("unpack_part_", matrix), accumulate ? PartMove::add : PartMove::set,
              args_of(matrix, part, rows, columns));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("pack_part", TORCH_BOX(&pack_part));
  m.impl("unpack_part_", TORCH_BOX(&unpack_part_));
}

}  // namespace kdfast::cuda
