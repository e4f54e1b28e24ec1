// Reductions over rows. A block for each result: the numbers are few beside the logits (4 bytes per row), and one block
// needs no zeroed workspace, no ticket and no second order of summation. One pass over 4 bytes per row and result (sum)
// or over the mask and the labels (count).
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.h"

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

// Block 0 sums the losses, blocks 1 and 2 the components.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* losses, const float* components, int64_t rows, float* loss, float* component_sums) {
  const int block = int(blockIdx.x);
  const float* numbers = block ? components + (block - 1) : losses;
  const int64_t stride = block ? 2 : 1;
  sum_to(block ? component_sums + (block - 1) : loss, rows, [&](int64_t i) { return double(numbers[i * stride]); });
}

// Block 0 counts the rows, block 1 the labels.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ RowMask mask, const __grid_constant__ RowLabels labels, int64_t rows,
                 float* counts) {
  const bool of_labels = blockIdx.x == 1;
  sum_to(counts + blockIdx.x, rows, [&](int64_t i) {
    const bool counted = !mask.data || mask.data[mask.offsets(i)];
    return counted && !(of_labels && labels.data[labels.offsets(i)] == labels.ignored) ? 1.0 : 0.0;
  });
}

constexpr int64_t kShared = kThreads * int64_t(sizeof(double));

}  // namespace

void launch_sum(const char* op, const Target& target, const float* losses, const float* components, int64_t rows,
                float* loss, float* component_sums) {
  launch(op, sum_kernel, target, {components ? 3 : 1, kThreads, kShared}, losses, components, rows, loss,
         component_sums);
}

void launch_count(const char* op, const Target& target, const RowMask& mask, const RowLabels& labels, int64_t rows,
                  float* counts) {
  launch(op, count_kernel, target, {labels.data ? 2 : 1, kThreads, kShared}, mask, labels, rows, counts);
}

}  // namespace kdfast::cuda
