// Where a launch goes.
#pragma once

namespace kdfast::cuda {

struct Target {
  int device;
  void* stream;  // a cudaStream_t
};

// A kernel as the CUDA runtime knows it.
struct NamedKernel {
  const char* name;
  const void* function;
};

}  // namespace kdfast::cuda
