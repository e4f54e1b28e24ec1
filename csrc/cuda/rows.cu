// Reductions over rows. One block each: the numbers are few beside the logits (4 bytes per row), and one block needs no
// zeroed workspace, no ticket and no second order of summation. One pass over 4 bytes (sum) or 1 byte (count) per row.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.h"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 1024;

// Thread i takes every 1024th value: the block's loads stay side by side.
template <class Value>
KDFAST_DEVICE void sum_to(float* to, int64_t count, Value value) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += value(i);
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) *to = float(sum);
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const float* numbers, int64_t count, float* to) {
  sum_to(to, count, [&](int64_t i) { return double(numbers[i]); });
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ RowMask mask, int64_t rows, float* to) {
  sum_to(to, rows, [&](int64_t i) { return mask.data[mask.offsets(i)] ? 1.0 : 0.0; });
}

constexpr Grid kGrid{1, kThreads, kThreads * int64_t(sizeof(double))};

}  // namespace

void launch_sum(const char* op, const Target& target, const float* numbers, int64_t count, float* to) {
  launch(op, sum_kernel, target, kGrid, numbers, count, to);
}

void launch_count(const char* op, const Target& target, const RowMask& mask, int64_t rows, float* to) {
  launch(op, count_kernel, target, kGrid, mask, rows, to);
}

}  // namespace kdfast::cuda
