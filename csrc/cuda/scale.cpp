// scale_: a saved gradient times the upstream factor, for kdfast/ops/divergence.py.
#include "cuda/scale.h"

#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

void scale_(Tensor x, Tensor factor) {
  constexpr const char* op = "scale_";
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(is_short_float(dtype) && x.is_contiguous(), op,
                  ": x: expected contiguous float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype),
                  " of shape ", shape_of(x));
  check_device(op, "factor", factor, x);
  check_dtype(op, "factor", factor, ScalarType::Float);
  STD_TORCH_CHECK(factor.numel() == 1, op, ": factor: expected one number, got ", shape_of(factor));
  if (x.numel() == 0) return;
  const Target target = target_of(op, x);
  launch_scale(op, target, element_of(dtype), x.mutable_data_ptr(), x.numel(), (const float*)factor.const_data_ptr(),
               limits_of(op, target).multiprocessors);
}

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace
}  // namespace kdfast::cuda
