// Live rows and columns of a matrix, packed side by side and put back, on the CPU: rows shared among the threads.
//
// Packing reads the live rows and writes the part; adding reads the part and the live columns' lines and writes these;
// spreading reads the part and writes the matrix, once.
#include "common/parts.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/indices.h"
#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

using Indices = std::optional<Tensor>;

// Numbers of a matrix that a thread takes at least.
constexpr int64_t kGrain = 1 << 15;

// Indices in order, each once and in range, or it throws; of all where there are none.
class Order {
 public:
  Order(const char* op, const char* argument, const Indices& indices, int64_t all)
      : indices_(indices ? (const int64_t*)indices->const_data_ptr() : nullptr), count_(count_of(indices, all)) {
    const int64_t good = indices_ ? sorted_once(indices_, count_, all) : count_;
    STD_TORCH_CHECK(good == count_, op, ": ", argument, ": expected sorted indices below ", all, ", each once, got ",
                    indices_[good], " at ", good);
  }
  int64_t count() const { return count_; }
  const int64_t* data() const { return indices_; }
  int64_t operator[](int64_t i) const { return indices_ ? indices_[i] : i; }
  // Where index `at` stands, or would.
  int64_t find(int64_t at) const {
    return indices_ ? std::lower_bound(indices_, indices_ + count_, at) - indices_ : at;
  }
  // A bit for each of `all`.
  std::vector<uint32_t> bits(int64_t all) const {
    std::vector<uint32_t> words((all + 31) / 32);
    for (int64_t i = 0; i < count_; ++i) words[(*this)[i] / 32] |= uint32_t(1) << (*this)[i] % 32;
    return words;
  }

 private:
  const int64_t* indices_;
  int64_t count_;
};

// A matrix, its live rows and columns.
struct Live {
  Live(const char* op, const Tensor& matrix, const Indices& row_indices, const Indices& column_indices)
      : rows(op, "rows", row_indices, matrix.size(0)),
        columns(op, "columns", column_indices, matrix.size(1)),
        bits(columns.bits(matrix.size(1))),
        shape{element_of(matrix.scalar_type()), matrix.size(1), columns.count(), columns.data(), bits.data()},
        element(int64_t(matrix.element_size())),
        grain(std::max<int64_t>(1, kGrain / std::max<int64_t>(matrix.size(1), 1))) {}

  Order rows, columns;
  std::vector<uint32_t> bits;
  PartShape shape;
  int64_t element, grain;
};

Tensor pack_part(Tensor matrix, Indices rows, Indices columns) {
  check_pack(matrix, rows, columns);
  const Live live("pack_part", matrix, rows, columns);
  Tensor part = torch::stable::new_empty(matrix, {live.rows.count(), live.columns.count()});
  const auto* from = (const char*)matrix.const_data_ptr();
  auto* to = (char*)part.mutable_data_ptr();
  const int64_t step = matrix.stride(0) * live.element, packed = live.columns.count() * live.element;
  const auto pack = cpu_variant().kernels->parts->pack;
  torch::stable::parallel_for(0, live.rows.count(), live.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(live.shape, from + live.rows[i] * step, to + i * packed);
  });
  return part;
}

void unpack_part_(Tensor matrix, Tensor part, Indices rows, Indices columns, bool accumulate) {
  check_unpack(matrix, part, rows, columns);
  const Live live("unpack_part_", matrix, rows, columns);
  const auto* from = (const char*)part.const_data_ptr();
  auto* to = (char*)matrix.mutable_data_ptr();
  const int64_t step = matrix.stride(0) * live.element, packed = part.stride(0) * live.element;
  const PartKernels& kernels = *cpu_variant().kernels->parts;
  if (accumulate) {
    torch::stable::parallel_for(0, live.rows.count(), live.grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.add(live.shape, from + i * packed, to + live.rows[i] * step);
    });
    return;
  }
  torch::stable::parallel_for(0, matrix.size(0), live.grain, [&](int64_t begin, int64_t end) {
    int64_t i = live.rows.find(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (i < live.rows.count() && live.rows[i] == row) {
        kernels.spread(live.shape, from + i++ * packed, to + row * step);
      } else {
        std::memset(to + row * step, 0, live.shape.columns * live.element);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("pack_part", TORCH_BOX(&pack_part));
  m.impl("unpack_part_", TORCH_BOX(&unpack_part_));
}

}  // namespace kdfast
