// A call of a divergence as the CPU kernels take it, row by row.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/divergence.h"
#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {

// A row's losses without alpha, each with its share of the reduction.
struct RowLoss {
  double divergence = 0, cross_entropy = 0;
  RowLoss& operator+=(const RowLoss& other) {
    divergence += other.divergence;
    cross_entropy += other.cross_entropy;
    return *this;
  }
};

class Rows {
 public:
  // `gradient`: null where none is wanted.
  Rows(const DivergenceCall& call, const Tensor* gradient, double upstream, bool keeps_state)
      : kernels(cpu_variant().kernels->divergence[call.kind]),
        count(call.rows()),
        call_(call),
        student_(memory_of(call, call.student, "student_logits")),
        teacher_(memory_of(call, call.teacher, "teacher_logits")),
        gradient_(gradient ? (char*)gradient->mutable_data_ptr() : nullptr),
        gradient_size_(gradient ? int64_t(gradient->element_size()) : 0),
        indices_(call.row_input(call.indices, "teacher_topk_indices")),
        mask_(call.row_input(call.mask, "mask")),
        weight_(call.row_input(call.weight, "weight")),
        temperature_(call.row_input(call.row_temperature, "temperature")),
        labels_(call.row_input(call.labels, "labels")),
        alpha_(call.distillation ? call.alpha : 1),
        per_temperature_(1 / call.temperature) {
    const int64_t last = call.leading();
    shape = {element_of(call.student.scalar_type()),
             element_of(call.teacher.scalar_type()),
             element_of((gradient ? *gradient : call.student).scalar_type()),
             call.columns,
             call.student.size(last),
             call.student.stride(last),
             call.teacher.stride(last),
             {call.mixing, 1 / double(call.vocabulary)},
             call.is_topk(),
             call.labels.has_value(),
             keeps_state,
             call.smoothing};
    check_labels();
    const auto [divisor, hard_divisor] = divisors();
    factor_ = divisor > 0 ? call.scale * upstream / divisor : 0;
    hard_factor_ = hard_divisor > 0 ? call.scale * upstream / hard_divisor : 0;
  }

  bool wants_gradient() const { return gradient_ != nullptr; }
  bool counted(int64_t row) const { return !mask_.data || ((const bool*)mask_.data)[mask_.offsets(row)]; }

  // Columns of the teacher that `describe` needs room for, per row.
  int64_t entries() const { return indices_.data ? call_.indices->size(call_.leading()) : 0; }

  void describe(int64_t row, DivergenceRow& r, TopkEntry* room) const {
    const double weight = weight_.data ? value(weight_, row) : 1;
    const double temperature = temperature_.data ? value(temperature_, row) : call_.temperature;
    const double per_temperature = temperature_.data ? 1 / temperature : per_temperature_;
    r.student = student_.row(row);
    r.teacher = teacher_.row(row);
    r.gradient = gradient_row(row);
    r.powers = nullptr;
    r.k = kLog2e * per_temperature;
    r.coefficient = factor_ * weight * (call_.distillation ? temperature * temperature : 1);
    r.factor = alpha_ * r.coefficient * per_temperature;
    if (indices_.data) find_entries(row, r, room);
    if (!shape.labels) return;
    const bool labelled = label(row) != call_.ignore_index;
    r.label = labelled ? label(row) - call_.vocab_start : -1;
    r.hard_coefficient = labelled ? hard_factor_ * weight : 0;
    r.hard_factor = (1 - alpha_) * r.hard_coefficient;
  }
  // A gradient that arrives per row.
  static void scale(DivergenceRow& r, double upstream) {
    r.factor *= upstream;
    r.hard_factor *= upstream;
  }

  // Where it is among these columns; else 0.
  double label_logit(const DivergenceRow& r) const {
    const bool here = shape.labels && r.label >= 0 && r.label < shape.columns;
    return here ? student_.at(r.student, r.label * shape.student_stride) : 0;
  }

  RowLoss loss(const DivergenceRow& r) const {
    if (!shape.labels || r.hard_coefficient == 0) return {r.coefficient * r.loss, 0};
    const RowState<double>& s = r.state;
    double cross_entropy = r.log_sum_one + s.max_s - (1 - call_.smoothing) * s.label;
    if (call_.smoothing != 0) cross_entropy -= call_.smoothing * s.total / double(call_.vocabulary);
    return {r.coefficient * r.loss, r.hard_coefficient * cross_entropy};
  }
  double total(const RowLoss& loss) const {
    return shape.labels ? alpha_ * loss.divergence + (1 - alpha_) * loss.cross_entropy : alpha_ * loss.divergence;
  }

  // The padding beyond vocab_size, and everything of a masked row.
  void clear_gradient(int64_t row, int64_t from) const {
    if (!gradient_ || from == shape.gradient_columns) return;
    std::memset(gradient_row(row) + from * gradient_size_, 0, (shape.gradient_columns - from) * gradient_size_);
  }

  DivergenceShape shape;
  const DivergenceKernels& kernels;
  int64_t count;

 private:
  struct Memory {
    const char* data;
    RowOffsets offsets;
    ScalarType type;
    int64_t size;  // of an element

    const void* row(int64_t row) const { return data + offsets(row) * size; }
    double at(const void* row, int64_t element) const {
      const char* from = (const char*)row + element * size;
      if (type == ScalarType::Double) return *(const double*)from;
      if (type == ScalarType::Float) return *(const float*)from;
      if (type == ScalarType::Half) return float(*(const torch::headeronly::Half*)from);
      return float(*(const torch::headeronly::BFloat16*)from);
    }
  };
  static Memory memory_of(const DivergenceCall& call, const Tensor& t, const char* argument) {
    return {(const char*)t.const_data_ptr(), call.offsets_of(t, argument), t.scalar_type(), int64_t(t.element_size())};
  }

  char* gradient_row(int64_t row) const {
    return gradient_ ? gradient_ + row * shape.gradient_columns * gradient_size_ : nullptr;
  }

  // The teacher's columns of these logits. Log-probabilities of -inf are no columns; a column that comes twice makes
  // the row NaN.
  void find_entries(int64_t row, DivergenceRow& r, TopkEntry* room) const {
    const int64_t* indices = (const int64_t*)indices_.data + indices_.offsets(row);
    const int64_t stride = call_.indices->stride(call_.leading());
    int64_t n = 0;
    for (int64_t e = 0; e < entries(); ++e) {
      const double log_probability = teacher_.at(r.teacher, e * shape.teacher_stride);
      const int64_t column = indices[e * stride] - call_.vocab_start;
      if (log_probability == -INFINITY || column < 0 || column >= shape.columns) continue;
      room[n++] = {column, counted_log_probability(log_probability)};
    }
    std::sort(room, room + n, [](const TopkEntry& a, const TopkEntry& b) { return a.column < b.column; });
    for (int64_t e = 1; e < n; ++e) {
      if (room[e].column == room[e - 1].column) room[e].log_probability = NAN;
    }
    r.entries = room;
    r.entry_count = n;
  }

  double value(const RowInput& input, int64_t row) const {
    const int64_t at = input.offsets(row);
    return call_.is_double() ? ((const double*)input.data)[at] : ((const float*)input.data)[at];
  }
  int64_t label(int64_t row) const { return ((const int64_t*)labels_.data)[labels_.offsets(row)]; }

  // Labels of rows that count. Python looks at them too, but not in compiled code.
  void check_labels() const {
    if (!labels_.data) return;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t it = label(row);
      if ((it >= 0 && it < call_.vocabulary) || it == call_.ignore_index || !counted(row)) continue;
      STD_TORCH_CHECK(false, call_.op(), ": labels: expected 0 to ", call_.vocabulary - 1, ", or ignore_index ",
                      call_.ignore_index, ", got ", it, " in row ", row);
    }
  }

  // The divergence's and the cross-entropy's.
  std::pair<double, double> divisors() const {
    if (!call_.divisor) return {1, 1};
    const Reals given(*call_.divisor, call_.is_double());
    return {given.get(0), given.get(call_.divisor->numel() - 1)};
  }

  const DivergenceCall& call_;
  Memory student_, teacher_;
  char* gradient_;
  int64_t gradient_size_;
  RowInput indices_, mask_, weight_, temperature_, labels_;
  double alpha_, per_temperature_, factor_, hard_factor_;
};

}  // namespace kdfast
