// Distances between layers on the GPU: one launch for the rows of all layers (of 48 at a time), one for the sum of what
// its blocks found.
#include "common/layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/heads.h"
#include "cuda/layers.h"
#include "cuda/reduce.h"

namespace kdfast::cuda {
namespace {

using Tensors = std::vector<Tensor>;

LayerMemory memory_of(const Tensor& t) {
  auto step = [&](int d) { return LayerCall::stride_of(t, d); };
  return {t.const_data_ptr(), step(0), step(1), step(2), step(3)};
}

LayerArgs args_of(const LayerCall& call, const Tensors& gradients, int64_t first, int64_t layers) {
  LayerArgs args = {};
  args.kind = Distance(call.kind);
  args.layers = int(layers);
  args.heads = int(call.heads());
  args.batch = call.batch();
  args.rows = call.rows();
  args.columns = call.columns();
  args.student_type = element_of(call.student[0].scalar_type());
  args.teacher_type = element_of(call.teacher[0].scalar_type());
  if (call.row_mask) args.row_mask = (const bool*)call.row_mask->const_data_ptr();
  if (call.column_mask) args.column_mask = (const bool*)call.column_mask->const_data_ptr();
  if (call.divisor) args.divisor = (const float*)call.divisor->const_data_ptr();
  args.per_row = call.per_row;
  args.floor = float(call.floor);
  for (int64_t i = 0; i < layers; ++i) {
    void* gradient = gradients.empty() ? nullptr : gradients[first + i].mutable_data_ptr();
    args.layer[i] = {memory_of(call.student[first + i]), memory_of(call.teacher[first + i]), gradient};
  }
  fill_heads(args.table, call.head_map, call.weight, first * call.heads(), layers * call.heads());
  return args;
}

// Launches all layers; the values are those of the rows, or sums of some of them, as many as are returned.
Tensor launch_all(const LayerCall& call, const Target& target, const Tensors& gradients, const Tensor* grad_loss) {
  const int multiprocessors = limits_of(call.op(), target).multiprocessors;
  const int64_t at_once = layers_at_once(call.op(), call.heads()), rows_of_layer = call.all_rows() / call.layers();
  std::vector<LayerArgs> turns;
  int64_t count = 0;
  for (int64_t first = 0; first < call.layers(); first += at_once) {
    turns.push_back(args_of(call, gradients, first, std::min(at_once, call.layers() - first)));
    count += layer_values(turns.back(), multiprocessors);
    if (grad_loss) {
      const auto* upstream = (const float*)grad_loss->const_data_ptr();
      turns.back().upstream = upstream + (call.per_row ? first * rows_of_layer : 0);
    }
  }
  Tensor values = new_output(call.student[0], {count}, ScalarType::Float);
  auto* at = (float*)values.mutable_data_ptr();
  for (LayerArgs& args : turns) {
    args.values = at;
    at += launch_layers(call.op(), target, args, multiprocessors);
  }
  return values;
}

void check(const LayerCall& call) {
  STD_TORCH_CHECK(!call.is_double(), call.op(),
                  ": student: expected float32, bfloat16 or float16 on the GPU, got float64");
  constexpr int64_t kMost = int64_t(1) << 31;
  STD_TORCH_CHECK(call.columns() < kMost, call.op(), ": student: expected fewer than 2^31 numbers in a row, got ",
                  call.columns());
  STD_TORCH_CHECK(call.all_rows() < kMost, call.op(), ": student: expected fewer than 2^31 rows in all layers, got ",
                  call.all_rows());
}
bool is_empty(const LayerCall& call) { return call.all_rows() == 0 || call.columns() == 0; }

std::tuple<Tensor, Tensors> forward(const LayerCall& call, bool gradient) {
  check(call);
  Tensors gradients;
  if (gradient) gradients = new_gradients(call.student);
  Tensor loss = new_output(call.student[0], call.loss_sizes(), ScalarType::Float);
  if (is_empty(call)) {
    clear(gradients);
    return {torch::stable::zero_(loss), gradients};
  }
  const Target target = target_of(call.op(), call.student[0]);
  const Tensor values = launch_all(call, target, gradients, nullptr);
  if (call.per_row) return {torch::stable::view(values, call.loss_sizes()), gradients};
  const Tensor parts = new_output(call.student[0], {sum_parts(values.numel())}, ScalarType::Double);
  launch_sum(call.op(), target, (const float*)values.const_data_ptr(), nullptr, values.numel(),
             (float*)loss.mutable_data_ptr(), nullptr, (double*)parts.mutable_data_ptr());
  return {loss, gradients};
}

Tensors backward(const LayerCall& call, const Tensor& grad_loss) {
  check(call);
  const Tensors gradients = new_gradients(call.student);
  if (is_empty(call)) {
    clear(gradients);
  } else {
    launch_all(call, target_of(call.op(), call.student[0]), gradients, &grad_loss);
  }
  return gradients;
}

using Ops = LayerOps<forward, backward>;

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("layer_distance", TORCH_BOX(&Ops::layer_distance));
  m.impl("layer_distance_backward", TORCH_BOX(&Ops::layer_distance_backward));
}

}  // namespace
}  // namespace kdfast::cuda
