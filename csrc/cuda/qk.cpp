// Losses between the scores of queries and keys on the GPU: two launches for the values of all layers (of 48 at a
// time), two for the gradients, one for the sum.
#include "common/qk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/heads.h"
#include "cuda/qk.h"
#include "cuda/reduce.h"

namespace kdfast::cuda {
namespace {

using Tensors = std::vector<Tensor>;

QkMemory memory_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// 8.5 L d^2 multiply-adds for Gram matrices against 6 L^2 d for scores: fewer from L = 1.4 d on, and by the
// instructions that docs/kernels.md counts, with the sums of splits and a matrix for every block, from about twice
// that. Gram matrices in float need the differences that equal head sizes allow.
QkForm form_of(const QkCall& call) {
  if (QkLoss(call.kind) == QkLoss::kl) return QkForm::scores_kl;
  const int64_t d = call.student_q[0].size(3);
  const bool linear = !call.causal && call.teacher_q[0].size(3) == d && 10 * call.length() > 24 * d;
  return linear ? QkForm::grams : QkForm::scores_mse;
}

// What the kernels of a launch need for themselves.
struct Workspace {
  Tensor parts, grams, rows;
  GramPlan plan;

  Workspace(const QkCall& call, QkForm form, int64_t layers) {
    const Tensor& like = call.student_q[0];
    const int64_t heads = layers * call.batch() * call.heads();
    plan = plan_grams(int(like.size(3)), call.length(), heads);
    auto floats = [&](bool wanted, int64_t count) { return new_output(like, {wanted ? count : 0}, ScalarType::Float); };
    parts = floats(form != QkForm::grams, heads * ((call.length() + kQkTile - 1) / kQkTile));
    grams = floats(form == QkForm::grams, plan.splits * heads * 2 * plan.numbers());
    rows = floats(form == QkForm::scores_kl, heads * call.length() * 4);
  }
};

QkArgs args_of(const QkCall& call, const Tensors& gradients, int64_t first, int64_t layers, const Workspace& work) {
  QkArgs args = {};
  const Tensor &s = call.student_q[0], &t = call.teacher_q[0];
  args.layers = int(layers);
  args.heads = int(call.heads());
  args.key_heads = int(call.key_heads());
  args.teacher_shared = int(t.size(1) / call.teacher_k[0].size(1));
  args.batch = int(call.batch());
  args.length = int(call.length());
  args.student_size = int(s.size(3));
  args.teacher_size = int(t.size(3));
  args.student_type = element_of(s.scalar_type());
  args.teacher_type = element_of(t.scalar_type());
  args.student_scale = float(call.student_scale);
  args.teacher_scale = float(call.teacher_scale);
  args.causal = call.causal;
  if (call.query_mask) args.query_mask = (const bool*)call.query_mask->const_data_ptr();
  if (call.key_mask) args.key_mask = (const bool*)call.key_mask->const_data_ptr();
  if (call.divisor) args.divisor = (const float*)call.divisor->const_data_ptr();
  args.per_head = call.per_head;
  args.parts = (float*)work.parts.mutable_data_ptr();
  args.grams = (float*)work.grams.mutable_data_ptr();
  args.plan = work.plan;
  args.rows = (float*)work.rows.mutable_data_ptr();
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t layer = first + i;
    auto of = [&](int64_t n) { return gradients.empty() ? nullptr : gradients[n].mutable_data_ptr(); };
    args.layer[i] = {memory_of(call.student_q[layer]),
                     memory_of(call.student_k[layer]),
                     memory_of(call.teacher_q[layer]),
                     memory_of(call.teacher_k[layer]),
                     of(layer),
                     of(call.layers() + layer)};
  }
  fill_heads(args.table, call.head_map, call.weight, first * call.heads(), layers * call.heads());
  return args;
}

// The heads' values; and gradients, where there are some to fill.
Tensor launch_all(const QkCall& call, const Target& target, const Tensors& gradients, const Tensor* grad_loss) {
  Tensor values = new_output(call.student_q[0], {call.all_heads()}, ScalarType::Float);
  const int64_t at_once = layers_at_once(call.op(), call.heads()), of_layer = call.batch() * call.heads();
  const QkForm form = form_of(call);
  for (int64_t first = 0; first < call.layers(); first += at_once) {
    const int64_t layers = std::min(at_once, call.layers() - first);
    const Workspace work(call, form, layers);
    QkArgs args = args_of(call, gradients, first, layers, work);
    args.values = (float*)values.mutable_data_ptr() + first * of_layer;
    if (grad_loss) {
      args.upstream = (const float*)grad_loss->const_data_ptr() + (call.per_head ? first * of_layer : 0);
    }
    launch_qk(call.op(), target, form, args);
  }
  return values;
}

void check(const QkCall& call) {
  STD_TORCH_CHECK(!call.is_double(), call.op(),
                  ": student_q: expected float32, bfloat16 or float16 on the GPU, got float64");
}
bool is_empty(const QkCall& call) {
  return call.all_heads() == 0 || call.length() == 0 || call.student_q[0].size(3) == 0;
}

std::tuple<Tensor, Tensors> forward(const QkCall& call, bool gradient) {
  check(call);
  Tensors gradients;
  if (gradient) gradients = new_gradients(call.with_gradient());
  Tensor loss = new_output(call.student_q[0], call.loss_sizes(), ScalarType::Float);
  if (is_empty(call)) {
    clear(gradients);
    return {torch::stable::zero_(loss), gradients};
  }
  const Target target = target_of(call.op(), call.student_q[0]);
  const Tensor values = launch_all(call, target, gradients, nullptr);
  if (call.per_head) return {torch::stable::view(values, call.loss_sizes()), gradients};
  const Tensor parts = new_output(call.student_q[0], {sum_parts(values.numel())}, ScalarType::Double);
  launch_sum(call.op(), target, (const float*)values.const_data_ptr(), nullptr, values.numel(),
             (float*)loss.mutable_data_ptr(), nullptr, (double*)parts.mutable_data_ptr());
  return {loss, gradients};
}

Tensors backward(const QkCall& call, const Tensor& grad_loss) {
  check(call);
  const Tensors gradients = new_gradients(call.with_gradient());
  if (is_empty(call)) {
    clear(gradients);
  } else {
    launch_all(call, target_of(call.op(), call.student_q[0]), gradients, &grad_loss);
  }
  return gradients;
}

using Ops = QkOps<forward, backward>;

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("qk_distance", TORCH_BOX(&Ops::qk_distance));
  m.impl("qk_distance_backward", TORCH_BOX(&Ops::qk_distance_backward));
}

}  // namespace
}  // namespace kdfast::cuda
