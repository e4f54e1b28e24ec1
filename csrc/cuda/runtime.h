// What a CUDA launcher needs from torch and the device. The host shim has its own (tests/cuda_host).
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/target.h"

// Where the operators of this folder register: the host shim registers the same launchers for CPU tensors, under a
// namespace of its own.
#if !defined(KDFAST_CUDA_NAMESPACE)
#define KDFAST_CUDA_NAMESPACE kdfast
#define KDFAST_CUDA_KEY CUDA
#endif

namespace kdfast::cuda {

// The device that holds `t`, and torch's current stream there.
Target target_of(const char* op, const torch::stable::Tensor& t);

// KDFAST_CUDA_NO_CLUSTERS=1 in the environment makes any device look like one before Hopper, without clusters and
// wgmma, for tests.
DeviceLimits limits_of(const char* op, const Target& target);

// The element of float32, bfloat16 or float16.
inline Element element_of(torch::headeronly::ScalarType t) {
  if (t == torch::headeronly::ScalarType::BFloat16) return Element::bf16;
  return t == torch::headeronly::ScalarType::Half ? Element::f16 : Element::f32;
}

// Contiguous, not initialized, on the device of `like`.
torch::stable::Tensor new_output(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                 torch::headeronly::ScalarType dtype);

}  // namespace kdfast::cuda
