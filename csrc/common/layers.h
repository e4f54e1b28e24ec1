// A call of a distance between layers as every backend takes it.
//
// A layer is [B, H, R, C], or [B, R, C] of one head: B sequences, H heads, R rows of C numbers. Layers share all but
// the strides.
#pragma once
#include <tuple>

#include "common/checks.h"
#include "common/layer_terms.h"
#include "common/row_offsets.h"

namespace kdfast {

// In the order of the schema (csrc/library.cpp).
struct LayerCall {
  std::vector<Tensor> student, teacher;
  std::optional<Tensor> row_mask, column_mask, divisor;  // [B, R], [B, C], one number
  int64_t kind;
  std::vector<int64_t> head_map;  // per layer and student head: the teacher's head, or -1
  std::vector<double> weight;     // of the same
  double floor;
  bool per_row;

  const char* op() const { return "layer_distance"; }
  int64_t layers() const { return int64_t(student.size()); }
  // Size and stride of a dimension of [B, H, R, C].
  static int64_t size_of(const Tensor& t, int d) { return t.dim() == 4 ? t.size(d) : d == 1 ? 1 : t.size(d - (d > 1)); }
  static int64_t stride_of(const Tensor& t, int d) {
    return t.dim() == 4 ? t.stride(d) : d == 1 ? 0 : t.stride(d - (d > 1));
  }
  int64_t size(int d) const { return size_of(student[0], d); }
  int64_t teacher_heads() const { return size_of(teacher[0], 1); }
  int64_t batch() const { return size(0); }
  int64_t heads() const { return size(1); }
  int64_t rows() const { return size(2); }
  int64_t columns() const { return size(3); }
  int64_t all_rows() const { return layers() * batch() * heads() * rows(); }
  bool is_double() const { return student[0].scalar_type() == ScalarType::Double; }
  ScalarType loss_type() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  std::vector<int64_t> loss_sizes() const {
    return per_row ? std::vector<int64_t>{layers(), batch(), heads(), rows()} : std::vector<int64_t>{};
  }

  void check() const {
    STD_TORCH_CHECK(kind >= 0 && kind < int64_t(Distance::count), op(), ": kind: expected 0 to ",
                    int64_t(Distance::count) - 1, ", got ", kind);
    STD_TORCH_CHECK(!student.empty() && teacher.size() == student.size(), op(),
                    ": teacher: expected as many layers as of the student and one at least, got ", teacher.size());
    for (size_t i = 0; i < student.size(); ++i) check_layer(student[i], teacher[i]);
    check_mask(op(), "row_mask", row_mask, student[0], batch(), rows());
    check_mask(op(), "column_mask", column_mask, student[0], batch(), columns());
    check_heads(op(), head_map, weight, layers() * heads(), teacher_heads());
    check_number(op(), "divisor", divisor, student[0], loss_type());
  }
  void check_upstream(const Tensor& grad_loss) const {
    check_device(op(), "grad_loss", grad_loss, student[0]);
    check_dtype(op(), "grad_loss", grad_loss, loss_type());
    STD_TORCH_CHECK(grad_loss.is_contiguous() && grad_loss.numel() == (per_row ? all_rows() : 1), op(),
                    ": grad_loss: expected the loss's size, contiguous, got ", shape_of(grad_loss));
  }

 private:
  void check_layer(const Tensor& s, const Tensor& t) const {
    const ScalarType other = teacher[0].scalar_type();
    check_dtype(op(), "student", s, student[0].scalar_type());
    check_dtype(op(), "teacher", t, other);
    STD_TORCH_CHECK(
        (is_short_float(s.scalar_type()) && is_short_float(other)) || (is_double() && other == ScalarType::Double),
        op(), ": student, teacher: expected float32, bfloat16 or float16 each, or float64 both, got ",
        torch::headeronly::toString(s.scalar_type()), " and ", torch::headeronly::toString(other));
    check_device(op(), "student", s, student[0]);
    check_device(op(), "teacher", t, student[0]);
    for (const Tensor* x : {&s, &t}) {
      STD_TORCH_CHECK(x->dim() == 3 || x->dim() == 4, op(), ": student, teacher: expected 3 or 4 dimensions, got ",
                      shape_of(*x));
    }
    for (int d = 0; d < 4; ++d) {
      STD_TORCH_CHECK(size_of(s, d) == size(d), op(), ": student: expected layers of one shape, got ", shape_of(s));
      STD_TORCH_CHECK(size_of(t, d) == (d == 1 ? teacher_heads() : size(d)), op(),
                      ": teacher: expected the student's shape but for the heads, got ", shape_of(t));
    }
  }
};

// The raw operators of a backend: `forward` takes a call and whether the gradients are wanted, `backward` a call and
// what arrives.
template <auto forward, auto backward>
struct LayerOps {
  using MaybeTensor = std::optional<Tensor>;
  static std::tuple<Tensor, std::vector<Tensor>> layer_distance(std::vector<Tensor> student,
                                                                std::vector<Tensor> teacher, MaybeTensor row_mask,
                                                                MaybeTensor column_mask, MaybeTensor divisor,
                                                                int64_t kind, std::vector<int64_t> head_map,
                                                                std::vector<double> weight, double floor, bool per_row,
                                                                bool gradient) {
    return forward(checked(student, teacher, row_mask, column_mask, divisor, kind, head_map, weight, floor, per_row),
                   gradient);
  }
  static std::vector<Tensor> layer_distance_backward(Tensor grad_loss, std::vector<Tensor> student,
                                                     std::vector<Tensor> teacher, MaybeTensor row_mask,
                                                     MaybeTensor column_mask, MaybeTensor divisor, int64_t kind,
                                                     std::vector<int64_t> head_map, std::vector<double> weight,
                                                     double floor, bool per_row) {
    const LayerCall call =
        checked(student, teacher, row_mask, column_mask, divisor, kind, head_map, weight, floor, per_row);
    call.check_upstream(grad_loss);
    return backward(call, grad_loss);
  }

 private:
  static LayerCall checked(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                           const MaybeTensor& row_mask, const MaybeTensor& column_mask, const MaybeTensor& divisor,
                           int64_t kind, const std::vector<int64_t>& head_map, const std::vector<double>& weight,
                           double floor, bool per_row) {
    const LayerCall call{.student = student,
                         .teacher = teacher,
                         .row_mask = row_mask,
                         .column_mask = column_mask,
                         .divisor = divisor,
                         .kind = kind,
                         .head_map = head_map,
                         .weight = weight,
                         .floor = floor,
                         .per_row = per_row};
    call.check();
    return call;
  }
};

}  // namespace kdfast
