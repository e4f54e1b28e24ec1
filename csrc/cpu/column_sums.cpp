// Sums of columns of 16-bit numbers on the CPU, as a bias's gradient takes them: columns shared among the threads.
//
// Every number is read once, at the memory's speed: twice that of torch's sum over rows, which does float32 as fast.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

constexpr const char* kOp = "column_sums";
constexpr int64_t kLines = 64;       // columns, whole cache lines
constexpr int64_t kGrain = 1 << 15;  // numbers that a thread takes at least

Tensor column_sums(Tensor x) {
  const bool is_short = x.element_size() == 2 && is_short_float(x.scalar_type());
  STD_TORCH_CHECK(is_short && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), kOp,
                  ": x: expected rows of bfloat16 or float16, side by side, got ",
                  torch::headeronly::toString(x.scalar_type()), " of shape ", shape_of(x));
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor sums = torch::stable::new_empty(x, {columns});
  const ColumnSums kernel = cpu_variant().kernels->columns[x.scalar_type() == ScalarType::Half];
  const auto* from = (const uint16_t*)x.const_data_ptr();
  auto* to = (uint16_t*)sums.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrain / kLines / std::max<int64_t>(rows, 1));
  torch::stable::parallel_for(0, (columns + kLines - 1) / kLines, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLines, last = std::min(end * kLines, columns);
    kernel({from + first, rows, last - first, x.stride(0), to + first});
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("column_sums", TORCH_BOX(&column_sums)); }

}  // namespace kdfast
