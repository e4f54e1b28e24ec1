// KL(softmax(b Ta Tb^T) || softmax(a Sa Sb^T)) over the rows of a head's scores, which are made in tiles and not kept.
//
// 48 rows by up to 480 keys of both sides lie in L2, beside the head's keys, which are laid out once. The rows' states
// (csrc/common/row_state.h) merge over the keys' tiles; where there is more than one, the second look makes the scores
// again. 4 L^2 d multiply-adds for the value, 4 L^2 d more for the gradients, and 4 L^2 d for scores that did not stay.
#include "cpu/divergence_rows.h"
#include "cpu/qk_tokens.h"

namespace kdfast::KDFAST_VARIANT {

extern const DivergenceKernels kDivergences[];

namespace {

constexpr int64_t kKeys = 480;  // whole tiles and whole vectors

template <class Real>
class Kl {
 public:
  Kl(const QkShape& shape, QkHead* head, char* workspace)
      : shape_(shape),
        head_(head),
        kl_(kDivergences[int(Divergence::kl_div)]),
        s_(padded<Real>(shape.student_size)),
        t_(padded<Real>(shape.teacher_size)),
        keys_(padded<Real>(shape.length < kKeys ? shape.length : kKeys)),
        tiles_((shape.length + kKeys - 1) / kKeys),
        room_(workspace) {
    student_.q = room_.take<Real>(kChunk, s_);
    student_.k = room_.take<Real>(shape.length, s_);
    student_.k_transposed = room_.take<Real>(tiles_ * s_, keys_);
    student_.scores = room_.take<Real>(kChunk, keys_);
    teacher_.q = room_.take<Real>(kChunk, t_);
    teacher_.k = room_.take<Real>(shape.length, t_);
    teacher_.k_transposed = room_.take<Real>(tiles_ * t_, keys_);
    teacher_.scores = room_.take<Real>(kChunk, keys_);
    gradient_ = room_.take<Real>(kChunk, keys_);
    dq_ = room_.take<Real>(kChunk, s_);
  }
  int64_t bytes() const { return room_.bytes(); }
  static bool in_double(const QkShape& shape) { return shape.student == Element::f64; }

  void run() {
    for (int64_t key = 0; key < shape_.length; key += kKeys) read_keys(key, keys_from(key));
    for (int64_t begin = 0; begin < shape_.length; begin += kChunk) {
      const int64_t n = shape_.length - begin < kChunk ? shape_.length - begin : kChunk;
      read_queries(begin, n);
      look(begin, n);
      if (head_->student_dq) write_gradients(begin, n);
    }
  }

 private:
  struct Side {
    Real *q, *k, *k_transposed, *scores;
  };

  int64_t keys_from(int64_t key) const { return shape_.length - key < kKeys ? shape_.length - key : kKeys; }
  bool counted(int64_t query) const { return !head_->queries || head_->queries[query]; }

  void read_queries(int64_t begin, int64_t n) {
    read_tokens(shape_.student, head_->student_q, head_->queries, begin, n, shape_.student_size, shape_.student_scale,
                student_.q, s_);
    read_tokens(shape_.teacher, head_->teacher_q, head_->queries, begin, n, shape_.teacher_size, shape_.teacher_scale,
                teacher_.q, t_);
  }
  // The keys of a tile; the transpose of each lies by itself.
  void read_keys(int64_t key, int64_t keys) {
    read_tokens(shape_.student, head_->student_k, head_->keys, key, keys, shape_.student_size, 1, student_.k + key * s_,
                s_);
    read_tokens(shape_.teacher, head_->teacher_k, head_->keys, key, keys, shape_.teacher_size, 1, teacher_.k + key * t_,
                t_);
    transpose(student_.k + key * s_, keys, s_, transposed(student_, s_, key), keys_);
    transpose(teacher_.k + key * t_, keys, t_, transposed(teacher_, t_, key), keys_);
  }
  Real* transposed(const Side& side, int64_t width, int64_t key) const {
    return side.k_transposed + key / kKeys * width * keys_;
  }
  void make_scores(int64_t key, int64_t n, int64_t keys) {
    multiply_side(student_, s_, key, n, keys);
    multiply_side(teacher_, t_, key, n, keys);
  }
  void multiply_side(const Side& side, int64_t width, int64_t key, int64_t n, int64_t keys) {
    multiply<Real>(n, padded<Real>(keys), width, {side.q, width, 1}, transposed(side, width, key), keys_, side.scores,
                   keys_, false);
  }
  static DivergenceShape logits(int64_t keys) {
    const Element type = sizeof(Real) == 8 ? Element::f64 : Element::f32;
    return {type, type, type, keys, keys, 1, 1};
  }
  // Row i of the tile of scores, as logits.
  DivergenceRow row(int64_t i, int64_t key) const {
    DivergenceRow r{};
    r.student = student_.scores + i * keys_;
    r.teacher = teacher_.scores + i * keys_;
    r.gradient = gradient_ + i * keys_;
    r.counted = head_->keys ? head_->keys + key : nullptr;
    r.k = kLog2e;
    r.factor = head_->factor;
    return r;
  }

  void look(int64_t begin, int64_t n) {
    for (int64_t key = 0; key < shape_.length; key += kKeys) {
      const int64_t keys = keys_from(key);
      make_scores(key, n, keys);
      for (int64_t i = 0; i < n; ++i) {
        DivergenceRow r = row(i, key);
        if (!counted(begin + i)) continue;
        kl_.look(logits(keys), r, 0, keys);
        key == 0 ? void(rows_[i] = r) : kl_.merge(rows_[i], r);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!counted(begin + i)) continue;
      kl_.finish(logits(shape_.length), rows_[i]);
      head_->value += rows_[i].loss;
    }
  }
  void write_gradients(int64_t begin, int64_t n) {
    Real* sums = (Real*)head_->student_dk;
    for (int64_t key = 0; key < shape_.length; key += kKeys) {
      const int64_t keys = keys_from(key);
      if (tiles_ > 1) make_scores(key, n, keys);
      for (int64_t i = 0; i < n; ++i) {
        DivergenceRow r = row(i, key);
        r.state = rows_[i].state;
        counted(begin + i) ? kl_.gradient(logits(keys), r, 0, keys) : clear(gradient_ + i * keys_, keys);
      }
      multiply<Real>(n, s_, keys, {gradient_, keys_, 1}, student_.k + key * s_, s_, dq_, s_, key > 0);
      multiply<Real>(keys, s_, n, {gradient_, 1, keys_}, student_.q, s_, sums + key * s_, s_, true);
    }
    write_tokens(shape_.student, dq_, s_, n, shape_.student_size, shape_.student_scale, head_->student_dq, begin);
  }

  const QkShape& shape_;
  QkHead* head_;
  const DivergenceKernels& kl_;
  int64_t s_, t_, keys_, tiles_;  // widths of panels and tiles of keys; how many of these
  Room room_;
  Side student_, teacher_;
  Real *gradient_, *dq_;
  DivergenceRow rows_[kChunk];
};

}  // namespace

extern const QkKernels kQkKl = qk_kernels<Kl>();

}  // namespace kdfast::KDFAST_VARIANT
