// The divergences on the GPU: two launches, the rows and then the sum of their losses (csrc/cuda/reduce.cu), which is
// two itself where rows are very many. Nothing waits for the device, nothing is read back: safe in CUDA graphs by
// construction.
#include "common/divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/divergence.h"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

const DivergenceKernels& kernels_of(int64_t kind) {
#define KDFAST_KERNELS(name, Terms) divergence_kernels_of<Terms>(),
  static const DivergenceKernels kernels[] = {KDFAST_DIVERGENCES(KDFAST_KERNELS)};
#undef KDFAST_KERNELS
  return kernels[kind];
}

void check(const DivergenceCall& call) {
  call.check();
  STD_TORCH_CHECK(!call.is_double(), call.op(),
                  ": logits: expected float32, bfloat16 or float16 on the GPU, got float64");
  STD_TORCH_CHECK(call.columns < int64_t(1) << 31, call.op(), ": logits: expected fewer than 2^31 columns, got ",
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

// The same of groups of four columns, of any dtypes.
bool fours_alike(const Tensor& a, const Tensor& b) {
  auto first = [](const Tensor& t) { return int64_t(uintptr_t(t.const_data_ptr()) / t.element_size()); };
  if ((first(a) - first(b)) % 4) return false;
  for (int64_t d = 0; d + 1 < a.dim(); ++d) {
    if (a.size(d) > 1 && (a.stride(d) - b.stride(d)) % 4) return false;
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

// Whether a gradient of another dtype takes 8-byte stores where its logits are loaded 16 bytes at a time.
bool takes_halves(const DivergenceCall& call, const Tensor& gradient) {
  return gradient.scalar_type() != ScalarType::Float && call.student.scalar_type() == ScalarType::Float &&
         rows_aligned(call.student) && uintptr_t(gradient.const_data_ptr()) % 8 == 0 &&
         call.student.size(call.leading()) % 4 == 0;
}

RowCase case_of(const DivergenceCall& call, const Tensor* gradient, bool given, bool second_look) {
  const Tensor &s = call.student, &t = call.teacher;
  const int64_t last = call.leading();
  RowCase c = {};
  c.rows = call.rows();
  c.columns = call.columns;
  c.element_size = int(s.element_size());
  // Kernels of 16-bit logits write gradients like these.
  const bool writable = !gradient || gradient->scalar_type() == s.scalar_type() || s.scalar_type() == ScalarType::Float;
  auto suits = [&](const Tensor& g) {
    return g.scalar_type() == s.scalar_type() ? misaligned_alike(s, g) : takes_halves(call, g);
  };
  c.again = gradient || second_look;
  c.given = given;
  c.topk = call.is_topk();
  if (c.topk) {
    c.alike = writable && s.stride(last) == 1 && (!gradient || suits(*gradient));
    return c;
  }
  const bool neighbours = s.stride(last) == 1 && t.stride(last) == 1;
  c.same_elements = writable && neighbours && s.scalar_type() == t.scalar_type();
  c.alike = c.same_elements && misaligned_alike(s, t) && (!gradient || suits(*gradient));
  c.aligned = c.alike && rows_aligned(s) && call.columns * c.element_size % 16 == 0;
  c.widened = neighbours && !c.same_elements && fours_alike(s, t) && (!gradient || fours_alike(s, *gradient));
  if (c.widened) c.element_size = 4;
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
  args.gradient_type = args.student_type;
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
  args.settings = {float(call.mixing), 1 / float(call.vocabulary)};
  args.distillation = call.distillation;
  args.divergence_share = call.distillation ? float(call.alpha) : 1.f;
  args.cross_entropy_share = float(1 - call.alpha);
  args.scale = float(call.scale);
  args.smoothing = float(call.smoothing);
  args.even_smoothing = float(call.smoothing / double(call.vocabulary));
  if (call.indices) {
    const RowInput indices = call.row_input(call.indices, "teacher_topk_indices");
    const int64_t stride = call.indices->stride(last), count = call.indices->size(last);
    args.indices = {(const int64_t*)indices.data, indices.offsets, stride, count, call.vocabulary, call.vocab_start};
  }
  const RowInput mask = call.row_input(call.mask, "mask"), labels = call.row_input(call.labels, "labels");
  args.mask = {(const bool*)mask.data, mask.offsets};
  args.labels = {(const int64_t*)labels.data, labels.offsets, call.ignore_index, call.vocabulary, call.vocab_start};
  args.row_temperature = numbers_of(call, call.row_temperature, "temperature");
  args.weight = numbers_of(call, call.weight, "weight");
  if (call.divisor) {
    args.divergence_divisor = (const float*)call.divisor->const_data_ptr();
    args.cross_entropy_divisor = args.divergence_divisor + (call.divisor->numel() - 1);
  }
  return args;
}

void launch_rows(const DivergenceCall& call, const Target& target, const DivergenceArgs& args, const Tensor* gradient) {
  const DivergenceKernels& kernels = kernels_of(call.kind);
  const RowCase c = case_of(call, gradient, args.given != nullptr, kernels.second_look);
  const DeviceLimits limits = limits_of(call.op(), target);
  auto has_room = [&](const RowPlan& p) { return kernels.has_room(call.op(), target, p, args.student_type); };
  const RowPlan plan = plan_rows(c, limits, has_room);
  STD_TORCH_CHECK(plan.shared <= limits.shared_per_block, call.op(), ": logits: expected fewer columns, got ",
                  call.columns);
  kernels.launch(call.op(), target, plan, args);
}

// Nothing to look at. A shard of no columns has rows all the same: those of the others.
bool is_empty(const DivergenceCall& call) { return call.rows() == 0 || call.vocabulary == 0; }

using Results = std::tuple<Tensor, Tensor, Tensor>;

// Not initialized: loss, components and what is saved for the backward.
Results new_results(const DivergenceCall& call, Save save, const Tensor* into) {
  auto of = [&](const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
    return new_output(call.student, sizes, dtype);
  };
  Tensor saved = into                     ? *into
                 : save == Save::gradient ? of(sizes_of(call.student), call.student.scalar_type())
                 : save == Save::state    ? of(call.leading_sizes_and(kRowStateSize))
                                          : of({0});
  return {of(call.loss_sizes()), of(call.component_sizes()), saved};
}

// `into`: where the gradient goes, if not into memory of its own.
Results forward(const DivergenceCall& call, const std::optional<Tensor>& state, Known known, Save save,
                const Tensor* into) {
  check(call);
  call.check_given(state, known);
  if (into) call.check_gradient(*into);
  const Results results = new_results(call, save, into);
  const auto& [loss, components, saved] = results;
  if (is_empty(call)) {
    for (Tensor t : {loss, components, saved}) torch::stable::zero_(t);
    return results;
  }
  const Target target = target_of(call.op(), call.student);
  DivergenceArgs args = args_of(call);
  const Tensor losses = call.per_row ? loss : new_output(call.student, {args.rows}, ScalarType::Float);
  const Tensor both =
      call.per_row || !call.distillation ? components : new_output(call.student, {args.rows, 2}, ScalarType::Float);
  args.losses = (float*)losses.mutable_data_ptr();
  if (call.distillation) args.components = (float*)both.mutable_data_ptr();
  if (save == Save::state) args.states = (float*)saved.mutable_data_ptr();
  if (save == Save::gradient) args.gradient = saved.mutable_data_ptr();
  if (into) args.gradient_type = element_of(into->scalar_type());
  args.known = known;
  if (known != Known::nothing) args.given = (const float*)state->const_data_ptr();
  launch_rows(call, target, args, save == Save::gradient ? &saved : nullptr);
  if (!call.per_row) {
    const Tensor parts = new_output(call.student, {3 * sum_parts(args.rows)}, ScalarType::Double);
    launch_sum(call.op(), target, args.losses, args.components, args.rows, (float*)loss.mutable_data_ptr(),
               (float*)components.mutable_data_ptr(), (double*)parts.mutable_data_ptr());
  }
  return results;
}

Tensor backward(const DivergenceCall& call, const Tensor& grad_loss, const Tensor& state) {
  check(call);
  call.check_upstream(grad_loss);
  call.check_state(state);
  Tensor gradient = new_output(call.student, sizes_of(call.student), call.student.scalar_type());
  if (is_empty(call)) return torch::stable::zero_(gradient);
  const Target target = target_of(call.op(), call.student);
  DivergenceArgs args = args_of(call);
  args.upstream = {(const float*)grad_loss.const_data_ptr(), {}};
  if (call.per_row) args.upstream.offsets = call.offsets_of(grad_loss, "grad_loss");
  args.known = Known::everything;
  args.given = (const float*)state.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  launch_rows(call, target, args, &gradient);
  return gradient;
}

Tensor divergence_referred(Tensor state, Tensor maxima, std::optional<Tensor> row_temperature, int64_t kind,
                           double temperature) {
  const StatesCall call{state, maxima, row_temperature, kind, temperature};
  call.check();
  const Tensor result = new_output(state, sizes_of(state), ScalarType::Float);
  if (call.rows() == 0) return result;
  const RowInput temperatures = call.temperatures();
  kernels_of(kind).refer(target_of("divergence_referred", state), (const float*)state.const_data_ptr(),
                         (const float*)maxima.const_data_ptr(), {(const float*)temperatures.data, temperatures.offsets},
                         float(temperature), call.rows(), (float*)result.mutable_data_ptr());
  return result;
}

using Ops = DivergenceOps<forward, backward>;

STABLE_TORCH_LIBRARY_IMPL(KDFAST_CUDA_NAMESPACE, KDFAST_CUDA_KEY, m) {
  m.impl("divergence", TORCH_BOX(&Ops::divergence));
  m.impl("divergence_into", TORCH_BOX(&Ops::divergence_into));
  m.impl("divergence_backward", TORCH_BOX(&Ops::divergence_backward));
  m.impl("divergence_referred", TORCH_BOX(&divergence_referred));
}

}  // namespace

std::vector<NamedKernel> divergence_kernels() {
  std::vector<NamedKernel> all;
  for (int64_t kind = 0; kind < int64_t(Divergence::count); ++kind) {
    for (const NamedKernel& kernel : kernels_of(kind).list()) {
      all.push_back({std::string(facts_of(Divergence(kind)).name) + ", " + kernel.name, kernel.function});
    }
  }
  return all;
}

}  // namespace kdfast::cuda
