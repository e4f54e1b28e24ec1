// Products with a matrix of which some blocks live, on the CPU: shared among the threads by live blocks.
//
// Forward: 2 · rows · live numbers operations; x and the result pass once per cache of packed blocks (block_rows.cpp).
// The gradient of x is the same product along W's columns. That of W is shared by live blocks too, each of which one
// thread adds up over all rows.
#include "common/block_sparse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

using torch::stable::parallel_for;

// Rows of A in which a block row is split between threads.
constexpr int64_t kRowStep = 32;

const BlockKernels& kernels_of(const Tensor& t) {
  return cpu_variant().kernels->blocks[int(element_of(t.scalar_type()))];
}

// `inner`: blocks of the inner dimension. Throws where an index would leave the memory of `count` blocks.
Blocks blocks_of(const char* op, const Tensor& begin, const Tensor& index, const Tensor& place, int64_t inner,
                 int64_t count) {
  auto of = [](const Tensor& t) { return (const int64_t*)t.const_data_ptr(); };
  const Blocks b{of(begin), of(index), of(place), begin.size(0) - 1, 0, 0, false};
  bool ordered = b.begin[0] == 0 && b.begin[b.rows] == count;
  for (int64_t i = 0; ordered && i < b.rows; ++i) ordered = b.begin[i] <= b.begin[i + 1];
  STD_TORCH_CHECK(ordered, op, ": begin: expected ascending numbers from 0 to ", count);
  for (int64_t n = 0; n < count; ++n) {
    STD_TORCH_CHECK(b.index[n] >= 0 && b.index[n] < inner, op, ": index: expected 0 to ", inner - 1, ", got ",
                    b.index[n]);
    STD_TORCH_CHECK(b.place[n] >= 0 && b.place[n] < count, op, ": place: expected 0 to ", count - 1, ", got ",
                    b.place[n]);
  }
  return b;
}

// f(first, last, begin, end, memory): block rows and rows of A for a thread, about as much work for each: a block, and
// one more for what is written. A block row on a border is shared by its rows.
template <class F>
void share(const Blocks& b, int64_t rows, int64_t room, F f) {
  const int64_t all = b.begin[b.rows] + b.rows, threads = torch::stable::get_num_threads();
  parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    const Room memory(room);
    const int64_t lo = all * from / threads, hi = all * to / threads;
    auto cut = [&](int64_t i, int64_t at) {  // the row of A at which work `at` falls within block row i
      const int64_t before = b.begin[i] + i, work = b.begin[i + 1] - b.begin[i] + 1;
      const int64_t row =
          (rows * (std::clamp(at, before, before + work) - before) / work + kRowStep / 2) / kRowStep * kRowStep;
      return at <= before ? 0 : at >= before + work ? rows : std::min(row, rows);
    };
    int64_t whole = -1;  // since when whole block rows wait
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t begin = cut(i, lo), end = cut(i, hi);
      if (begin == 0 && end == rows) {
        if (whole < 0) whole = i;
        continue;
      }
      if (whole >= 0) f(whole, i, 0, rows, memory.data());
      whole = -1;
      if (begin < end) f(i, i + 1, begin, end, memory.data());
    }
    if (whole >= 0) f(whole, b.rows, 0, rows, memory.data());
  });
}

Tensor product(Tensor x, Tensor values, Tensor begin, Tensor index, Tensor place, std::optional<Tensor> bias,
               bool turned) {
  check_block_product(x, values, begin, index, place, bias, turned);
  const int64_t depth = values.size(turned ? 2 : 1), width = values.size(turned ? 1 : 2);
  Blocks b = blocks_of("block_sparse_product", begin, index, place, x.size(1) / depth, values.size(0));
  b.width = width, b.depth = depth, b.turned = turned;
  const int64_t rows = x.size(0), out = b.rows * width, size = int64_t(x.element_size());
  Tensor y = torch::stable::new_empty(x, {rows, out});
  int64_t most = 0;
  for (int64_t i = 0; i < b.rows; ++i) most = std::max(most, b.begin[i + 1] - b.begin[i]);
  const BlockKernels& kernels = kernels_of(x);
  const auto* from = (const char*)x.const_data_ptr();
  auto* to = (char*)y.mutable_data_ptr();
  advise_huge_pages(to, size_t(rows * out * size));
  const int64_t room = kernels.product_room(b, x.size(1), most);
  share(b, rows, room, [&](int64_t first, int64_t last, int64_t at, int64_t end, char* memory) {
    kernels.product({&b, first, last, end - at, x.stride(0), out, x.size(1), from + at * x.stride(0) * size,
                     values.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, to + at * out * size, memory});
  });
  return y;
}

Tensor gradient(Tensor grad, Tensor x, Tensor begin, Tensor index, Tensor place, int64_t rows, int64_t columns,
                bool by_rows) {
  check_block_gradient(grad, x, begin, index, place, rows, columns);
  const int64_t inner = by_rows ? x.size(1) / columns : grad.size(1) / rows, count = index.size(0);
  const int64_t outer = by_rows ? grad.size(1) / rows : x.size(1) / columns;
  STD_TORCH_CHECK(begin.size(0) == outer + 1, "block_sparse_gradient: begin: expected ", outer + 1, " numbers, got ",
                  begin.size(0));
  Blocks b = blocks_of("block_sparse_gradient", begin, index, place, inner, count);
  b.width = by_rows ? rows : columns, b.depth = by_rows ? columns : rows, b.turned = by_rows;
  const Tensor to = torch::stable::new_empty(x, {count, rows, columns});
  const bool is_short = x.element_size() == 2;
  const Tensor sums = is_short ? torch::stable::new_empty(x, {count, rows, columns}, ScalarType::Float) : to;
  const BlockKernels& kernels = kernels_of(x);
  const int64_t room = kernels.gradient_room(b, inner), threads = torch::stable::get_num_threads();
  parallel_for(0, threads, 1, [&](int64_t from, int64_t until) {
    const Room memory(room);
    kernels.gradient({&b, count * from / threads, count * until / threads, x.size(0), inner, grad.stride(0),
                      x.stride(0), grad.const_data_ptr(), x.const_data_ptr(), (float*)sums.mutable_data_ptr(),
                      to.mutable_data_ptr(), memory.data()});
  });
  return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("block_sparse_product", TORCH_BOX(&product));
  m.impl("block_sparse_gradient", TORCH_BOX(&gradient));
}

}  // namespace kdfast
