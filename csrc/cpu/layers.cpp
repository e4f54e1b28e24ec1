// Distances between layers on the CPU: the rows of all layers shared among the threads.
//
// Rows are summed in chunks of a size that the shape alone decides, in double, and the chunks in order: the number of
// threads changes no sum.
#include "common/layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/tensors.h"
#include "cpu/variant.h"

namespace kdfast {
namespace {

// Numbers that a chunk of rows holds, at least: enough to pay for sharing it out.
constexpr int64_t kChunkElements = 1 << 14;

// A head of a sequence in a layer: R rows.
struct Group {
  const char *student, *teacher;
  char* gradient;  // null: not wanted
  const bool *rows, *columns;
  int64_t student_step, teacher_step;  // from row to row, in bytes
  LayerShape shape;
  double weight;
  bool skipped;
};

class LayerRows {
 public:
  // `upstream`: the factor of every row; by_row: of each.
  LayerRows(const LayerCall& call, const std::vector<Tensor>& gradients, double upstream, const double* by_row)
      : call_(call), gradients_(gradients), by_row_(by_row) {
    const double divisor = call.divisor ? Reals(*call.divisor, call.is_double()).get(0) : 1;
    scale_ = divisor > 0 ? upstream / divisor : 0;
    const bool* rows = call.row_mask ? (const bool*)call.row_mask->const_data_ptr() : nullptr;
    const bool* columns = call.column_mask ? (const bool*)call.column_mask->const_data_ptr() : nullptr;
    for (int64_t layer = 0; layer < call.layers(); ++layer) {
      for (int64_t b = 0; b < call.batch(); ++b) {
        for (int64_t h = 0; h < call.heads(); ++h) {
          groups_.push_back(group(layer, b, h));
          groups_.back().rows = rows ? rows + b * call.rows() : nullptr;
          groups_.back().columns = columns ? columns + b * call.columns() : nullptr;
        }
      }
    }
  }

  // The sum over all rows of weight * distance; `each(row, value)` sees every row's.
  template <class Each>
  double run(Each each) const {
    const int64_t rows = call_.rows(), all = call_.all_rows();
    const int64_t per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(call_.columns(), 1));
    std::vector<double> sums((all + per_chunk - 1) / per_chunk);
    torch::stable::parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t last = std::min(all, (c + 1) * per_chunk);
        int64_t at = c * per_chunk / rows, r = c * per_chunk % rows;
        for (int64_t row = c * per_chunk; row < last;) {
          const int64_t skipped = skip(groups_[at], r, std::min(rows, r + last - row));
          if (skipped == 0) {
            const double value = one(groups_[at], r, row);
            each(row, value);
            sums[c] += value;
          }
          const int64_t taken = std::max<int64_t>(skipped, 1);
          row += taken;
          if ((r += taken) == rows) ++at, r = 0;
        }
      }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

 private:
  Group group(int64_t layer, int64_t b, int64_t h) const {
    const Tensor &s = call_.student[layer], &t = call_.teacher[layer];
    const int64_t head = layer * call_.heads() + h, teacher_head = call_.head_map[head];
    auto at = [](const Tensor& x, int64_t i, int64_t j) {
      return (const char*)x.const_data_ptr() +
             (i * LayerCall::stride_of(x, 0) + j * LayerCall::stride_of(x, 1)) * int64_t(x.element_size());
    };
    Group g{};
    g.skipped = teacher_head < 0;
    g.student = at(s, b, h);
    g.teacher = at(t, b, g.skipped ? 0 : teacher_head);
    g.student_step = LayerCall::stride_of(s, 2) * int64_t(s.element_size());
    g.teacher_step = LayerCall::stride_of(t, 2) * int64_t(t.element_size());
    g.shape = {element_of(s.scalar_type()), element_of(t.scalar_type()), call_.columns(),
               LayerCall::stride_of(s, 3),  LayerCall::stride_of(t, 3),  call_.floor};
    g.weight = call_.weight[head] * scale_;
    if (!gradients_.empty()) {
      const Tensor& to = gradients_[layer];
      g.gradient = (char*)to.mutable_data_ptr() +
                   (b * call_.heads() + h) * call_.rows() * call_.columns() * int64_t(to.element_size());
    }
    return g;
  }

  // How many rows from r on, before `end`, do not count; their gradients are cleared together, which costs less
  // traffic.
  int64_t skip(const Group& g, int64_t r, int64_t end) const {
    int64_t next = r;
    while (next < end && (g.skipped || (g.rows && !g.rows[next]))) ++next;
    const int64_t bytes = call_.columns() * size_of(g.shape.student);
    if (g.gradient && next > r) std::memset(g.gradient + r * bytes, 0, (next - r) * bytes);
    return next - r;
  }
  double one(const Group& g, int64_t r, int64_t index) const {
    char* gradient = g.gradient ? g.gradient + r * call_.columns() * size_of(g.shape.student) : nullptr;
    LayerRow row{g.student + r * g.student_step, g.teacher + r * g.teacher_step, g.columns, gradient, g.weight, 0};
    if (by_row_) row.factor *= by_row_[index];
    distance(g.shape, row);
    return g.weight * row.value;
  }
  void distance(const LayerShape& shape, LayerRow& row) const {
    const VariantKernels& kernels = *cpu_variant().kernels;
    if (call_.kind != int64_t(Distance::kl)) return kernels.layers->distance[call_.kind](shape, row);
    const DivergenceKernels& kl = kernels.divergence[int(Divergence::kl_div)];
    const DivergenceShape logits{.student = shape.student,
                                 .teacher = shape.teacher,
                                 .gradient = shape.student,
                                 .columns = shape.columns,
                                 .gradient_columns = shape.columns,
                                 .student_stride = shape.student_stride,
                                 .teacher_stride = shape.teacher_stride};
    DivergenceRow of{};
    of.student = row.student;
    of.teacher = row.teacher;
    of.counted = row.counted;
    of.gradient = row.gradient;
    of.k = kLog2e;
    of.factor = row.factor;
    kl.look(logits, of, 0, shape.columns);
    kl.finish(logits, of);
    if (of.gradient) kl.gradient(logits, of, 0, shape.columns);
    row.value = of.loss;
  }

  const LayerCall& call_;
  const std::vector<Tensor>& gradients_;
  const double* by_row_;
  double scale_;
  std::vector<Group> groups_;
};

std::tuple<Tensor, std::vector<Tensor>> forward(const LayerCall& call, bool gradient) {
  Tensor loss = zeros(call.student[0], call.loss_sizes(), call.loss_type());
  std::vector<Tensor> gradients;
  if (gradient) gradients = empty_gradients(call.student);
  const Reals losses(loss, call.is_double());
  const double total = LayerRows(call, gradients, 1, nullptr).run([&](int64_t row, double value) {
    if (call.per_row) losses.set(row, value);
  });
  if (!call.per_row) losses.set(0, total);
  return {loss, gradients};
}

std::vector<Tensor> backward(const LayerCall& call, const Tensor& grad_loss) {
  const std::vector<Tensor> gradients = empty_gradients(call.student);
  const std::vector<double> upstream = Reals(grad_loss, call.is_double()).all(grad_loss.numel());
  LayerRows(call, gradients, call.per_row ? 1 : upstream[0], call.per_row ? upstream.data() : nullptr)
      .run([](int64_t, double) {});
  return gradients;
}

using Ops = LayerOps<forward, backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("layer_distance", TORCH_BOX(&Ops::layer_distance));
  m.impl("layer_distance_backward", TORCH_BOX(&Ops::layer_distance_backward));
}

}  // namespace kdfast
