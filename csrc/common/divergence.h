// The arguments of a divergence operator, checked and laid out row by row: shared by the CPU and CUDA launchers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/divergence_facts.h"
#include "common/row_offsets.h"

namespace kdfast {

// What the forward leaves for the backward: nothing, the state of every row, or the gradient for an upstream of 1.
enum class Save : int64_t { nothing, state, gradient };

// A value per row, expanded to the logits' leading dimensions: mask, weight, temperature, labels.
struct RowInput {
  const void* data = nullptr;  // null: not given
  RowOffsets offsets;
};

// The operator that users know a divergence by.
inline const char* divergence_name(Divergence kind) {
  return facts_of(kind).topk ? "topk_kl_div" : facts_of(kind).name;
}

// In the order of the schema (csrc/library.cpp).
struct DivergenceCall {
  Tensor student, teacher;
  // The teacher's columns, where it has some of them only: teacher holds their log-probabilities.
  std::optional<Tensor> indices;
  std::optional<Tensor> labels, row_temperature, mask, weight;
  std::optional<Tensor> divisor;  // of both parts, or [2] of divergence and cross-entropy; 0 counts nothing
  int64_t kind;                   // of Divergence
  double mixing, temperature;
  int64_t columns;                  // that count, of these logits
  int64_t vocabulary, vocab_start;  // of all shards together, and where this one starts
  double scale;                     // of the result
  bool per_row;                     // no sum over the rows
  bool distillation;                // kd_loss: the divergence counts alpha * T^2, the cross-entropy 1 - alpha
  double alpha, smoothing;
  int64_t ignore_index;

  const char* op() const { return distillation ? "kd_loss" : divergence_name(Divergence(kind)); }
  bool is_topk() const { return facts_of(Divergence(kind)).topk; }
  int64_t leading() const { return student.dim() - 1; }
  std::vector<int64_t> leading_sizes() const { return {student.sizes().begin(), student.sizes().begin() + leading()}; }
  std::vector<int64_t> leading_sizes_and(int64_t last) const {
    std::vector<int64_t> sizes = leading_sizes();
    sizes.push_back(last);
    return sizes;
  }
  // The loss's sizes, and those of kd_loss's components (other operators have none).
  std::vector<int64_t> loss_sizes() const { return per_row ? leading_sizes() : std::vector<int64_t>{}; }
  std::vector<int64_t> component_sizes() const {
    if (!distillation) return {0};
    return per_row ? leading_sizes_and(2) : std::vector<int64_t>{2};
  }
  int64_t rows() const {
    int64_t n = 1;
    for (int64_t d = 0; d < leading(); ++d) n *= student.size(d);
    return n;
  }
  bool is_double() const { return student.scalar_type() == ScalarType::Double; }
  ScalarType loss_type() const { return is_double() ? ScalarType::Double : ScalarType::Float; }

  RowOffsets offsets_of(const Tensor& t, const char* argument) const {
    RowOffsets offsets;
    STD_TORCH_CHECK(row_offsets(t.sizes().data(), t.strides().data(), leading(), &offsets), op(), ": ", argument,
                    ": expected at most ", RowOffsets::kMax, " leading dimensions that memory keeps apart, got ",
                    shape_of(t));
    return offsets;
  }
  RowInput row_input(const std::optional<Tensor>& t, const char* argument) const {
    return t ? RowInput{t->const_data_ptr(), offsets_of(*t, argument)} : RowInput{};
  }

  void check() const {
    STD_TORCH_CHECK(kind >= 0 && kind < int64_t(Divergence::count), "divergence: kind: expected 0 to ",
                    int64_t(Divergence::count) - 1, ", got ", kind);
    check_logits();
    check_rows(mask, "mask", ScalarType::Bool);
    check_rows(weight, "weight", loss_type());
    check_rows(row_temperature, "temperature", loss_type());
    check_rows(labels, "labels", ScalarType::Long);
    STD_TORCH_CHECK(!labels || distillation, op(), ": labels: expected none, got some");
    check_divisor();
  }
  // Where the gradient goes that is asked for. On the CPU this may be the student's own memory.
  void check_gradient(const Tensor& gradient) const {
    check_device(op(), "gradient", gradient, student);
    const ScalarType dtype = gradient.scalar_type();
    STD_TORCH_CHECK(gradient.is_contiguous() && gradient.numel() == student.numel() &&
                        (is_double() ? dtype == ScalarType::Double : is_short_float(dtype)),
                    op(), ": gradient: expected contiguous memory of the student's size, got ", shape_of(gradient));
  }
  void check_given(const std::optional<Tensor>& state, Known known) const {
    STD_TORCH_CHECK(state || known == Known::nothing, op(), ": state: expected one, of which something is known");
    if (state) check_state(*state);
  }
  // A state that is given, or asked for in the backward.
  void check_state(const Tensor& state) const {
    check_device(op(), "state", state, student);
    check_dtype(op(), "state", state, loss_type());
    STD_TORCH_CHECK(state.is_contiguous() && state.numel() == rows() * kRowStateSize, op(), ": state: expected ",
                    kRowStateSize, " numbers per row, got ", shape_of(state));
  }
  void check_upstream(const Tensor& grad_loss) const {
    check_device(op(), "grad_loss", grad_loss, student);
    check_dtype(op(), "grad_loss", grad_loss, loss_type());
    if (per_row) return check_leading(op(), "grad_loss", grad_loss, student, leading());
    STD_TORCH_CHECK(grad_loss.numel() == 1, op(), ": grad_loss: expected one number, got ", shape_of(grad_loss));
  }

 private:
  void check_divisor() const {
    if (!divisor) return;
    check_device(op(), "divisor", *divisor, student);
    check_dtype(op(), "divisor", *divisor, loss_type());
    STD_TORCH_CHECK(divisor->numel() == 1 || (divisor->numel() == 2 && divisor->is_contiguous()), op(),
                    ": divisor: expected one number or two, got ", shape_of(*divisor));
  }
  void check_indices() const {
    STD_TORCH_CHECK(indices.has_value() == is_topk(), op(), ": indices: expected beside top-k log-probabilities only");
    if (!indices) return;
    check_device(op(), "teacher_topk_indices", *indices, student);
    check_dtype(op(), "teacher_topk_indices", *indices, ScalarType::Long);
    bool same = indices->dim() == teacher.dim();
    for (int64_t d = 0; same && d < teacher.dim(); ++d) same = indices->size(d) == teacher.size(d);
    STD_TORCH_CHECK(same, op(), ": teacher_topk_indices: expected ", shape_of(teacher), ", got ", shape_of(*indices));
  }
  void check_logits() const {
    const ScalarType dtype = student.scalar_type(), other = teacher.scalar_type();
    STD_TORCH_CHECK((is_short_float(dtype) && is_short_float(other)) || (is_double() && other == dtype), op(),
                    ": logits: expected float32, bfloat16 or float16 each, or float64 both, got ",
                    torch::headeronly::toString(dtype), " and ", torch::headeronly::toString(other));
    STD_TORCH_CHECK(student.dim() >= 1 && teacher.dim() == student.dim(), op(), ": teacher_logits: expected ",
                    student.dim(), " dimensions, got ", teacher.dim());
    for (int64_t d = 0; d < leading(); ++d) {
      STD_TORCH_CHECK(student.size(d) == teacher.size(d), op(), ": teacher_logits: expected the leading dimensions of ",
                      shape_of(student), ", got ", shape_of(teacher));
    }
    check_indices();
    STD_TORCH_CHECK(
        columns >= 0 && columns <= student.size(leading()) && (is_topk() || columns <= teacher.size(leading())), op(),
        ": vocab_size: expected at most the logits' widths, got ", columns);
    STD_TORCH_CHECK(vocab_start >= 0 && vocab_start + columns <= vocabulary, op(), ": vocab_size: expected at least ",
                    vocab_start + columns, " for columns up to there, got ", vocabulary);
    check_device(op(), "teacher_logits", teacher, student);
  }
  void check_rows(const std::optional<Tensor>& t, const char* argument, ScalarType expected) const {
    if (!t) return;
    check_device(op(), argument, *t, student);
    check_dtype(op(), argument, *t, expected);
    check_leading(op(), argument, *t, student, leading());
  }
};

// The rows' states of a shard [..., kRowStateSize], and the maxima [2, ...] of the student's and the teacher's logits
// over all shards.
struct StatesCall {
  Tensor state, maxima;
  std::optional<Tensor> row_temperature;
  int64_t kind;  // of Divergence
  double temperature;

  int64_t rows() const { return state.numel() / kRowStateSize; }
  bool is_double() const { return state.scalar_type() == ScalarType::Double; }
  RowInput temperatures() const {
    RowInput input;
    if (!row_temperature) return input;
    input.data = row_temperature->const_data_ptr();
    const auto& t = *row_temperature;
    STD_TORCH_CHECK(row_offsets(t.sizes().data(), t.strides().data(), t.dim(), &input.offsets),
                    "divergence_referred: temperature: expected at most ", RowOffsets::kMax,
                    " dimensions that memory keeps apart, got ", shape_of(t));
    return input;
  }
  void check() const {
    const char* op = "divergence_referred";
    STD_TORCH_CHECK(kind >= 0 && kind < int64_t(Divergence::count), op, ": kind: expected 0 to ",
                    int64_t(Divergence::count) - 1, ", got ", kind);
    const int64_t last = state.dim() - 1;
    STD_TORCH_CHECK(last >= 0 && state.size(last) == kRowStateSize && state.is_contiguous() &&
                        (is_double() || state.scalar_type() == ScalarType::Float),
                    op, ": state: expected [..., ", kRowStateSize, "], float32 or float64, contiguous, got ",
                    shape_of(state));
    check_device(op, "maxima", maxima, state);
    check_dtype(op, "maxima", maxima, state.scalar_type());
    STD_TORCH_CHECK(maxima.is_contiguous() && maxima.numel() == 2 * rows(), op, ": maxima: expected two per row, got ",
                    shape_of(maxima));
    if (!row_temperature) return;
    check_device(op, "temperature", *row_temperature, state);
    check_dtype(op, "temperature", *row_temperature, state.scalar_type());
    check_leading(op, "temperature", *row_temperature, state, last);
  }
};

// The raw operators on a backend, `Part` being a DivergenceCall's. `forward` takes the memory of the gradient last,
// null for memory of its own.
template <auto forward, auto backward, class... Part>
struct DivergenceOpsOf {
  static std::tuple<Tensor, Tensor, Tensor> divergence(Part... part, std::optional<Tensor> state, int64_t known,
                                                       int64_t save) {
    return forward({part...}, state, Known(known), Save(save), nullptr);
  }
  static std::tuple<Tensor, Tensor> divergence_into(Tensor gradient, Part... part, std::optional<Tensor> state,
                                                    int64_t known) {
    const auto [loss, components, saved] = forward({part...}, state, Known(known), Save::gradient, &gradient);
    return {loss, components};
  }
  static Tensor divergence_backward(Tensor grad_loss, Tensor state, Part... part) {
    return backward({part...}, grad_loss, state);
  }
};
template <auto forward, auto backward>
using DivergenceOps =
    DivergenceOpsOf<forward, backward, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, int64_t,
                    double, double, int64_t, int64_t, int64_t, double, bool, bool, double, double, int64_t>;

}  // namespace kdfast
