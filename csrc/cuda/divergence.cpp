// The divergences on the GPU: two launches, the rows and then the sum of their losses (csrc/cuda/rows.cu); a masked
// mean counts its rows first. Nothing waits for the device, nothing is read back: safe in CUDA graphs by construction.
#include "common/divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/divergence.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

using Launch = void (*)(const char* op, const Target& target, const RowPlan& plan, DivergenceArgs args);

Element element_of(ScalarType t) {
  if (t == ScalarType::BFloat16) return Element::bf16;
  return t == ScalarType::Half ? Element::f16 : Element::f32;
}

void check(const DivergenceCall& call) {
  call.check();
  STD_TORCH_CHECK(!call.is_double(), call.op,
                  ": logits: expected float32, bfloat16 or float16 on the GPU, got float64");
  STD_TORCH_CHECK(call.columns < int64_t(1) << 31, call.op, ": logits: expected fewer than 2^31 columns, got ",
                  call.columns);
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Whether row by row the addresses of `a` and `b` have the same remainder by 16.
bool misaligned_alike(const Tensor& a, const Tensor& b) {
  const int64_t size = int64_t(a.element_size());
  if ((uintptr_t(a.const_data_ptr()) - uintptr_t(b.const_data_ptr())) % 16) return false;
  for (int64_t d = 0; d + 1 < a.dim(); ++d) {
    if (a.size(d) > 1 && (a.stride(d) - b.stride(d)) * size % 16) return false;
  }
  return true;
}

bool rows_aligned(const Tensor& t) {
  if (uintptr_t(t.const_data_ptr()) % 16) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) * int64_t(t.element_size()) % 16) return false;
  }
  return true;
}

RowCase case_of(const DivergenceCall& call, const Tensor* gradient, bool given) {
  const Tensor &s = call.student, &t = call.teacher;
  const int64_t last = call.leading();
  RowCase c = {call.rows(), call.columns, int(s.element_size()), false, false, false, gradient != nullptr, given};
  c.same_elements = s.scalar_type() == t.scalar_type() && s.stride(last) == 1 && t.stride(last) == 1;
  c.alike = c.same_elements && misaligned_alike(s, t) && (!gradient || misaligned_alike(s, *gradient));
  c.aligned = c.alike && rows_aligned(s) && call.columns * c.element_size % 16 == 0;
  return c;
}

RowNumbers numbers_of(const DivergenceCall& call, const std::optional<Tensor>& t, const char* argument) {
  const RowInput input = call.row_input(t, argument);
  return {(const float*)input.data, input.offsets};
}

DivergenceArgs args_of(const DivergenceCall& call) {
  DivergenceArgs args = {};
  const int64_t last = call.leading();
  args.student_type = element_of(call.student.scalar_type());
  args.teacher_type = element_of(call.teacher.scalar_type());
  args.student = call.student.const_data_ptr();
  args.teacher = call.teacher.const_data_ptr();
  args.student_rows = call.offsets_of(call.student, "student_logits");
  args.teacher_rows = call.offsets_of(call.teacher, "teacher_logits");
  args.student_stride = call.student.stride(last);
  args.teacher_stride = call.teacher.stride(last);
  args.rows = call.rows();
  args.columns = call.columns;
  args.gradient_columns = call.student.size(last);
  args.temperature = float(call.temperature);
  args.factor = float(call.scale);
  const RowInput mask = call.row_input(call.mask, "mask");
  args.mask = {(const bool*)mask.data, mask.offsets};
  args.row_temperature = numbers_of(call, call.row_temperature, "temperature");
  args.weight = numbers_of(call, call.weight, "weight");
  return args;
}

// Puts the reduction's denominator into the factor, or where it is known only on the device, beside it. `count` keeps
// the memory of a counted mask alive until the launches are queued.
void divide(const DivergenceCall& call, const Target& target, DivergenceArgs& args, std::optional<Tensor>& count) {
  if (call.reduction == Reduction::batchmean) args.factor = float(call.scale / double(call.student.size(0)));
  if (call.reduction != Reduction::mean) return;
  if (call.num_items) {
    args.denominator = (const float*)call.num_items->const_data_ptr();
  } else if (args.mask.data) {
    count = new_output(call.student, {1}, ScalarType::Float);
    args.denominator = (const float*)count->const_data_ptr();
    launch_count(call.op, target, args.mask, args.rows, (float*)count->mutable_data_ptr());
  } else {
    args.factor = float(call.scale / double(args.rows));
  }
}

void launch_rows(const DivergenceCall& call, const Target& target, Launch launch, const DivergenceArgs& args,
                 const Tensor* gradient) {
  const RowCase c = case_of(call, gradient, args.given != nullptr);
  launch(call.op, target, plan_rows(c, limits_of(call.op, target)), args);
}

std::tuple<Tensor, Tensor> forward(const DivergenceCall& call, Save save, Launch launch) {
  check(call);
  const bool per_row = call.reduction == Reduction::none;
  std::vector<int64_t> sizes = call.leading_sizes();
  Tensor loss = new_output(call.student, per_row ? sizes : std::vector<int64_t>{}, ScalarType::Float);
  sizes.push_back(kRowStateSize);
  Tensor saved =
      save == Save::gradient
          ? new_output(call.student, sizes_of(call.student), call.student.scalar_type())
          : new_output(call.student, save == Save::state ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  if (call.rows() == 0 || call.columns == 0) {
    torch::stable::zero_(loss);
    torch::stable::zero_(saved);
    return {loss, saved};
  }
  const Target target = target_of(call.op, call.student);
  DivergenceArgs args = args_of(call);
  std::optional<Tensor> count;
  divide(call, target, args, count);
  const Tensor losses = per_row ? loss : new_output(call.student, {args.rows}, ScalarType::Float);
  args.losses = (float*)losses.mutable_data_ptr();
  if (save == Save::state) args.states = (float*)saved.mutable_data_ptr();
  if (save == Save::gradient) args.gradient = saved.mutable_data_ptr();
  launch_rows(call, target, launch, args, save == Save::gradient ? &saved : nullptr);
  if (!per_row) launch_sum(call.op, target, args.losses, args.rows, (float*)loss.mutable_data_ptr());
  return {loss, saved};
}

Tensor backward(const DivergenceCall& call, const Tensor& grad_loss, const Tensor& state, Launch launch) {
  check(call);
  const bool per_row = call.reduction == Reduction::none;
  check_device(call.op, "grad_loss", grad_loss, call.student);
  check_device(call.op, "state", state, call.student);
  check_dtype(call.op, "grad_loss", grad_loss, ScalarType::Float);
  check_dtype(call.op, "state", state, ScalarType::Float);
  STD_TORCH_CHECK(state.is_contiguous() && state.numel() == call.rows() * kRowStateSize, call.op, ": state: expected ",
                  kRowStateSize, " numbers per row, got ", shape_of(state));
  if (per_row) check_leading(call.op, "grad_loss", grad_loss, call.student, call.leading());
  STD_TORCH_CHECK(per_row || grad_loss.numel() == 1, call.op, ": grad_loss: expected one number, got ",
                  shape_of(grad_loss));
  Tensor gradient = new_output(call.student, sizes_of(call.student), call.student.scalar_type());
  if (call.rows() == 0 || call.columns == 0) return torch::stable::zero_(gradient);
  const Target target = target_of(call.op, call.student);
  DivergenceArgs args = args_of(call);
  std::optional<Tensor> count;
  divide(call, target, args, count);
  args.upstream = {(const float*)grad_loss.const_data_ptr(), {}};
  if (per_row) args.upstream.offsets = call.offsets_of(grad_loss, "grad_loss");
  args.given = (const float*)state.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  launch_rows(call, target, launch, args, &gradient);
  return gradient;
}

std::tuple<Tensor, Tensor> kl_div(Tensor student, Tensor teacher, std::optional<Tensor> row_temperature,
                                  std::optional<Tensor> mask, std::optional<Tensor> weight,
                                  std::optional<Tensor> num_items, double temperature, int64_t columns,
                                  int64_t reduction, double scale, int64_t save) {
  return forward({"kl_div", student, teacher, row_temperature, mask, weight, num_items, temperature, columns,
                  Reduction(reduction), scale},
                 Save(save), launch_kl_div);
}

Tensor kl_div_backward(Tensor grad_loss, Tensor state, Tensor student, Tensor teacher,
                       std::optional<Tensor> row_temperature, std::optional<Tensor> mask, std::optional<Tensor> weight,
                       std::optional<Tensor> num_items, double temperature, int64_t columns, int64_t reduction,
                       double scale) {
  return backward({"kl_div", student, teacher, row_temperature, mask, weight, num_items, temperature, columns,
                   Reduction(reduction), scale},
                  grad_loss, state, launch_kl_div);
}

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("kl_div", TORCH_BOX(&kl_div));
  m.impl("kl_div_backward", TORCH_BOX(&kl_div_backward));
}

}  // namespace
}  // namespace kdfast::cuda
