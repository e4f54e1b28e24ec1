// Where a launch goes.
#pragma once
#include <string>

namespace kdfast::cuda {

struct Target {
  int device;
  void* stream;  // a cudaStream_t
};

// A kernel as the CUDA runtime knows it.
struct NamedKernel {
  std::string name;
  const void* function;
};

}  // namespace kdfast::cuda
