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

// A head's panels of tokens, and what the three forms below are made of.
template <class Real>
class Panels {
 public:
  int64_t bytes() const { return room_.bytes(); }

 protected:
  // Room for so many keys at a time.
  Panels(const QkShape& shape, QkHead* head, char* workspace, int64_t keys)
      : shape_(shape), head_(head), widths_(widths_of<Real>(shape)), room_(workspace) {
    x_ = room_.take<Real>(kChunk, widths_.all);
    y_ = room_.take<Real>(keys, widths_.all);
    product_ = room_.take<Real>(kChunk, widths_.all);
  }
  void take_scores(int64_t keys) {
    score_columns_ = padded<Real>(keys);
    y_transposed_ = room_.take<Real>(widths_.all, score_columns_);
    scores_ = room_.take<Real>(kChunk, score_columns_);
    scaled_queries_ = room_.take<Real>(kChunk, widths_.first);
  }
  void take_grams() {
    gram_of_x_ = room_.take<Real>(widths_.all, widths_.all);
    gram_of_y_ = room_.take<Real>(widths_.all, widths_.all);
    scaled_gram_ = room_.take<Real>(widths_.all, widths_.first);
  }

  bool wants_gradient() const { return head_->student_dq; }
  int64_t tokens_from(int64_t begin) const { return shape_.length - begin < kChunk ? shape_.length - begin : kChunk; }
  Real* key_sums(int64_t begin) const { return (Real*)head_->student_dk + begin * widths_.first; }

  void read_queries(int64_t begin, int64_t n) {
    const int64_t first = widths_.first, all = widths_.all;
    read_tokens(shape_.student, head_->student_q, head_->queries, begin, n, shape_.student_size, shape_.student_scale,
                x_, all);
    read_tokens(shape_.teacher, head_->teacher_q, head_->queries, begin, n, shape_.teacher_size, shape_.teacher_scale,
                x_ + first, all);
    for (Real* x = x_; widths_.equal && x < x_ + n * all; x += all) subtract(x, x + first, first, x);
  }
  void read_keys(int64_t begin, int64_t n) {
    const int64_t first = widths_.first, all = widths_.all;
    read_tokens(shape_.student, head_->student_k, head_->keys, begin, n, shape_.student_size, 1, y_, all);
    read_tokens(shape_.teacher, head_->teacher_k, head_->keys, begin, n, shape_.teacher_size, 1, y_ + first, all);
    for (Real* y = y_; y < y_ + n * all; y += all) {
      subtract(widths_.equal ? y : nullptr, y + first, widths_.second, y + first);
    }
  }
  void read_chunk(int64_t begin, int64_t n) {
    read_queries(begin, n);
    read_keys(begin, n);
  }
  // From the product, of rows of `row` numbers.
  void write_queries(int64_t begin, int64_t n, int64_t row) {
    const double factor = 2 * head_->factor * shape_.student_scale;
    write_tokens(shape_.student, product_, row, n, shape_.student_size, factor, head_->student_dq, begin);
  }

  // ---- scores ----
  void transpose_keys(int64_t n) { transpose(y_, n, widths_.all, y_transposed_, score_columns_); }
  // Scores of the chunk at `begin` with `keys` keys from `first_key` on; zeros above the diagonal. Returns the sum of
  // their squares.
  double make_scores(int64_t begin, int64_t n, int64_t first_key, int64_t keys) {
    multiply<Real>(n, padded<Real>(keys), widths_.all, {x_, widths_.all, 1}, y_transposed_, score_columns_, scores_,
                   score_columns_, false);
    for (int64_t i = 0; shape_.causal && i < n; ++i) {
      for (int64_t j = begin + i + 1 - first_key; j < padded<Real>(keys); ++j) scores_[i * score_columns_ + j] = 0;
    }
    return dot(scores_, score_columns_, scores_, score_columns_, n, padded<Real>(keys));
  }
  // scores * Ks into the product, or added to it.
  void multiply_scores(int64_t n, int64_t keys, int64_t row, bool add) {
    multiply<Real>(n, widths_.first, keys, {scores_, score_columns_, 1}, y_, widths_.all, product_, row, add);
  }
  // Adds 2 factor a scores^T Qs to the keys' gradient.
  void add_scores_to_keys(int64_t first_key, int64_t keys, int64_t n) {
    const Real factor = Real(2 * head_->factor);
    for (int64_t i = 0; i < n; ++i) {
      const Real* x = x_ + i * widths_.all;
      for (int64_t c = 0; c < widths_.first; ++c) {
        scaled_queries_[i * widths_.first + c] = factor * (widths_.equal ? x[c] + x[widths_.first + c] : x[c]);
      }
    }
    multiply<Real>(keys, widths_.first, n, {scores_, 1, score_columns_}, scaled_queries_, widths_.first,
                   key_sums(first_key), widths_.first, true);
  }

  // ---- Gram matrices ----
  void clear_gram(Real* gram) { clear(gram, widths_.all * widths_.all); }
  // The upper half, in whole vectors.
  void add_gram(const Real* panel, int64_t n, Real* gram) {
    multiply<Real>(widths_.all, widths_.all, n, {panel, 1, widths_.all}, panel, widths_.all, gram, widths_.all, true,
                   true);
  }
  void mirror(Real* gram) {
    for (int64_t i = 0; i < widths_.all; ++i) {
      for (int64_t j = 0; j < i; ++j) gram[i * widths_.all + j] = gram[j * widths_.all + i];
    }
  }
  // Of all of both, from the upper halves.
  double dot_of_grams() const {
    constexpr int64_t L = WideOf<Real>::count;
    const int64_t all = widths_.all;
    double total = 0;
    for (int64_t i = 0; i < all; i += L) {
      const Real *g = gram_of_x_ + i * all + i, *h = gram_of_y_ + i * all + i;
      total += dot(g, all, h, all, L, L) + 2 * dot(g + L, all, h + L, all, L, all - i - L);
    }
    return total;
  }
  // X H[:, columns] into the product.
  void multiply_gram(int64_t n, int64_t columns) {
    multiply<Real>(n, columns, widths_.all, {x_, widths_.all, 1}, gram_of_y_, widths_.all, product_, columns, false);
  }
  // 2 factor (G[:, first] + G[:, second])
  void scale_gram() {
    const Real factor = Real(2 * head_->factor);
    for (int64_t i = 0; i < widths_.all; ++i) {
      const Real* g = gram_of_x_ + i * widths_.all;
      for (int64_t c = 0; c < widths_.first; ++c) {
        scaled_gram_[i * widths_.first + c] = factor * (widths_.equal ? g[c] + g[widths_.first + c] : g[c]);
      }
    }
  }
  void add_gram_to_keys(int64_t begin, int64_t n) {
    multiply<Real>(n, widths_.first, widths_.all, {y_, widths_.all, 1}, scaled_gram_, widths_.first, key_sums(begin),
                   widths_.first, true);
  }

  const QkShape& shape_;
  QkHead* head_;
  Widths widths_;
  Room room_;
  Real *x_, *y_, *product_;  // [kChunk, all], [keys, all], [kChunk, all]
  int64_t score_columns_;
  Real *y_transposed_, *scores_, *scaled_queries_;  // [all, score_columns_], [kChunk, score_columns_], [kChunk, first]
  Real *gram_of_x_, *gram_of_y_, *scaled_gram_;     // G and H [all, all], [all, first]
};

// Short heads: the scores of a chunk of queries with all keys, causal or not.
template <class Real>
class FromScores : public Panels<Real> {
 public:
  FromScores(const QkShape& shape, QkHead* head, char* workspace) : Panels<Real>(shape, head, workspace, shape.length) {
    this->take_scores(shape.length);
  }
  void run() {
    const QkShape& shape = this->shape_;
    this->read_keys(0, shape.length);
    this->transpose_keys(shape.length);
    for (int64_t begin = 0; begin < shape.length; begin += kChunk) {
      const int64_t n = this->tokens_from(begin), keys = shape.causal ? begin + n : shape.length;
      this->read_queries(begin, n);
      this->head_->value += this->make_scores(begin, n, 0, keys);
      if (!this->wants_gradient()) continue;
      this->multiply_scores(n, keys, this->widths_.first, false);
      this->write_queries(begin, n, this->widths_.first);
      this->add_scores_to_keys(0, keys, n);
    }
  }
};

template <class Real>
class FromGrams : public Panels<Real> {
 public:
  FromGrams(const QkShape& shape, QkHead* head, char* workspace) : Panels<Real>(shape, head, workspace, kChunk) {
    this->take_grams();
  }
  void run() {
    Real *g = this->gram_of_x_, *h = this->gram_of_y_;
    const int64_t length = this->shape_.length;
    this->clear_gram(g);
    this->clear_gram(h);
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t n = this->tokens_from(begin);
      this->read_chunk(begin, n);
      this->add_gram(this->x_, n, g);
      this->add_gram(this->y_, n, h);
    }
    this->head_->value = this->dot_of_grams();
    if (!this->wants_gradient()) return;
    this->mirror(g);
    this->mirror(h);
    this->scale_gram();
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t n = this->tokens_from(begin);
      this->read_chunk(begin, n);
      this->multiply_gram(n, this->widths_.first);
      this->write_queries(begin, n, this->widths_.first);
      this->add_gram_to_keys(begin, n);
    }
  }
};

// Gram matrices of the tokens before (keys) and after (queries) a chunk, and the chunk's own scores.
template <class Real>
class Causal : public Panels<Real> {
 public:
  Causal(const QkShape& shape, QkHead* head, char* workspace) : Panels<Real>(shape, head, workspace, kChunk) {
    this->take_scores(kChunk);
    this->take_grams();
  }
  void run() {
    queries();
    if (this->wants_gradient()) keys();
  }

 private:
  double scores_of_chunk(int64_t begin, int64_t n) {
    this->read_chunk(begin, n);
    this->transpose_keys(n);
    return this->make_scores(begin, n, begin, n);
  }
  void queries() {
    const int64_t all = this->widths_.all;
    Real* h = this->gram_of_y_;
    this->clear_gram(h);
    for (int64_t begin = 0; begin < this->shape_.length; begin += kChunk) {
      const int64_t n = this->tokens_from(begin);
      this->head_->value += scores_of_chunk(begin, n);
      this->multiply_gram(n, all);
      this->head_->value += dot(this->product_, all, this->x_, all, n, all);
      this->add_gram(this->y_, n, h);
      this->mirror(h);
      if (!this->wants_gradient()) continue;
      this->multiply_scores(n, n, all, true);
      this->write_queries(begin, n, all);
    }
  }
  void keys() {
    Real* g = this->gram_of_x_;
    this->clear_gram(g);
    for (int64_t begin = (this->shape_.length - 1) / kChunk * kChunk; begin >= 0; begin -= kChunk) {
      const int64_t n = this->tokens_from(begin);
      scores_of_chunk(begin, n);
      this->scale_gram();
      this->add_gram_to_keys(begin, n);
      this->add_scores_to_keys(begin, n, n);
      this->add_gram(this->x_, n, g);
      this->mirror(g);
    }
  }
};

template <class Real>
class Mse {
 public:
  Mse(const QkShape& shape, QkHead* head, char* workspace) : shape_(shape), head_(head), workspace_(workspace) {}
  static bool in_double(const QkShape& shape) {
    return shape.student == Element::f64 || (shape.student_size != shape.teacher_size && !makes_scores(shape));
  }
  int64_t bytes() const {
    int64_t bytes = 0;
    in_its_form([&](auto& form) { bytes = form.bytes(); });
    return bytes;
  }
  void run() {
    in_its_form([](auto& form) { form.run(); });
  }

 private:
  template <class F>
  void in_its_form(F f) const {
    if (makes_scores(shape_)) return with<FromScores<Real>>(f);
    shape_.causal ? with<Causal<Real>>(f) : with<FromGrams<Real>>(f);
  }
  template <class Form, class F>
  void with(F f) const {
    Form form(shape_, head_, workspace_);
    f(form);
  }
  const QkShape& shape_;
  QkHead* head_;
  char* workspace_;
};

}  // namespace

extern const QkKernels kQkMse = qk_kernels<Mse>();

}  // namespace kdfast::KDFAST_VARIANT
