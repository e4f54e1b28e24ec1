// What the launchers of layers.cpp and qk.cpp share: the table of heads that their kernels take by value, lists of
// outputs.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cuda/layers.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {

inline int64_t layers_at_once(const char* op, int64_t heads) {
  STD_TORCH_CHECK(heads <= kMostHeads, op, ": student: expected at most ", kMostHeads, " heads, got ", heads);
  return std::clamp<int64_t>(kMostHeads / std::max<int64_t>(heads, 1), 1, kMostLayers);
}

inline void fill_heads(HeadTable& table, const std::vector<int64_t>& head_map, const std::vector<double>& weight,
                       int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    table.teacher[i] = int16_t(head_map[first + i]);
    table.weight[i] = float(weight[first + i]);
  }
}

// Not initialized.
inline std::vector<torch::stable::Tensor> new_gradients(const std::vector<torch::stable::Tensor>& of) {
  std::vector<torch::stable::Tensor> all;
  for (const auto& t : of) all.push_back(new_output(t, {t.sizes().begin(), t.sizes().end()}, t.scalar_type()));
  return all;
}
inline void clear(const std::vector<torch::stable::Tensor>& all) {
  for (torch::stable::Tensor t : all) torch::stable::zero_(t);
}

}  // namespace kdfast::cuda
