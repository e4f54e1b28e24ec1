// A call of a loss between the scores of queries and keys, as every backend takes it.
#pragma once
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace kdfast {

enum class QkLoss : int { mse, kl, count };

// In the order of the schema (csrc/library.cpp). Layers of queries [B, H, L, d] and keys [B, heads that share, L, d].
struct QkCall {
  std::vector<Tensor> student_q, student_k, teacher_q, teacher_k;
  std::optional<Tensor> query_mask, key_mask, divisor;  // [B, L], [B, L], one number
  int64_t kind;
  double student_scale, teacher_scale;
  bool causal;
  std::vector<int64_t> head_map;  // per layer and student head: the teacher's head, or -1
  std::vector<double> weight;     // of the same
  bool per_head;

  const char* op() const { return "qk_distance"; }
  int64_t layers() const { return int64_t(student_q.size()); }
  int64_t batch() const { return student_q[0].size(0); }
  int64_t heads() const { return student_q[0].size(1); }
  int64_t key_heads() const { return student_k[0].size(1); }
  int64_t length() const { return student_q[0].size(2); }
  int64_t all_heads() const { return layers() * batch() * heads(); }
  bool is_double() const { return student_q[0].scalar_type() == ScalarType::Double; }
  ScalarType loss_type() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  std::vector<int64_t> loss_sizes() const {
    return per_head ? std::vector<int64_t>{layers(), batch(), heads()} : std::vector<int64_t>{};
  }

  std::vector<Tensor> with_gradient() const {
    std::vector<Tensor> all = student_q;
    all.insert(all.end(), student_k.begin(), student_k.end());
    return all;
  }

  void check() const {
    STD_TORCH_CHECK(kind >= 0 && kind < int64_t(QkLoss::count), op(), ": kind: expected 0 to ",
                    int64_t(QkLoss::count) - 1, ", got ", kind);
    STD_TORCH_CHECK(!student_q.empty(), op(), ": student_q: expected a layer or more, got none");
    const ScalarType s = student_q[0].scalar_type();
    check_side("student_q", "student_k", student_q, student_k, s);
    STD_TORCH_CHECK(teacher_q.size() == student_q.size(), op(), ": teacher_q: expected ", layers(), " layers, got ",
                    teacher_q.size());
    const ScalarType t = teacher_q[0].scalar_type();
    STD_TORCH_CHECK((s == ScalarType::Double) == (t == ScalarType::Double), op(),
                    ": teacher_q: expected float64 both or neither");
    check_side("teacher_q", "teacher_k", teacher_q, teacher_k, t);
    check_mask(op(), "query_mask", query_mask, student_q[0], batch(), length());
    check_mask(op(), "key_mask", key_mask, student_q[0], batch(), length());
    check_heads(op(), head_map, weight, layers() * heads(), teacher_q[0].size(1));
    check_number(op(), "divisor", divisor, student_q[0], loss_type());
  }
  void check_upstream(const Tensor& grad_loss) const {
    check_device(op(), "grad_loss", grad_loss, student_q[0]);
    check_dtype(op(), "grad_loss", grad_loss, loss_type());
    STD_TORCH_CHECK(grad_loss.is_contiguous() && grad_loss.numel() == (per_head ? all_heads() : 1), op(),
                    ": grad_loss: expected the loss's size, contiguous, got ", shape_of(grad_loss));
  }

 private:
  void check_side(const char* q_name, const char* k_name, const std::vector<Tensor>& q, const std::vector<Tensor>& k,
                  ScalarType dtype) const {
    STD_TORCH_CHECK(k.size() == q.size(), op(), ": ", k_name, ": expected ", q.size(), " layers, got ", k.size());
    STD_TORCH_CHECK(dtype == ScalarType::Double || is_short_float(dtype), op(), ": ", q_name,
                    ": expected float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(dtype));
    for (size_t i = 0; i < q.size(); ++i) {
      for (const auto& [name, x, like] : {std::tuple{q_name, q[i], q[0]}, std::tuple{k_name, k[i], k[0]}}) {
        check_dtype(op(), name, x, dtype);
        check_device(op(), name, x, student_q[0]);
        STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == batch() && x.size(1) == like.size(1) && x.size(2) == length() &&
                            x.size(3) == q[0].size(3),
                        op(), ": ", name, ": expected [", batch(), ", heads, ", length(), ", ", q[0].size(3), "], got ",
                        shape_of(x));
      }
    }
    STD_TORCH_CHECK(k[0].size(1) > 0 && q[0].size(1) % k[0].size(1) == 0, op(), ": ", k_name,
                    ": expected heads that divide the queries' ", q[0].size(1), ", got ", k[0].size(1));
  }
};

// The raw operators of a backend: `forward` takes a call and whether the gradients are wanted, `backward` a call and
// what arrives.
template <auto forward, auto backward>
struct QkOps {
  using MaybeTensor = std::optional<Tensor>;
  using Tensors = std::vector<Tensor>;
  static std::tuple<Tensor, Tensors> qk_distance(Tensors student_q, Tensors student_k, Tensors teacher_q,
                                                 Tensors teacher_k, MaybeTensor query_mask, MaybeTensor key_mask,
                                                 MaybeTensor divisor, int64_t kind, double student_scale,
                                                 double teacher_scale, bool causal, std::vector<int64_t> head_map,
                                                 std::vector<double> weight, bool per_head, bool gradient) {
    return forward(checked(student_q, student_k, teacher_q, teacher_k, query_mask, key_mask, divisor, kind,
                           student_scale, teacher_scale, causal, head_map, weight, per_head),
                   gradient);
  }
  static Tensors qk_distance_backward(Tensor grad_loss, Tensors student_q, Tensors student_k, Tensors teacher_q,
                                      Tensors teacher_k, MaybeTensor query_mask, MaybeTensor key_mask,
                                      MaybeTensor divisor, int64_t kind, double student_scale, double teacher_scale,
                                      bool causal, std::vector<int64_t> head_map, std::vector<double> weight,
                                      bool per_head) {
    const QkCall call = checked(student_q, student_k, teacher_q, teacher_k, query_mask, key_mask, divisor, kind,
                                student_scale, teacher_scale, causal, head_map, weight, per_head);
    call.check_upstream(grad_loss);
    return backward(call, grad_loss);
  }

 private:
  static QkCall checked(const Tensors& student_q, const Tensors& student_k, const Tensors& teacher_q,
                        const Tensors& teacher_k, const MaybeTensor& query_mask, const MaybeTensor& key_mask,
                        const MaybeTensor& divisor, int64_t kind, double student_scale, double teacher_scale,
                        bool causal, const std::vector<int64_t>& head_map, const std::vector<double>& weight,
                        bool per_head) {
    const QkCall call{.student_q = student_q,
                      .student_k = student_k,
                      .teacher_q = teacher_q,
                      .teacher_k = teacher_k,
                      .query_mask = query_mask,
                      .key_mask = key_mask,
                      .divisor = divisor,
                      .kind = kind,
                      .student_scale = student_scale,
                      .teacher_scale = teacher_scale,
                      .causal = causal,
                      .head_map = head_map,
                      .weight = weight,
                      .per_head = per_head};
    call.check();
    return call;
  }
};

}  // namespace kdfast
