// Squared error between the scores a Qs Ks^T and b Qt Kt^T of a head, in time linear in its length L, without scores.
//
// With X = [a Qs - b Qt, b Qt] and Y = [Ks, Ks - Kt] (rows that do not count are zero) a Qs Ks^T - b Qt Kt^T = X Y^T,
// so that its squared norm is the sum over the elements of G * H with the Gram matrices G = X^T X and H = Y^T Y, and
//   dQs = 2 a X H[:, first],   dKs = 2 Y (G[:, first] + G[:, second]).
// Both factors shrink as the student approaches its teacher: nothing cancels, whatever the distance. Head sizes that
// differ allow no difference: X = [a Qs, b Qt] and Y = [Ks, -Kt], in double. Causal: queries meet the H of the keys
// before their chunk and the chunk's own scores; keys the G of the queries after theirs.
//
// 20 L d^2 multiply-adds; q and k are read twice, dq and dk written once. Where 8 L^2 d are fewer, the scores are made
// after all, 48 rows at a time.
#include "cpu/qk_tokens.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

struct Widths {
  bool equal;
  int64_t first, second, all;  // columns of X and Y
};
template <class Real>
Widths widths_of(const QkShape& shape) {
  const int64_t s = padded<Real>(shape.student_size), t = padded<Real>(shape.teacher_size);
  return {shape.student_size == shape.teacher_size, s, t, s + t};
}

// By the multiply-adds of either, per token.
bool makes_scores(const QkShape& shape) {
  const Widths w = widths_of<float>(shape);
  const int64_t scores = shape.length * (2 * w.all + 4 * w.first) / (shape.causal ? 2 : 1);
  const int64_t own = shape.causal ? kChunk * (2 * w.all + 4 * w.first) : 0;
  const int64_t gram = (shape.causal ? 6 * w.all * w.all : 3 * w.all * w.all) + 4 * w.all * w.first + own;
  return scores < gram * (w.equal ? 1 : 2);
}

template <class Real>
class Mse {
 public:
  Mse(const QkShape& shape, QkHead* head, char* workspace)
      : shape_(shape),
        head_(head),
        w_(widths_of<Real>(shape)),
        scores_(makes_scores(shape)),
        keys_(scores_ ? padded<Real>(shape.length) : padded<Real>(kChunk)),
        room_(workspace) {
    const int64_t tokens = scores_ ? shape.length : kChunk;
    x_ = room_.take<Real>(kChunk, w_.all);
    y_ = room_.take<Real>(tokens, w_.all);
    z_ = room_.take<Real>(kChunk, w_.all);
    if (scores_ || shape.causal) {
      y_transposed_ = room_.take<Real>(w_.all, keys_);
      d_ = room_.take<Real>(kChunk, keys_);
      q_ = room_.take<Real>(kChunk, w_.first);
    }
    if (scores_) return;
    g_ = room_.take<Real>(w_.all, w_.all);
    h_ = room_.take<Real>(w_.all, w_.all);
    m_ = room_.take<Real>(w_.all, w_.first);
  }
  int64_t bytes() const { return room_.bytes(); }
  static bool in_double(const QkShape& shape) {
    return shape.student == Element::f64 || (shape.student_size != shape.teacher_size && !makes_scores(shape));
  }

  void run() {
    if (scores_) return from_scores();
    shape_.causal ? causal() : from_grams();
  }

 private:
  int64_t tokens_from(int64_t begin) const { return shape_.length - begin < kChunk ? shape_.length - begin : kChunk; }
  void read_queries(int64_t begin, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      Real* x = x_ + i * w_.all;
      read_token(shape_.student, head_->student_q, head_->queries, begin + i, shape_.student_size, shape_.student_scale,
                 x);
      read_token(shape_.teacher, head_->teacher_q, head_->queries, begin + i, shape_.teacher_size, shape_.teacher_scale,
                 x + w_.first);
      for (int64_t c = 0; w_.equal && c < w_.first; ++c) x[c] -= x[w_.first + c];
    }
  }
  void read_keys(int64_t begin, int64_t n, Real* y) {
    for (int64_t i = 0; i < n; ++i, y += w_.all) {
      read_token(shape_.student, head_->student_k, head_->keys, begin + i, shape_.student_size, 1, y);
      read_token(shape_.teacher, head_->teacher_k, head_->keys, begin + i, shape_.teacher_size, 1, y + w_.first);
      for (int64_t c = 0; c < w_.second; ++c) y[w_.first + c] = (w_.equal ? y[c] : Real(0)) - y[w_.first + c];
    }
  }
  // 2 factor a Qs, of the chunk in x_.
  void scale_queries(int64_t n) {
    const Real factor = Real(2 * head_->factor);
    for (int64_t i = 0; i < n; ++i) {
      const Real* x = x_ + i * w_.all;
      for (int64_t c = 0; c < w_.first; ++c) {
        q_[i * w_.first + c] = factor * (w_.equal ? x[c] + x[w_.first + c] : x[c]);
      }
    }
  }
  bool wants_gradient() const { return head_->student_dq; }
  Real* key_sums(int64_t begin) const { return (Real*)head_->student_dk + begin * w_.first; }
  void write_queries(int64_t begin, int64_t n, int64_t z_row) {
    const double factor = 2 * head_->factor * shape_.student_scale;
    write_tokens(shape_.student, z_, z_row, n, shape_.student_size, factor, head_->student_dq, begin);
  }

  // d_ = the scores of the chunk at `begin` with `keys` keys from `first_key` on; above the diagonal zeros.
  void make_scores(int64_t begin, int64_t n, int64_t first_key, int64_t keys) {
    multiply<Real>(n, padded<Real>(keys), w_.all, {x_, w_.all, 1}, y_transposed_, keys_, d_, keys_, false);
    for (int64_t i = 0; shape_.causal && i < n; ++i) {
      for (int64_t j = begin + i + 1 - first_key; j < padded<Real>(keys); ++j) d_[i * keys_ + j] = 0;
    }
    head_->value += dot(d_, keys_, d_, keys_, n, padded<Real>(keys));
  }
  void transpose_keys(int64_t tokens) { transpose(y_, w_.all, tokens, w_.all, y_transposed_, keys_); }

  void from_scores() {
    read_keys(0, shape_.length, y_);
    transpose_keys(shape_.length);
    for (int64_t begin = 0; begin < shape_.length; begin += kChunk) {
      const int64_t n = tokens_from(begin), keys = shape_.causal ? begin + n : shape_.length;
      read_queries(begin, n);
      make_scores(begin, n, 0, keys);
      if (!wants_gradient()) continue;
      multiply<Real>(n, w_.first, keys, {d_, keys_, 1}, y_, w_.all, z_, w_.first, false);
      write_queries(begin, n, w_.first);
      scale_queries(n);
      multiply<Real>(keys, w_.first, n, {d_, 1, keys_}, q_, w_.first, key_sums(0), w_.first, true);
    }
  }

  void add_gram(const Real* x, int64_t n, Real* to) {
    multiply<Real>(w_.all, w_.all, n, {x, 1, w_.all}, x, w_.all, to, w_.all, true, true);
  }
  // Of a Gram matrix its upper half was made.
  void mirror(Real* gram) {
    for (int64_t i = 0; i < w_.all; ++i) {
      for (int64_t j = 0; j < i; ++j) gram[i * w_.all + j] = gram[j * w_.all + i];
    }
  }
  // m_ = 2 factor (G[:, first] + G[:, second])
  void scale_gram() {
    const Real factor = Real(2 * head_->factor);
    for (int64_t i = 0; i < w_.all; ++i) {
      const Real* g = g_ + i * w_.all;
      for (int64_t c = 0; c < w_.first; ++c) {
        m_[i * w_.first + c] = factor * (w_.equal ? g[c] + g[w_.first + c] : g[c]);
      }
    }
  }
  void add_key_gradient(int64_t begin, int64_t n) {
    multiply<Real>(n, w_.first, w_.all, {y_, w_.all, 1}, m_, w_.first, key_sums(begin), w_.first, true);
  }

  void from_grams() {
    clear(g_, w_.all * w_.all);
    clear(h_, w_.all * w_.all);
    for (int64_t begin = 0; begin < shape_.length; begin += kChunk) {
      const int64_t n = tokens_from(begin);
      read_queries(begin, n);
      read_keys(begin, n, y_);
      add_gram(x_, n, g_);
      add_gram(y_, n, h_);
    }
    mirror(g_);
    mirror(h_);
    head_->value = dot(g_, w_.all, h_, w_.all, w_.all, w_.all);
    if (!wants_gradient()) return;
    scale_gram();
    for (int64_t begin = 0; begin < shape_.length; begin += kChunk) {
      const int64_t n = tokens_from(begin);
      read_queries(begin, n);
      read_keys(begin, n, y_);
      multiply<Real>(n, w_.first, w_.all, {x_, w_.all, 1}, h_, w_.all, z_, w_.first, false);
      write_queries(begin, n, w_.first);
      add_key_gradient(begin, n);
    }
  }

  void causal() {
    clear(h_, w_.all * w_.all);
    for (int64_t begin = 0; begin < shape_.length; begin += kChunk) {
      const int64_t n = tokens_from(begin);
      read_queries(begin, n);
      read_keys(begin, n, y_);
      transpose_keys(n);
      make_scores(begin, n, begin, n);
      multiply<Real>(n, w_.all, w_.all, {x_, w_.all, 1}, h_, w_.all, z_, w_.all, false);
      head_->value += dot(z_, w_.all, x_, w_.all, n, w_.all);
      add_gram(y_, n, h_);
      mirror(h_);
      if (!wants_gradient()) continue;
      multiply<Real>(n, w_.first, n, {d_, keys_, 1}, y_, w_.all, z_, w_.all, true);
      write_queries(begin, n, w_.all);
    }
    if (wants_gradient()) causal_keys();
  }
  void causal_keys() {
    const double value = head_->value;  // make_scores adds to it again
    clear(g_, w_.all * w_.all);
    for (int64_t begin = (shape_.length - 1) / kChunk * kChunk; begin >= 0; begin -= kChunk) {
      const int64_t n = tokens_from(begin);
      read_queries(begin, n);
      read_keys(begin, n, y_);
      transpose_keys(n);
      make_scores(begin, n, begin, n);
      scale_gram();
      add_key_gradient(begin, n);
      scale_queries(n);
      multiply<Real>(n, w_.first, n, {d_, 1, keys_}, q_, w_.first, key_sums(begin), w_.first, true);
      add_gram(x_, n, g_);
      mirror(g_);
    }
    head_->value = value;
  }

  const QkShape& shape_;
  QkHead* head_;
  Widths w_;
  bool scores_;
  int64_t keys_;  // columns of scores
  Room room_;
  Real *x_, *y_, *z_, *y_transposed_, *d_, *q_, *g_, *h_, *m_;
};

}  // namespace

extern const QkKernels kQkMse = qk_kernels<Mse>();

}  // namespace kdfast::KDFAST_VARIANT
