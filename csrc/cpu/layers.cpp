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

// A student's or teacher's layer; steps in bytes.
struct Side {
  const char* data;
  int64_t batch, head, row;
};
struct Layer {
  Side student, teacher;
  char* gradient;  // null: not wanted
  LayerShape shape;
  bool gapless;  // rows lie side by side
};

// A head of a sequence in a layer: R rows.
struct Group {
  const Layer& layer;
  const char *student, *teacher;
  char* gradient;
  const bool *rows, *columns;
  double weight;
  bool skipped;
};

// How many from the first on, of `count`, do not count.
int64_t uncounted(const bool* counted, int64_t count) {
  const void* first = std::memchr(counted, true, count);
  return first ? (const bool*)first - counted : count;
}

class LayerRows {
 public:
  // `upstream`: the factor of every row; by_row: of each.
  LayerRows(const LayerCall& call, const std::vector<Tensor>& gradients, double upstream, const double* by_row)
      : call_(call),
        kernels_(*cpu_variant().kernels),
        by_row_(by_row),
        batch_(call.batch()),
        heads_(call.heads()),
        rows_(call.rows()),
        columns_(call.columns()),
        element_(size_of(element_of(call.student[0].scalar_type()))),
        row_mask_(call.row_mask ? (const bool*)call.row_mask->const_data_ptr() : nullptr),
        column_mask_(call.column_mask ? (const bool*)call.column_mask->const_data_ptr() : nullptr) {
    const double divisor = call.divisor ? Reals(*call.divisor, call.is_double()).get(0) : 1;
    scale_ = divisor > 0 ? upstream / divisor : 0;
    for (int64_t i = 0; i < call.layers(); ++i) {
      layers_.push_back(layer(call.student[i], call.teacher[i],
                              gradients.empty() ? nullptr : (char*)gradients[i].mutable_data_ptr()));
    }
  }

  // The sum over all rows of weight * distance; `each(row, value)` sees every row's.
  template <class Each>
  double run(Each each) const {
    const int64_t all = int64_t(layers_.size()) * batch_ * heads_ * rows_;
    const int64_t per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(columns_, 1));
    std::vector<double> sums((all + per_chunk - 1) / per_chunk);
    torch::stable::parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> values(std::min(per_chunk, all));
      for (int64_t c = begin; c < end; ++c) {
        const int64_t last = std::min(all, (c + 1) * per_chunk);
        for (int64_t row = c * per_chunk; row < last;) {
          const int64_t r = row % rows_, end_of_group = std::min(rows_, r + last - row);
          sums[c] += rows_of(group(row / rows_), r, end_of_group, row, values.data(), each);
          row += end_of_group - r;
        }
      }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

 private:
  Layer layer(const Tensor& s, const Tensor& t, char* gradient) const {
    auto side = [](const Tensor& x) {
      const int64_t size = int64_t(x.element_size());
      return Side{(const char*)x.const_data_ptr(), LayerCall::stride_of(x, 0) * size, LayerCall::stride_of(x, 1) * size,
                  LayerCall::stride_of(x, 2) * size};
    };
    Layer l{side(s), side(t), gradient, {}, false};
    l.shape = {element_of(s.scalar_type()), element_of(t.scalar_type()), columns_,
               LayerCall::stride_of(s, 3),  LayerCall::stride_of(t, 3),  call_.floor};
    l.gapless = l.shape.student_stride == 1 && l.shape.teacher_stride == 1 && l.student.row == columns_ * element_ &&
                l.teacher.row == columns_ * size_of(l.shape.teacher);
    return l;
  }
  Group group(int64_t index) const {
    const int64_t h = index % heads_, above = index / heads_, b = above % batch_;
    const int64_t head = above / batch_ * heads_ + h, teacher_head = call_.head_map[head];
    const Layer& l = layers_[above / batch_];
    return {l,
            l.student.data + b * l.student.batch + h * l.student.head,
            l.teacher.data + b * l.teacher.batch + std::max<int64_t>(teacher_head, 0) * l.teacher.head,
            l.gradient ? l.gradient + (b * heads_ + h) * rows_ * columns_ * element_ : nullptr,
            row_mask_ ? row_mask_ + b * rows_ : nullptr,
            column_mask_ ? column_mask_ + b * columns_ : nullptr,
            call_.weight[head] * scale_,
            teacher_head < 0};
  }

  // The sum over rows [r, end) of a group; `index` is that of the first among all rows. `values`: room for theirs.
  template <class Each>
  double rows_of(const Group& g, int64_t r, int64_t end, int64_t index, double* values, Each each) const {
    double sum = 0;
    for (const int64_t first = r; r < end;) {
      // What does not count is cleared together, which costs less traffic.
      const int64_t out = g.skipped ? end - r : g.rows ? uncounted(g.rows + r, end - r) : 0;
      if (g.gradient) std::memset(g.gradient + r * columns_ * element_, 0, out * columns_ * element_);
      if ((r += out) == end) break;
      int64_t taken = g.rows ? 1 : end - r;
      while (r + taken < end && g.rows[r + taken]) ++taken;
      const int64_t at = index + r - first, made = values_of(g, r, taken, at, values);
      for (int64_t i = 0; i < made; ++i) {
        each(at + i, g.weight * values[i]);
        sum += g.weight * values[i];
      }
      r += taken;
    }
    return sum;
  }
  // How many values those of `count` rows are.
  int64_t values_of(const Group& g, int64_t r, int64_t count, int64_t index, double* values) const {
    const Layer& l = g.layer;
    LayerShape shape = l.shape;
    LayerRun run{g.student + r * l.student.row,
                 g.teacher + r * l.teacher.row,
                 l.student.row,
                 l.teacher.row,
                 count,
                 g.columns,
                 g.gradient ? g.gradient + r * columns_ * element_ : nullptr,
                 g.weight,
                 by_row_ ? by_row_ + index : nullptr,
                 values};
    // Where nothing is asked of a row alone, rows that lie side by side are one long row.
    if (l.gapless && call_.kind == int64_t(Distance::squared) && !call_.per_row && !column_mask_) {
      shape.columns *= count;
      run.count = 1;
    }
    call_.kind == int64_t(Distance::kl) ? divergences(shape, run) : kernels_.layers->distance[call_.kind](shape, run);
    return run.count;
  }
  void divergences(const LayerShape& shape, const LayerRun& run) const {
    const DivergenceKernels& kl = kernels_.divergence[int(Divergence::kl_div)];
    const DivergenceShape logits{.student = shape.student,
                                 .teacher = shape.teacher,
                                 .gradient = shape.student,
                                 .columns = shape.columns,
                                 .gradient_columns = shape.columns,
                                 .student_stride = shape.student_stride,
                                 .teacher_stride = shape.teacher_stride};
    for (int64_t i = 0; i < run.count; ++i) {
      DivergenceRow of{};
      of.student = (const char*)run.student + i * run.student_step;
      of.teacher = (const char*)run.teacher + i * run.teacher_step;
      of.counted = run.counted;
      of.gradient = run.gradient ? (char*)run.gradient + i * columns_ * element_ : nullptr;
      of.k = kLog2e;
      of.factor = run.factor * (run.by_row ? run.by_row[i] : 1);
      kl.look(logits, of, 0, shape.columns);
      kl.finish(logits, of);
      if (of.gradient) kl.gradient(logits, of, 0, shape.columns);
      run.values[i] = of.loss;
    }
  }

  const LayerCall& call_;
  const VariantKernels& kernels_;
  const double* by_row_;
  const int64_t batch_, heads_, rows_, columns_, element_;  // the last: the student's size in bytes
  const bool *row_mask_, *column_mask_;
  double scale_;
  std::vector<Layer> layers_;
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
