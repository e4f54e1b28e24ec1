// The divergences on the CPU: rows shared among the threads, each row by the kernels of the processor's variant.
//
// Rows are summed in chunks of a size that the shape alone decides, in double, and the chunks in order: the number of
// threads changes no sum, but for a few wide rows whose columns the threads share, where doubles merge in pieces.
#include "common/divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>

#include "cpu/memory.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunkElements = 1 << 15;  // logits a chunk of rows holds, at least: enough to pay for sharing it out
constexpr int64_t kChunkRows = 256;
constexpr int64_t kSegment = 8 * kBlock;  // columns of a piece, where single rows are shared among threads

Element element_of(ScalarType t) {
  if (t == ScalarType::Double) return Element::f64;
  if (t == ScalarType::BFloat16) return Element::bf16;
  return t == ScalarType::Half ? Element::f16 : Element::f32;
}

// The rows of a call as the kernels take them.
class Rows {
 public:
  Rows(const DivergenceCall& call, Tensor* gradient, double upstream)
      : kernels(*cpu_variant().divergence),
        count(call.rows()),
        call_(call),
        student_offsets_(call.offsets_of(call.student, "student_logits")),
        teacher_offsets_(call.offsets_of(call.teacher, "teacher_logits")),
        mask_(call.row_input(call.mask, "mask")),
        weight_(call.row_input(call.weight, "weight")),
        temperature_(call.row_input(call.row_temperature, "temperature")) {
    const int64_t last = call.leading();
    shape = {element_of(call.student.scalar_type()),
             element_of(call.teacher.scalar_type()),
             call.columns,
             call.student.size(last),
             call.student.stride(last),
             call.teacher.stride(last)};
    student_ = (const char*)call.student.const_data_ptr();
    teacher_ = (const char*)call.teacher.const_data_ptr();
    student_size_ = int64_t(call.student.element_size());
    teacher_size_ = int64_t(call.teacher.element_size());
    gradient_ = gradient ? (char*)gradient->mutable_data_ptr() : nullptr;
    per_temperature_ = 1 / call.temperature;
    factor_ = call.scale * upstream;
    const double items = denominator();
    if (call.reduction != Reduction::none) factor_ = items > 0 ? factor_ / items : 0;
  }

  bool wants_gradient() const { return gradient_ != nullptr; }
  bool counted(int64_t row) const { return !mask_.data || ((const bool*)mask_.data)[mask_.offsets(row)]; }
  double weight(int64_t row) const { return weight_.data ? value(weight_, row) : 1; }

  void describe(int64_t row, DivergenceRow& r) const {
    const double per_temperature = temperature_.data ? 1 / value(temperature_, row) : per_temperature_;
    r.student = student_ + student_offsets_(row) * student_size_;
    r.teacher = teacher_ + teacher_offsets_(row) * teacher_size_;
    r.gradient = gradient_row(row);
    r.k = kLog2e * per_temperature;
    r.coefficient = factor_ * weight(row);
    r.factor = r.coefficient * per_temperature;
  }

  // Of a masked row everything, of others the padding beyond vocab_size.
  void clear_gradient(int64_t row, int64_t from) const {
    if (!gradient_ || from == shape.gradient_columns) return;
    std::memset(gradient_row(row) + from * student_size_, 0, (shape.gradient_columns - from) * student_size_);
  }

  DivergenceShape shape;
  const DivergenceKernels& kernels;
  int64_t count;

 private:
  char* gradient_row(int64_t row) const {
    return gradient_ ? gradient_ + row * shape.gradient_columns * student_size_ : nullptr;
  }
  double value(const RowInput& input, int64_t row) const {
    const int64_t at = input.offsets(row);
    return call_.is_double() ? ((const double*)input.data)[at] : ((const float*)input.data)[at];
  }
  double denominator() const {
    if (call_.reduction == Reduction::sum || call_.reduction == Reduction::none) return 1;
    if (call_.reduction == Reduction::batchmean) return double(call_.student.size(0));
    if (call_.num_items) {
      const void* p = call_.num_items->const_data_ptr();
      return call_.is_double() ? *(const double*)p : *(const float*)p;
    }
    if (!mask_.data) return double(count);
    int64_t n = 0;
    for (int64_t row = 0; row < count; ++row) n += counted(row);
    return double(n);
  }

  const DivergenceCall& call_;
  RowOffsets student_offsets_, teacher_offsets_;
  RowInput mask_, weight_, temperature_;
  const char *student_, *teacher_;
  char* gradient_;
  int64_t student_size_, teacher_size_;
  double factor_, per_temperature_;
};

// Walks the counted rows. `start(index, row)` may fill in states and factors before the work, `finish(index, row)`
// takes the results and returns the row's share of the sum. `given`: the states are known, only gradients are wanted.
template <class Start, class Finish>
class Driver {
 public:
  Driver(const Rows& rows, bool given, Start start, Finish finish)
      : rows_(rows), kernels_(rows.kernels), shape_(rows.shape), given_(given), start_(start), finish_(finish) {}

  // The sum of what `finish` returned.
  double run() const {
    const int64_t columns = shape_.columns, threads = torch::stable::get_num_threads();
    if (rows_.count < 4 * threads && columns > kSegment) return few_wide_rows();
    const int64_t per_chunk = std::clamp<int64_t>(kChunkElements / std::max<int64_t>(columns, 1), 1, kChunkRows);
    std::vector<double> sums((rows_.count + per_chunk - 1) / per_chunk);
    parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
      const auto powers = room_for_powers();
      for (int64_t c = begin; c < end; ++c) {
        sums[c] = chunk(c * per_chunk, std::min(rows_.count, (c + 1) * per_chunk), powers.get());
      }
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
  }

 private:
  int64_t gather(int64_t begin, int64_t end, DivergenceRow* batch, int64_t* index) const {
    int64_t n = 0;
    for (int64_t row = begin; row < end; ++row) {
      const bool counted = rows_.counted(row);
      rows_.clear_gradient(row, counted ? shape_.columns : 0);
      if (!counted) continue;
      rows_.describe(row, batch[n]);
      index[n] = row;
      start_(row, batch[n++]);
    }
    return n;
  }

  // One row's, for one thread. Null where no gradient follows a first look. Rows shared among threads do without:
  // theirs would all be needed at once, more memory than the gradient.
  std::unique_ptr<char[]> room_for_powers() const {
    const bool wanted = !given_ && rows_.wants_gradient() && shape_.columns > kNarrow;
    return std::unique_ptr<char[]>(wanted ? new char[powers_bytes(shape_)] : nullptr);
  }

  double finish_all(const DivergenceRow* batch, const int64_t* index, int64_t n) const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += finish_(index[i], batch[i]);
    return sum;
  }

  double chunk(int64_t begin, int64_t end, char* powers) const {
    DivergenceRow batch[kChunkRows];
    int64_t index[kChunkRows];
    const int64_t n = gather(begin, end, batch, index);
    if (shape_.columns <= kNarrow) {
      kernels_.narrow(shape_, batch, n, given_);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        batch[i].powers = powers;
        if (!given_) kernels_.look(shape_, batch[i], 0, shape_.columns);
        if (batch[i].gradient) kernels_.gradient(shape_, batch[i], 0, shape_.columns);
      }
    }
    return finish_all(batch, index, n);
  }

  // Too few rows to keep every thread busy: the threads share each row's columns.
  double few_wide_rows() const {
    std::vector<DivergenceRow> batch(rows_.count);
    std::vector<int64_t> index(rows_.count);
    const int64_t n = gather(0, rows_.count, batch.data(), index.data());
    const int64_t pieces = (shape_.columns + kSegment - 1) / kSegment;
    auto for_pieces = [&](auto work) {
      parallel_for(0, n * pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t from = task % pieces * kSegment;
          work(task, task / pieces, from, std::min(shape_.columns, from + kSegment));
        }
      });
    };
    if (!given_) {
      std::vector<DivergenceRow> seen(n * pieces);
      for_pieces([&](int64_t task, int64_t row, int64_t from, int64_t to) {
        seen[task] = batch[row];
        kernels_.look(shape_, seen[task], from, to);
      });
      for (int64_t task = 0; task < n * pieces; ++task) {
        DivergenceRow& row = batch[task / pieces];
        merge(row.state, seen[task].state, row.k);
      }
    }
    for_pieces([&](int64_t, int64_t row, int64_t from, int64_t to) {
      if (batch[row].gradient) kernels_.gradient(shape_, batch[row], from, to);
    });
    return finish_all(batch.data(), index.data(), n);
  }

  const Rows& rows_;
  const DivergenceKernels& kernels_;
  const DivergenceShape& shape_;
  bool given_;
  Start start_;
  Finish finish_;
};

// float or double memory, by the call.
class Reals {
 public:
  Reals(const Tensor& t, bool is_double) : data_(t.mutable_data_ptr()), double_(is_double) {}
  void set(int64_t i, double x) const { double_ ? void(((double*)data_)[i] = x) : void(((float*)data_)[i] = float(x)); }
  double get(int64_t i) const { return double_ ? ((const double*)data_)[i] : ((const float*)data_)[i]; }

 private:
  void* data_;
  bool double_;
};

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}

Tensor empty_gradient(const Tensor& student) {
  Tensor t = torch::stable::new_empty(student, std::vector<int64_t>(student.sizes().begin(), student.sizes().end()),
                                      student.scalar_type());
  advise_huge_pages(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
  return t;
}

void write_state(const Reals& to, int64_t row, const RowState<double>& s) {
  const double values[kRowStateSize] = {s.max_s, s.sum_s, s.max_t, s.sum_t, s.dot};
  for (int i = 0; i < kRowStateSize; ++i) to.set(row * kRowStateSize + i, values[i]);
}
RowState<double> read_state(const Reals& from, int64_t row) {
  const int64_t at = row * kRowStateSize;
  return {from.get(at), from.get(at + 1), from.get(at + 2), from.get(at + 3), from.get(at + 4)};
}

std::tuple<Tensor, Tensor> forward(const DivergenceCall& call, Save save) {
  call.check();
  const bool per_row = call.reduction == Reduction::none;
  const ScalarType real = call.loss_type();
  std::vector<int64_t> sizes = call.leading_sizes();
  Tensor loss = zeros(call.student, per_row ? sizes : std::vector<int64_t>{}, real);
  sizes.push_back(kRowStateSize);
  Tensor saved = save == Save::gradient ? empty_gradient(call.student)
                 : save == Save::state  ? zeros(call.student, sizes, real)
                                        : zeros(call.student, {0}, real);
  const Rows rows(call, save == Save::gradient ? &saved : nullptr, 1.0);
  if (call.columns == 0) {
    for (int64_t row = 0; row < rows.count; ++row) rows.clear_gradient(row, 0);
    return {loss, saved};
  }
  const Reals losses(loss, call.is_double()), states(saved, call.is_double());
  const Driver driver(
      rows, false, [](int64_t, DivergenceRow&) {},
      [&](int64_t row, const DivergenceRow& r) {
        const double value = r.coefficient * kl_of(r.state, r.k);
        if (per_row) losses.set(row, value);
        if (save == Save::state) write_state(states, row, r.state);
        return value;
      });
  const double sum = driver.run();
  if (!per_row) losses.set(0, sum);
  return {loss, saved};
}

Tensor backward(const DivergenceCall& call, const Tensor& grad_loss, const Tensor& state) {
  call.check();
  const bool per_row = call.reduction == Reduction::none;
  check_dtype(call.op, "grad_loss", grad_loss, call.loss_type());
  check_dtype(call.op, "state", state, call.loss_type());
  STD_TORCH_CHECK(state.is_contiguous() && state.numel() == call.rows() * kRowStateSize, call.op, ": state: expected ",
                  kRowStateSize, " numbers per row, got ", shape_of(state));
  if (per_row) check_leading(call.op, "grad_loss", grad_loss, call.student, call.leading());
  Tensor gradient = empty_gradient(call.student);
  const Reals upstream(grad_loss, call.is_double()), states(state, call.is_double());
  const Rows rows(call, &gradient, per_row ? 1.0 : upstream.get(0));
  const RowOffsets upstream_offsets = per_row ? call.offsets_of(grad_loss, "grad_loss") : RowOffsets{};
  const Driver driver(
      rows, true,
      [&](int64_t row, DivergenceRow& r) {
        r.state = read_state(states, row);
        if (per_row) r.factor *= upstream.get(upstream_offsets(row));
      },
      [](int64_t, const DivergenceRow&) { return 0.0; });
  driver.run();
  return gradient;
}

}  // namespace

std::tuple<Tensor, Tensor> kl_div_cpu(Tensor student, Tensor teacher, std::optional<Tensor> row_temperature,
                                      std::optional<Tensor> mask, std::optional<Tensor> weight,
                                      std::optional<Tensor> num_items, double temperature, int64_t columns,
                                      int64_t reduction, double scale, int64_t save) {
  return forward({"kl_div", student, teacher, row_temperature, mask, weight, num_items, temperature, columns,
                  Reduction(reduction), scale},
                 Save(save));
}

Tensor kl_div_backward_cpu(Tensor grad_loss, Tensor state, Tensor student, Tensor teacher,
                           std::optional<Tensor> row_temperature, std::optional<Tensor> mask,
                           std::optional<Tensor> weight, std::optional<Tensor> num_items, double temperature,
                           int64_t columns, int64_t reduction, double scale) {
  return backward({"kl_div", student, teacher, row_temperature, mask, weight, num_items, temperature, columns,
                   Reduction(reduction), scale},
                  grad_loss, state);
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kl_div", TORCH_BOX(&kl_div_cpu));
  m.impl("kl_div_backward", TORCH_BOX(&kl_div_backward_cpu));
}

}  // namespace kdfast
