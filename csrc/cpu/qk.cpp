// Losses between the scores of queries and keys on the CPU: the heads of all layers shared among the threads, those
// that share keys together.
#include "common/qk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>

#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

using torch::stable::parallel_for;

class QkHeads {
 public:
  // `gradients`: of the layers' queries, then of their keys; none: not wanted. `upstream`: the factor of every head;
  // by_head: of each.
  QkHeads(const QkCall& call, const std::vector<Tensor>& gradients, double upstream, const double* by_head)
      : call_(call), gradients_(gradients), by_head_(by_head), kernels_(*cpu_variant().kernels->qk[call.kind]) {
    const Tensor &s = call.student_q[0], &t = call.teacher_q[0];
    shape_ = {element_of(s.scalar_type()), element_of(t.scalar_type()), call.length(), s.size(3), t.size(3),
              call.student_scale,          call.teacher_scale,          call.causal};
    const double divisor = call.divisor ? Reals(*call.divisor, call.is_double()).get(0) : 1;
    scale_ = divisor > 0 ? upstream / divisor : 0;
  }

  // Every head's weight times its loss.
  std::vector<double> run() const {
    std::vector<double> values(call_.all_heads());
    const int64_t groups = call_.layers() * call_.batch() * call_.key_heads();
    const int64_t workspace = kernels_.workspace(shape_), sums = gradients_.empty() ? 0 : kernels_.key_sums(shape_);
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[workspace + sums]);
      for (int64_t group = begin; group < end; ++group)
        one_group(group, memory.get(), memory.get() + workspace, values);
    });
    return values;
  }

 private:
  void one_group(int64_t group, char* workspace, char* sums, std::vector<double>& values) const {
    const int64_t key_head = group % call_.key_heads(), above = group / call_.key_heads();
    const int64_t b = above % call_.batch(), layer = above / call_.batch();
    const int64_t shared = call_.heads() / call_.key_heads();
    const bool wanted = !gradients_.empty();
    if (wanted) std::memset(sums, 0, kernels_.key_sums(shape_));
    for (int64_t h = key_head * shared; h < (key_head + 1) * shared; ++h) {
      const int64_t head = layer * call_.heads() + h, index = above * call_.heads() + h;
      const int64_t teacher_head = call_.head_map[head];
      void* dq = wanted ? place(gradients_[layer], b, h) : nullptr;
      if (teacher_head < 0) {
        if (wanted) std::memset(dq, 0, shape_.length * shape_.student_size * size_of(shape_.student));
        continue;
      }
      const Tensor &tq = call_.teacher_q[layer], &tk = call_.teacher_k[layer];
      const int64_t teacher_shared = tq.size(1) / tk.size(1);
      QkHead of{tokens(call_.student_q[layer], b, h),
                tokens(call_.student_k[layer], b, key_head),
                tokens(tq, b, teacher_head),
                tokens(tk, b, teacher_head / teacher_shared),
                mask(call_.query_mask, b),
                mask(call_.key_mask, b),
                dq,
                wanted ? sums : nullptr,
                call_.weight[head] * scale_ * (by_head_ ? by_head_[index] : 1),
                0};
      kernels_.head(shape_, of, workspace);
      values[index] = call_.weight[head] * scale_ * of.value;
    }
    if (wanted) kernels_.write_keys(shape_, sums, place(gradients_[call_.layers() + layer], b, key_head));
  }
  static QkTokens tokens(const Tensor& t, int64_t b, int64_t h) { return {place(t, b, h), t.stride(2), t.stride(3)}; }
  static void* place(const Tensor& t, int64_t b, int64_t h) {
    return (char*)t.mutable_data_ptr() + (b * t.stride(0) + h * t.stride(1)) * int64_t(t.element_size());
  }
  const bool* mask(const std::optional<Tensor>& of, int64_t b) const {
    return of ? (const bool*)of->const_data_ptr() + b * call_.length() : nullptr;
  }

  const QkCall& call_;
  const std::vector<Tensor>& gradients_;
  const double* by_head_;
  const QkKernels& kernels_;
  QkShape shape_;
  double scale_;
};

std::tuple<Tensor, std::vector<Tensor>> forward(const QkCall& call, bool gradient) {
  Tensor loss = zeros(call.student_q[0], call.loss_sizes(), call.loss_type());
  std::vector<Tensor> gradients;
  if (gradient) gradients = empty_gradients(call.with_gradient());
  const std::vector<double> values = QkHeads(call, gradients, 1, nullptr).run();
  const Reals losses(loss, call.is_double());
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i) call.per_head ? losses.set(i, values[i]) : void(total += values[i]);
  if (!call.per_head) losses.set(0, total);
  return {loss, gradients};
}

std::vector<Tensor> backward(const QkCall& call, const Tensor& grad_loss) {
  const std::vector<Tensor> gradients = empty_gradients(call.with_gradient());
  const std::vector<double> upstream = Reals(grad_loss, call.is_double()).all(grad_loss.numel());
  QkHeads(call, gradients, call.per_head ? 1 : upstream[0], call.per_head ? upstream.data() : nullptr).run();
  return gradients;
}

using Ops = QkOps<forward, backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("qk_distance", TORCH_BOX(&Ops::qk_distance));
  m.impl("qk_distance_backward", TORCH_BOX(&Ops::qk_distance_backward));
}

}  // namespace kdfast
